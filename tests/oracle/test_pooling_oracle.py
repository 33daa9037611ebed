"""Keypoints, neighbours, RoI places and refined boxes against loops that share no code with them."""

import math

import numpy as np
import pytest

from dm3d_deploy.config import Grouping, load_config
from dm3d_deploy.errors import FrameError
from dm3d_deploy.geometry.neighbours import ball_neighbours, voxel_neighbours
from dm3d_deploy.geometry.pooling import joined_geometry, pooled_geometry, site_centres, stage_shape
from dm3d_deploy.geometry.rois import grid_places, refined, rois_from_array, second_maps
from dm3d_deploy.geometry.sampling import farthest_points
from dm3d_deploy.geometry.voxelize import points_in_range
from dm3d_deploy.models.backbone3d import SparseBackbone
from dm3d_deploy.models.sparse import SparseConv3d, output_shape
from dm3d_deploy.pointcloud import Boxes3D


def squared(a, b):
    """float32, x then y then z."""
    x, y, z = (np.float32(p) - np.float32(q) for p, q in zip(a, b, strict=True))
    return np.float32(np.float32(x * x + y * y) + z * z)


def cloud(seed, count, spread=4.0):
    """Points of which some lie twice at one place, and some on a lattice, so that distances tie."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(-spread, spread, (count, 3)).astype(np.float32)
    points[::3] = np.round(points[::3])
    points[count // 2] = points[0]
    return points


@pytest.mark.parametrize(("count", "wanted"), [(60, 25), (5, 5), (4, 11), (1, 3)])
def test_farthest_points_are_those_of_a_loop(count, wanted):
    points = cloud(count, count)
    taken = [0]
    for _ in range(min(wanted, count) - 1):
        best, far = 0, np.float32(-1)
        for index in range(count):
            near = min(squared(points[index], points[other]) for other in taken)
            if near > far:
                best, far = index, near
        taken.append(best)
    repeated = [taken[i % len(taken)] for i in range(wanted)]
    assert farthest_points(points, wanted).tolist() == repeated


def test_a_frame_without_a_point_has_no_keypoints():
    with pytest.raises(FrameError, match="no point lies in the model's range"):
        farthest_points(np.zeros((0, 3), np.float32), 4)


def slow_ball(points, place, grouping):
    radius = np.float32(grouping.radius_m)
    found = [i for i in range(len(points)) if squared(points[i], place) < radius * radius][: grouping.samples]
    return (found + [found[0]] * (grouping.samples - len(found))) if found else [len(points)] * grouping.samples


@pytest.mark.parametrize(("points", "spread"), [(300, 4.0), (40, 9.0), (0, 1.0)])
def test_balls_hold_the_first_points_by_index(points, spread):
    groupings = [Grouping(radius_m=0.5, samples=4, widths=(1,)), Grouping(radius_m=1.0, samples=3, widths=(1,))]
    known = cloud(points, points, spread) if points else np.zeros((0, 3), np.float32)
    places = np.concatenate([cloud(7, 60, spread + 2), known[:10], np.full((1, 3), 1e18, np.float32)])
    for grouping, found in zip(groupings, ball_neighbours(known, places, groupings), strict=True):
        for row, offset, place in zip(found.rows, found.offsets, places, strict=True):
            assert row.tolist() == slow_ball(known, place, grouping)
            wanted = np.zeros((grouping.samples, 3)) if row[0] == points else known[row] - place
            np.testing.assert_array_equal(offset, wanted)


def test_a_point_at_the_radius_is_outside_a_ball_and_inside_a_voxel_query():
    known, place = np.array([[1, 0, 0]], np.float32), np.zeros((1, 3), np.float32)
    grouping = Grouping(radius_m=1.0, samples=2, widths=(1,), reach_zyx=(1, 1, 1))
    assert ball_neighbours(known, place, [grouping])[0].rows.tolist() == [[1, 1]]
    cells = np.array([[0, 0, 1]])
    assert voxel_neighbours(cells, (1, 1, 2), known, place, np.zeros((1, 3), np.int64), grouping).rows.tolist() == [
        [0, 0]
    ]


def test_voxel_queries_walk_the_cells_around_a_place():
    config = load_config("voxel-rcnn")
    rng = np.random.default_rng(3)
    shape, stride = (5, 8, 9), 2
    keys = rng.permutation(math.prod(shape))[:150]  # rows in no order
    cells = np.stack(np.unravel_index(keys, shape), axis=1)
    centres = site_centres(cells, stride, config)
    size, low = np.array(config.voxels.voxel_size_m), np.array(config.voxels.point_range_m[:3])
    np.testing.assert_allclose(centres, (cells[:, ::-1] + 0.5) * size * stride + low, rtol=1e-6)
    places = (low + rng.uniform(-0.2, 1.0, (80, 3))).astype(np.float32)
    place_cells = np.floor((places - low) / size / stride).astype(np.int64)[:, ::-1]
    grouping = Grouping(radius_m=0.25, samples=5, widths=(1, 1), reach_zyx=(1, 2, 2))
    row_of = {tuple(cell): row for row, cell in enumerate(cells.tolist())}
    found = voxel_neighbours(cells, shape, centres, places, place_cells, grouping)
    hits = 0
    for rows, place, (z, y, x) in zip(found.rows, places, place_cells.tolist(), strict=True):
        near = []
        for dz in range(-1, 2):
            for dy in range(-2, 3):
                for dx in range(-2, 3):
                    row = row_of.get((z + dz, y + dy, x + dx))
                    if row is not None and squared(centres[row], place) <= np.float32(0.25) * np.float32(0.25):
                        near.append(row)
        hits += len(near)
        near = near[:5]
        assert rows.tolist() == (near + [near[0]] * (5 - len(near)) if near else [len(cells)] * 5)
    assert hits > 100


def boxes_of(rng, count):
    return Boxes3D(
        centre=rng.uniform(-3, 3, (count, 3)).astype(np.float32),
        size=rng.uniform(0.5, 4, (count, 3)).astype(np.float32),
        yaw=rng.uniform(-4, 4, count).astype(np.float32),
        velocity=np.zeros((count, 2), np.float32),
    )


def rotation(yaw):
    return np.array([[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]])


def test_places_of_a_roi_are_the_middles_of_its_parts():
    boxes = boxes_of(np.random.default_rng(1), 3)
    found = grid_places(boxes, 3).reshape(3, 3, 3, 3, 3)
    for n in range(3):
        for i, j, k in np.ndindex(3, 3, 3):
            local = (np.array([i, j, k]) + 0.5) / 3 * boxes.size[n] - boxes.size[n] / 2
            expected = rotation(boxes.yaw[n]) @ local + boxes.centre[n]
            np.testing.assert_allclose(found[n, i, j, k], expected, atol=1e-5)


def test_boxes_are_residuals_in_the_frame_of_their_roi():
    config, rng = load_config("pv-rcnn"), np.random.default_rng(2)
    boxes = boxes_of(rng, 6)
    table = np.column_stack(
        [boxes.centre, boxes.size, boxes.yaw, np.full(6, 0.5), [0, 1, 2, 0, 1, 2], np.arange(6) + 40]
    )
    cls, reg = second_maps(config)
    scores, residuals = np.array([2.0, -9.0, 1.0, 3.0, 1.0, 0.0], np.float32), rng.normal(0, 0.2, (7, 6))
    maps = {cls: scores[None, None, None], reg: residuals.astype(np.float32)[None, :, None]}
    found = refined(maps, rois_from_array(table, config), config)
    assert found.cells.tolist() == [43, 40, 42, 44, 45]  # scores fall, equal ones in the RoIs' order; one is too low
    assert found.detections.labels.tolist() == [0, 0, 2, 1, 2]
    for row, roi in enumerate((3, 0, 2, 4, 5)):
        length, width, height = boxes.size[roi]
        d = residuals[:, roi]
        diagonal = math.hypot(length, width)
        local = np.array([d[0] * diagonal, d[1] * diagonal, d[2] * height])
        centre = rotation(boxes.yaw[roi]) @ local + boxes.centre[roi]
        np.testing.assert_allclose(found.detections.boxes.centre[row], centre, atol=1e-5)
        np.testing.assert_allclose(found.detections.boxes.size[row], boxes.size[roi] * np.exp(d[3:6]), rtol=1e-5)
        assert math.isclose(found.detections.boxes.yaw[row], boxes.yaw[roi] + d[6], abs_tol=1e-5)
        assert math.isclose(found.detections.scores[row], 1 / (1 + math.exp(-scores[roi])), rel_tol=1e-6)


def test_points_in_range_keep_their_order_and_any_height():
    config = load_config("pv-rcnn")
    points = np.array([[5, 0, 99, 1], [-1, 0, 0, 1], [70.4, 40, -9, 1], [70.5, 0, 0, 1], [0, -40, 0, 1]], np.float32)
    np.testing.assert_array_equal(points_in_range(points, config.voxels), points[[0, 2, 4]])


def test_stage_grids_are_those_of_the_backbone():
    config = load_config("voxel-rcnn")
    depth, *flat = config.voxels.grid_zyx
    shape = (depth + 1, *flat)
    assert stage_shape(config, "x_conv1") == shape
    for name, conv in SparseBackbone(config.backbone_3d, 4, shape).convolutions():
        if isinstance(conv, SparseConv3d) and name != "conv_out.0":
            shape = output_shape(shape, conv.kernel, conv.stride, conv.padding)
            assert stage_shape(config, f"x_{name.split('.')[0]}") == shape


def test_the_birds_eye_view_is_interpolated_between_four_cells():
    config, rng = load_config("pv-rcnn"), np.random.default_rng(5)
    points = rng.uniform((0, -40, -2, 0), (70.4, 40, 0, 1), (50, 4)).astype(np.float32)
    sites = {name: np.zeros((0, 3), np.int64) for name in config.second_stage.stages_read}
    found = pooled_geometry(config, boxes_of(rng, 1), sites, points)
    rows, weights = found["keypoints.bev.rows"], found["keypoints.bev.weights"]
    height, width = 200, 176
    ramp = np.arange(height * width)  # a map that is linear along rows and columns is met exactly within it
    keypoints = points[farthest_points(points[:, :3], config.second_stage.keypoints.count)]
    x, y = keypoints[:, 0] / 0.4, (keypoints[:, 1] + 40) / 0.4
    inside = (x < width - 1) & (y < height - 1)
    assert inside.sum() > 1000
    np.testing.assert_allclose((ramp[rows] * weights).sum(axis=1)[inside], (y * width + x)[inside], rtol=1e-4)


def test_frames_one_after_the_other_keep_the_row_behind_the_last():
    a = {"rois.x_conv2.0.rows": np.array([[0, 1], [3, 3]]), "rois.x_conv2.0.offsets": np.zeros((2, 2, 3))}
    b = {"rois.x_conv2.0.rows": np.array([[1, 1], [2, 2]]), "rois.x_conv2.0.offsets": np.ones((2, 2, 3))}
    whole = joined_geometry([a, b], [{"x_conv2": 3}, {"x_conv2": 2}])
    assert whole["rois.x_conv2.0.rows"].tolist() == [[0, 1], [5, 5], [4, 4], [5, 5]]
    assert whole["rois.x_conv2.0.offsets"].shape == (4, 2, 3)
