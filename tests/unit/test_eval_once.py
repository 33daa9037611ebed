"""ONCE's AP by hand: headings, ranges, vehicles as one class."""

import numpy as np
import pytest
from eval_sample import CAR, WALKER, detections, truth

from dm3d_deploy.errors import InternalError
from dm3d_deploy.evaluation.once import once_mean, once_rows, oriented_iou

NAMES = ("Car", "Bus", "Truck", "Pedestrian", "Cyclist")


def rows_of(found, labels, scores, objects, object_labels):
    return once_rows([detections(found, labels, scores, NAMES)], [truth(objects, object_labels)])


def ap(rows, name, subset="all"):
    (row,) = [r for r in rows if (r.class_name, r.subset) == (name, subset)]
    return row.ap_percent


def car(x, y=0.0, yaw=0.0):
    return (x, y, 0.0, *CAR, yaw)


def test_labels_as_detections_give_100() -> None:
    objects = [car(10.0), car(40.0, yaw=1.0), car(60.0), (10.0, 5.0, 0.0, *WALKER, 0.0)]
    rows = rows_of(objects, [0, 1, 2, 3], [0.9, 0.8, 0.7, 0.6], objects, [0, 1, 2, 3])
    for name in ("Vehicle", "Car", "Bus", "Truck", "Pedestrian"):
        assert ap(rows, name) == pytest.approx(100.0)
    assert [ap(rows, "Vehicle", s) for s in ("0-30 m", "30-50 m", "50+ m")] == [100.0] * 3
    assert [ap(rows, "Car", s) for s in ("0-30 m", "30-50 m", "50+ m")] == [100.0, None, None]
    assert ap(rows, "Cyclist") is None
    assert once_mean(rows, "all") == pytest.approx(100.0)
    assert once_mean(rows, "30-50 m") == pytest.approx(100.0)
    assert once_mean(rows, "nowhere") is None


@pytest.mark.parametrize(("turn", "expected"), [(1.5, 1.0), (1.6, 0.0), (np.pi, 0.0), (2 * np.pi - 0.1, 1.0)])
def test_a_box_turned_by_more_than_a_quarter_hits_nothing(turn: float, expected: float) -> None:
    square = (10.0, 0.0, 0.0, 2.0, 2.0, 1.5)
    one, other = truth([(*square, 0.0)], [0]).boxes, truth([(*square, turn)], [0]).boxes
    assert (oriented_iou(one, other)[0, 0] > 0) == bool(expected)
    half_turned = rows_of([car(10.0, yaw=np.pi)], [0], [0.9], [car(10.0)], [0])
    assert ap(half_turned, "Car") == 0.0


def test_the_overlap_that_each_class_needs() -> None:
    for shift, expected in ((0.7, 100.0), (0.71, 0.0)):  # 0.702 and 0.6985
        assert ap(rows_of([car(10 + shift)], [0], [0.9], [car(10.0)], [0]), "Car") == expected
    person = (10.0, 0.0, 0.0, *WALKER, 0.0)
    for shift, expected in ((0.43, 100.0), (0.44, 0.0)):  # 0.37 / 1.23 = 0.301, 0.36 / 1.24 = 0.290
        found = (10.0 + shift, 0.0, 0.0, *WALKER, 0.0)
        assert ap(rows_of([found], [3], [0.9], [person], [3]), "Pedestrian") == expected
    for shift, expected in ((0.26, 100.0), (0.27, 0.0)):
        found = (10.0 + shift, 0.0, 0.0, *WALKER, 0.0)
        assert ap(rows_of([found], [4], [0.9], [person], [4]), "Cyclist") == expected


def test_a_bus_taken_for_a_truck_is_a_vehicle_all_the_same() -> None:
    rows = rows_of([car(10.0)], [2], [0.9], [car(10.0)], [1])
    assert (ap(rows, "Vehicle"), ap(rows, "Bus"), ap(rows, "Truck")) == (100.0, 0.0, None)


def test_a_false_positive_counts_in_its_own_range_only() -> None:
    # At 40 m something that is not there, scored above the hit at 10 m.
    rows = rows_of([car(40.0), car(10.0)], [0, 0], [0.9, 0.8], [car(10.0), car(45.0, 10.0)], [0, 0])
    assert ap(rows, "Car", "0-30 m") == 100.0
    assert ap(rows, "Car", "30-50 m") == 0.0
    # One of two objects at precision 1/2: recall 0 to 1/2 of 50 steps, the first step left out.
    assert ap(rows, "Car") == pytest.approx(100 * 25 * 0.5 / 50)


def test_a_hit_across_the_border_of_a_range_is_a_mistake_in_neither() -> None:
    rows = rows_of([car(30.2), car(10.0)], [0, 0], [0.9, 0.8], [car(29.9), car(10.0), car(40.0)], [0, 0, 0])
    assert ap(rows, "Car", "0-30 m") == 50.0  # the object at 29.9 m counts, and what hit it does not
    assert ap(rows, "Car", "30-50 m") == 0.0
    near = [r.objects for r in rows if r.class_name == "Car"]
    assert near == [3, 2, 1, 0]


def test_frames_must_fit() -> None:
    with pytest.raises(InternalError, match="0 frames of detections and 0"):
        once_rows([], [])
