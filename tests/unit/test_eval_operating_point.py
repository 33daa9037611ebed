"""One threshold's hits and false positives by hand."""

import math

import numpy as np
import pytest
from eval_sample import CAR, detections, forward_camera, kitti_truth

from dm3d_deploy.errors import InternalError
from dm3d_deploy.evaluation.labels import FrameLabels
from dm3d_deploy.evaluation.operating_point import OperatingPoint, operating_point

NAMES = ("car", "pedestrian")


def car(x, y=0.0):
    return (x, y, 0.0, *CAR, 0.0)


def labels(rows, types, *, counts=None, all_around=False, areas=()):
    return FrameLabels(
        truth=kitti_truth(rows, types, areas=areas),
        num_points=np.array(counts if counts is not None else [50] * len(rows), dtype=np.int64),
        camera=forward_camera(),
        all_around=all_around,
    )


def point(found, frame, threshold=0.2, names=NAMES, found_labels=None):
    rows = [row for row, _ in found]
    given = detections(rows, found_labels or [0] * len(rows), [score for _, score in found], names)
    return operating_point([given], [frame], class_name="car", threshold=threshold, within_m=40.0)


def counts(result):
    return result.objects, result.hits, result.false_positives


def test_hits_misses_and_false_positives() -> None:
    frame = labels([car(10), car(20), car(30)], ["Car"] * 3)
    found = [(car(11.9), 0.9), (car(10.1), 0.8), (car(22.1), 0.7), (car(30), 0.19)]
    assert counts(point(found, frame)) == (3, 1, 2)  # the better-scored of two takes the first car
    assert counts(point(found, frame, threshold=0.1)) == (3, 2, 2)
    assert counts(point([], frame)) == (3, 0, 0)
    assert counts(point([(car(10), 0.9)], frame, found_labels=[1])) == (3, 0, 0)


@pytest.mark.parametrize(
    ("rows", "types", "points"),
    [
        ([car(10), car(20)], ["Car", "Van"], None),
        ([car(10), car(20)], ["Car", "Car"], [50, 0]),
        ([car(10), car(41)], ["Car", "Car"], None),
    ],
)
def test_what_need_not_be_found_may_be_found(rows, types, points) -> None:
    frame = labels(rows, types, counts=points)
    assert counts(point([(rows[0], 0.9), (rows[1], 0.8)], frame)) == (1, 1, 0)
    assert counts(point([(rows[0], 0.9)], frame)) == (1, 1, 0)


def test_nobody_labelled_behind_nor_in_dont_care_areas_nor_beyond_the_range() -> None:
    frame = labels([car(10)], ["Car"], areas=[(0, 0, 500, 400)])
    found = [(car(10), 0.9), (car(-10), 0.8), (car(30, 8), 0.7), (car(45, -3), 0.6), (car(30, -8), 0.5)]
    assert counts(point(found, frame)) == (1, 1, 1)
    assert counts(point(found, labels([car(10)], ["car"], all_around=True))) == (1, 1, 3)


def test_recall_and_its_interval() -> None:
    result = OperatingPoint(threshold=0.2, frames=4, objects=20, hits=18, false_positives=6)
    assert (result.recall, result.false_positives_per_frame) == (0.9, 1.5)
    assert result.recall_interval == pytest.approx((0.699, 0.972), abs=5e-4)  # Wilson's table for 18 of 20
    all_found = OperatingPoint(threshold=0.2, frames=1, objects=10, hits=10, false_positives=0)
    assert all_found.recall_interval == pytest.approx((0.7225, 1.0), abs=5e-4)
    none = OperatingPoint(threshold=0.2, frames=1, objects=0, hits=0, false_positives=0)
    assert math.isnan(none.recall)
    assert none.recall_interval == (0.0, 1.0)
    with pytest.raises(InternalError, match="0 frames of detections and 0"):
        operating_point([], [], class_name="car", threshold=0.5, within_m=40.0)
