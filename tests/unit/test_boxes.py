"""Corners, overlaps and points inside, on cases whose answer is known by hand."""

import numpy as np
import pytest

from dm3d_deploy.geometry.boxes import (
    bev_from_boxes,
    corners_bev,
    iou_3d_matrix,
    iou_bev_matrix,
    iou_bev_pairs,
    near_pairs,
    points_in_boxes,
    select_boxes,
    wrap_angle,
)
from dm3d_deploy.pointcloud import Boxes3D


def boxes_of(*rows: tuple[float, ...]) -> Boxes3D:
    """Rows x, y, z, l, w, h, yaw."""
    array = np.array(rows, dtype=np.float32).reshape(-1, 7)
    return Boxes3D(
        centre=array[:, :3], size=array[:, 3:6], yaw=array[:, 6], velocity=np.zeros((len(array), 2), np.float32)
    )


def rectangle(x: float, y: float, length: float, width: float, yaw: float) -> np.ndarray:
    return np.array([[x, y, length, width, yaw]])


def test_angles_are_wrapped_and_those_in_range_are_untouched() -> None:
    inside = np.array([-3.1, -1.0, 0.0, 2.5, np.pi, -np.pi])
    assert np.array_equal(wrap_angle(inside), inside)
    assert np.allclose(
        wrap_angle(np.array([3 * np.pi / 2, -3 * np.pi / 2, 7.0])), [-np.pi / 2, np.pi / 2, 7 - 2 * np.pi]
    )
    assert wrap_angle(np.array([4.0], np.float32)).dtype == np.float32


def test_corners_run_counter_clockwise_from_the_front_left() -> None:
    found = corners_bev(rectangle(10, 20, 4, 2, np.pi / 2))
    assert np.allclose(found[0], [[9, 22], [9, 18], [11, 18], [11, 22]])


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 4, 2, 0.3), (0, 0, 4, 2, 0.3), 1.0),
        ((0, 0, 4, 2, 0.0), (0, 0, 2, 4, np.pi / 2), 1.0),
        ((0, 0, 4, 2, 0.7), (0, 0, 4, 2, 0.7 + np.pi), 1.0),
        ((0, 0, 4, 2, 0.0), (0, 0, 4, 2, np.pi / 2), 4 / 12),
        ((0, 0, 4, 4, 0.0), (0, 0, 2, 1, 1.1), 2 / 16),  # contained
        ((0, 0, 2, 1, 1.1), (0, 0, 4, 4, 0.0), 2 / 16),  # containing
        ((0, 0, 2, 2, 0.0), (2, 0, 2, 2, 0.0), 0.0),  # share an edge
        ((0, 0, 2, 2, 0.0), (2, 2, 2, 2, 0.0), 0.0),  # share a corner
        ((0, 0, 2, 2, 0.0), (1, 0, 2, 2, 0.0), 2 / 6),
        ((0, 0, 2, 2, 0.0), (0, 0, 2 * np.sqrt(2), 2 * np.sqrt(2), np.pi / 4), 0.5),  # a diamond around a square
        ((0, 0, 2, 2, 0.0), (0, 0, 0, 0, 0.0), 0.0),
        ((0, 0, 0, 0, 0.0), (0, 0, 0, 0, 0.0), 0.0),
        ((500, -300, 1e-4, 1e-4, 0.4), (500, -300, 1e-4, 1e-4, 0.4), 1.0),
        ((0, 0, 4e5, 3e5, 0.2), (30, 10, 4, 2, 1.0), 8 / 1.2e11),
    ],
)
def test_iou_of_known_pairs(a: tuple[float, ...], b: tuple[float, ...], expected: float) -> None:
    assert iou_bev_pairs(rectangle(*a), rectangle(*b))[0] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_matrix_equals_its_pairs_and_prunes_only_the_far_ones() -> None:
    rng = np.random.default_rng(0)
    a, b = (
        boxes_of(*np.column_stack([rng.uniform(-8, 8, (n, 3)), rng.uniform(0.2, 6, (n, 3)), rng.uniform(-9, 9, n)]))
        for n in (40, 30)
    )
    row, column = np.indices((40, 30)).reshape(2, -1)
    pairs = iou_bev_pairs(bev_from_boxes(a)[row], bev_from_boxes(b)[column])
    assert np.allclose(iou_bev_matrix(a, b).ravel(), pairs, atol=1e-12)
    near = set(zip(*(index.tolist() for index in near_pairs(bev_from_boxes(a), bev_from_boxes(b))), strict=True))
    assert 0 < len(near) < 1200
    assert all(
        pair in near
        for pair, iou in zip(zip(row.tolist(), column.tolist(), strict=True), pairs, strict=True)
        if iou > 1e-12
    )


def test_near_pairs_come_in_row_order_beyond_one_block() -> None:
    bev = np.tile(rectangle(0, 0, 1, 1, 0), (1100, 1))
    bev[:, 0] = np.arange(1100) * 10
    row, column = near_pairs(bev, bev)
    assert row.tolist() == column.tolist() == list(range(1100))


def test_volume_overlap_counts_the_shared_height() -> None:
    a = boxes_of((0, 0, 0, 4, 2, 2, 0.5))
    b = boxes_of(
        (0, 0, 1, 4, 2, 2, 0.5), (0, 0, 2, 4, 2, 2, 0.5), (0, 0, 0, 4, 2, 2, 0.5 + np.pi), (50, 0, 0, 4, 2, 2, 0)
    )
    assert np.allclose(iou_3d_matrix(a, b), [[1 / 3, 0, 1, 0]], atol=1e-6)


def test_empty_sets_give_empty_tables() -> None:
    none, one = boxes_of(), boxes_of((0, 0, 0, 1, 1, 1, 0))
    assert iou_bev_matrix(none, one).shape == (0, 1)
    assert iou_3d_matrix(one, none).shape == (1, 0)
    assert points_in_boxes(np.zeros((3, 3), np.float32), none).shape == (0, 3)


def test_points_on_a_face_are_inside_and_just_beyond_are_not() -> None:
    box = boxes_of((1, 2, 3, 4, 2, 2, np.pi / 2))
    points = np.array([[1, 2, 3], [1, 3.999, 3], [1, 4.001, 3], [1.999, 2, 3], [2.001, 2, 3], [1, 2, 4], [1, 2, 4.001]])
    assert points_in_boxes(points, box).tolist() == [[True, True, False, True, False, True, False]]


def test_selected_boxes_keep_the_asked_order() -> None:
    boxes = boxes_of((0, 0, 0, 1, 1, 1, 0), (1, 0, 0, 1, 1, 1, 0), (2, 0, 0, 1, 1, 1, 0))
    assert select_boxes(boxes, np.array([2, 0])).centre[:, 0].tolist() == [2, 0]


@pytest.mark.data
def test_points_in_kitti_boxes_are_those_that_openpcdet_counted(shared) -> None:
    import pickle

    infos = pickle.loads((shared / "data/kitti/kitti_infos_trainval.pkl").read_bytes())
    checked = 0
    for info in infos:
        frame = info["point_cloud"]["lidar_idx"]
        raw = np.fromfile(shared / f"data/kitti/training/velodyne/{frame}.bin", np.float32).reshape(-1, 4)
        gt = info["annos"]["gt_boxes_lidar"]
        counts = info["annos"]["num_points_in_gt"][: len(gt)]
        found = points_in_boxes(raw[:, :3], boxes_of(*map(tuple, gt))).sum(axis=1)
        assert np.all(np.abs(found - counts) <= 6), (frame, found, counts)
        checked += len(gt)
    assert checked >= 10
