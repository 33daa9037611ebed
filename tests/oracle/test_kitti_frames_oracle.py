"""KITTI's own frames: boxes and points in them as in OpenPCDet's infos, published detections against the labels."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from calib.dataset import open_dataset
from dm3d_deploy.errors import FrameError
from dm3d_deploy.evaluation.camera import boxes_from_camera, image_boxes
from dm3d_deploy.evaluation.kitti import KittiFound, KittiTruth, kitti_rows
from dm3d_deploy.geometry.boxes import select_boxes, wrap_angle

INFOS = ("000000", "000001", "000002", "000003", "000004", "000005")
PUBLISHED = ("000001", "000002", "000004", "000005")  # the published ones that have labels
TALLER = (0.0, 0.0, 0.0, 60.0)  # so that every detection counts
LABELLED = (*INFOS, "000068", "000192", "001481", "002613")

pytestmark = pytest.mark.data


def published(shared, kind: str, name: str, camera) -> KittiFound:
    lines = (shared / "data" / "pointpillars_published" / kind / f"{name}.txt").read_text().splitlines()
    rows = [line.split() for line in lines]
    table = np.array([[float(v) for v in row[1:]] for row in rows]).reshape(-1, 15)
    return KittiFound(
        boxes=boxes_from_camera(camera, table[:, 7:14]),
        types=tuple(row[0] for row in rows),
        scores=table[:, 14],
        image_px=table[:, 3:7],
    )


def test_boxes_and_the_points_in_them_are_those_of_the_infos(shared) -> None:
    infos = pickle.loads((shared / "data" / "kitti" / "kitti_infos_trainval.pkl").read_bytes())
    expected = {info["point_cloud"]["lidar_idx"]: info["annos"] for info in infos}
    folder = open_dataset(shared / "data" / "kitti", INFOS)
    objects = 0
    for name in folder.names:
        labels = folder.read(name).labels
        box = expected[name]["gt_boxes_lidar"]
        np.testing.assert_allclose(labels.truth.boxes.centre, box[:, :3], atol=1e-4)
        np.testing.assert_allclose(labels.truth.boxes.size, box[:, 3:6], atol=1e-4)
        # The infos take the camera's heading in the LiDAR's plane as zero.
        np.testing.assert_allclose(wrap_angle(labels.truth.boxes.yaw - box[:, 6]), 0, atol=2e-3)
        counts = expected[name]["num_points_in_gt"][: len(box)]
        assert np.abs(labels.num_points - counts).max() <= 6
        objects += len(box)
    assert objects == 10


def test_projected_boxes_lie_where_people_drew_them(shared) -> None:
    folder = open_dataset(shared / "data" / "kitti", LABELLED)
    away = []
    for name in folder.names:
        labels = folder.read(name).labels
        whole = labels.truth.truncation == 0
        away.append(np.abs(image_boxes(labels.camera, labels.truth.boxes) - labels.truth.image_px)[whole].max(axis=1))
    distances = np.concatenate(away)
    assert len(distances) > 30
    assert np.median(distances) < 3


def test_labels_as_detections_give_100_for_every_difficulty(shared) -> None:
    folder = open_dataset(shared / "data" / "kitti", LABELLED)
    truths = [folder.read(name).labels.truth for name in folder.names]
    founds = [
        KittiFound(boxes=t.boxes, types=t.types, scores=np.linspace(0.9, 0.5, len(t.boxes)), image_px=t.image_px)
        for t in truths
    ]
    rows = [row for row in kitti_rows(truths, founds) if row.objects]
    assert [row.ap_percent for row in rows] == [pytest.approx(100.0)] * len(rows)
    cars = {row.subset: row.objects for row in rows if row.class_name == "Car"}
    assert (cars["easy"], cars["moderate"], cars["hard"]) == (4, 15, 19)
    with pytest.raises(FrameError, match=r"1 of 11 frames of .* have no labels, first label_2/000008\.txt"):
        open_dataset(shared / "data" / "kitti")


def test_published_detections_find_all_that_counts(shared) -> None:
    folder = open_dataset(shared / "data" / "kitti", PUBLISHED)
    frames = [folder.read(name).labels for name in folder.names]
    for kind in ("pcdet", "pred"):
        founds = [published(shared, kind, name, f.camera) for name, f in zip(PUBLISHED, frames, strict=True)]
        rows = [row for row in kitti_rows([f.truth for f in frames], founds) if row.objects]
        found = {(row.class_name, row.subset, row.objects): row.ap_percent for row in rows if "3d R40" in row.measure}
        assert found == {
            ("Pedestrian", "easy", 1): 100.0,
            ("Pedestrian", "moderate", 1): 100.0,
            ("Pedestrian", "hard", 1): 100.0,
            ("Pedestrian", "0-30 m", 1): 100.0,
            ("Car", "moderate", 2): 100.0,
            ("Car", "hard", 2): 100.0,
            ("Car", "30-50 m", 2): 100.0,
        }


def test_the_two_published_executions_agree(shared) -> None:
    """PyTorch's detections above 0.3 as labels: TensorRT's find every one.

    One car of TensorRT's (0.47 in frame 2) is PyTorch's nowhere: behind four hits, so the last two of six are found at
    a precision of 6/7.
    """
    folder = open_dataset(shared / "data" / "kitti", PUBLISHED)
    truths, founds = [], []
    for name in PUBLISHED:
        camera = folder.read(name).labels.camera
        pcdet, pred = (published(shared, kind, name, camera) for kind in ("pcdet", "pred"))
        sure = np.flatnonzero(pcdet.scores > 0.3)
        truths.append(
            KittiTruth(
                boxes=select_boxes(pcdet.boxes, sure),
                types=tuple(pcdet.types[i] for i in sure),
                image_px=pcdet.image_px[sure] + TALLER,
                truncation=np.zeros(len(sure)),
                occlusion=np.zeros(len(sure), dtype=np.int64),
                dont_care_px=np.zeros((0, 4)),
            )
        )
        founds.append(replace(pred, image_px=pred.image_px + TALLER))
    rows = {r.class_name: r for r in kitti_rows(truths, founds) if (r.measure, r.subset) == ("3d R40", "easy")}
    assert {name: (row.objects, row.ap_percent) for name, row in rows.items()} == {
        "Pedestrian": (1, 100.0),
        "Cyclist": (3, 100.0),
        "Car": (6, pytest.approx(100 * (30 + 10 * 6 / 7) / 40)),
    }
