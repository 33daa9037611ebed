"""Real nuScenes keyframes: points in boxes as the data set counted them, labels as detections."""

import pickle

import numpy as np
import pytest

from calib.readers import read_points
from dm3d_deploy.evaluation.nds import nds_score, nuscenes_rows
from dm3d_deploy.evaluation.nuscenes import CLASS_RANGE_M, Truth
from dm3d_deploy.geometry.boxes import points_in_boxes, select_boxes
from dm3d_deploy.pointcloud import Boxes3D, Detections

NAMES = tuple(CLASS_RANGE_M)
LEGACY = (
    "n008-2018-08-01-15-16-36-0400__LIDAR_TOP__1533151603547590",
    "n008-2018-08-01-15-16-36-0400__LIDAR_TOP__1533151612397179",
)
NEWER = "n015-2018-07-24-11-22-45+0800__LIDAR_TOP__1532402927647951"

pytestmark = pytest.mark.data


def frames(shared):
    """Points, boxes, class names and the data set's point counts of each keyframe."""
    folder = shared / "data" / "nuscenes"
    infos = pickle.loads((folder / "mini_val_infos_legacy.pkl").read_bytes())["infos"]
    legacy = {info["lidar_path"].rsplit("/", 1)[1][: -len(".pcd.bin")]: info for info in infos}
    for name in LEGACY:
        info = legacy[name]
        table = np.array(info["gt_boxes"])
        size, yaw = table[:, [4, 3, 5]], -table[:, 6] - np.pi / 2
        yield name, boxes(table[:, :3], size, yaw, info["gt_velocity"]), list(info["gt_names"]), info["num_lidar_pts"]
    newer = pickle.loads((folder / "n015-2018-07-24-11-22-45+0800.pkl").read_bytes())
    words = list(newer["metainfo"]["categories"])
    rows = newer["data_list"][0]["instances"]
    table = np.array([row["bbox_3d"] for row in rows])
    labels = [words[row["bbox_label_3d"]] for row in rows]
    counts = np.array([row["num_lidar_pts"] for row in rows])
    yield NEWER, boxes(table[:, :3], table[:, 3:6], table[:, 6], [row["velocity"] for row in rows]), labels, counts


def boxes(centre, size, yaw, velocity):
    parts = (np.asarray(part, dtype=np.float32) for part in (centre, size, yaw, velocity))
    return Boxes3D(**dict(zip(("centre", "size", "yaw", "velocity"), parts, strict=True)))


def test_points_in_boxes_are_those_that_the_data_set_counted(shared) -> None:
    objects = 0
    for name, box, _, counts in frames(shared):
        cloud = read_points(shared / "data" / "nuscenes" / f"{name}.pcd.bin")
        found = points_in_boxes(cloud.points[:, :3], box).sum(axis=1)
        # The data set's boxes are upright in the world, ours in the frame of a sensor that is tilted a little.
        assert found.sum() == pytest.approx(counts.sum(), rel=0.08)
        assert (np.abs(found - counts) <= 5).mean() > 0.85
        objects += len(box)
    assert objects == 147


def test_labels_as_detections(shared) -> None:
    truths, found = [], []
    for _, box, words, counts in frames(shared):
        rows = np.flatnonzero([word in NAMES and count > 0 for word, count in zip(words, counts, strict=True)])
        labels = np.array([NAMES.index(words[row]) for row in rows])
        truths.append(Truth(boxes=select_boxes(box, rows), labels=labels))
        known = select_boxes(box, rows)
        speed = np.nan_to_num(known.velocity)
        still = Boxes3D(centre=known.centre, size=known.size, yaw=known.yaw, velocity=speed)
        scores = np.linspace(0.9, 0.5, len(rows)).astype(np.float32)
        found.append(Detections(boxes=still, scores=scores, labels=labels, class_names=NAMES))
    score = nds_score(found, truths)
    assert {name: row.objects for name, row in score.ap.classes.items()} == {
        "car": 23,
        "truck": 2,
        "barrier": 15,
        "pedestrian": 44,
        "traffic_cone": 4,
    }
    assert dict(score.errors) == {"ATE": 0.0, "ASE": 0.0, "AOE": 0.0, "AVE": 0.0}
    assert score.nds == pytest.approx(0.9)
    rows = [row for row in nuscenes_rows(found, truths, "all", (0.0, np.inf)) if row.objects]
    assert [row.ap_percent for row in rows] == pytest.approx([100.0] * 5)
