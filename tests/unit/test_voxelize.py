"""Voxels against a dictionary-of-lists twin, against OpenPCDet's coordinates, and under any order of the points."""

import dataclasses
import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calib.readers import read_points
from dm3d_deploy.config import VoxelConfig, load_config
from dm3d_deploy.errors import FrameError
from dm3d_deploy.geometry.voxelize import voxelize
from dm3d_deploy.pointcloud import PointCloud

SMALL = VoxelConfig(
    point_range_m=(-1.0, -2.0, -0.5, 3.0, 2.0, 1.5),
    voxel_size_m=(0.5, 0.4, 0.25),
    max_points_per_voxel=3,
    max_voxels=12,
    columns=("x", "y", "z", "intensity"),
)
COLUMNS = ("x", "y", "z", "intensity")


def cloud_of(points, columns=COLUMNS):
    return PointCloud(points=np.asarray(points, dtype=np.float32), columns=columns, source="frame.bin")


def twin(points, config):
    """One point at a time, with Python's own sorting and exact fractions of float32 arithmetic."""
    f = np.float32
    z_cells, y_cells, x_cells = config.grid_zyx
    cells = defaultdict(list)
    for point in points:
        cell = [
            math.floor((f(point[axis]) - f(config.point_range_m[axis])) / f(config.voxel_size_m[axis]))
            for axis in range(3)
        ]
        if all(0 <= index < limit for index, limit in zip(cell, (x_cells, y_cells, z_cells), strict=True)):
            cells[tuple(cell[::-1])].append(tuple(float(value) for value in point))

    def range_m(cell):
        x = config.point_range_m[0] + (cell[2] + 0.5) * config.voxel_size_m[0]
        y = config.point_range_m[1] + (cell[1] + 0.5) * config.voxel_size_m[1]
        return round(math.sqrt(x * x + y * y), 6)

    by_range = sorted(cells, key=lambda cell: (range_m(cell), cell))
    kept = sorted(by_range[: config.max_voxels])
    cutoff = range_m(by_range[config.max_voxels]) if len(by_range) > config.max_voxels else math.inf
    inside = {cell: sorted(cells[cell])[: config.max_points_per_voxel] for cell in kept}
    means = [[math.fsum(column) / len(inside[cell]) for column in zip(*inside[cell], strict=True)] for cell in kept]
    return kept, means, [len(inside[cell]) for cell in kept], len(cells), cutoff


coordinate = st.one_of(
    st.floats(-3, 4, width=32), st.sampled_from([-1.0, 3.0, -2.0, 2.0, -0.5, 1.5, 0.0, -0.0, 0.5, 0.4, 0.25])
)
clouds = hnp.arrays(np.float32, st.tuples(st.integers(1, 60), st.just(4)), elements=coordinate)


@settings(max_examples=150)
@given(clouds, st.randoms(use_true_random=False), st.integers(1, 4), st.integers(1, 40))
def test_voxels_equal_the_twin_in_any_order(points, random, per_voxel, cap):
    config = dataclasses.replace(SMALL, max_points_per_voxel=per_voxel, max_voxels=cap)
    kept, means, counts, found, cutoff = twin(points, config)
    if not found:
        with pytest.raises(FrameError, match=rf"{len(points)} points and none inside"):
            voxelize(cloud_of(points), config)
        return
    voxels = voxelize(cloud_of(points), config)
    assert [tuple(row) for row in voxels.coords[:, 1:].tolist()] == kept
    assert not voxels.coords[:, 0].any()
    np.testing.assert_allclose(voxels.features, means, rtol=1e-6, atol=1e-6)
    assert voxels.num_points.tolist() == counts
    assert (voxels.found, voxels.dropped) == (found, max(found - cap, 0))
    assert voxels.cutoff_m == pytest.approx(cutoff, abs=2e-6)

    order = list(range(len(points)))
    random.shuffle(order)
    again = voxelize(cloud_of(points[order]), config)
    for name in ("features", "coords", "num_points"):
        assert getattr(again, name).tobytes() == getattr(voxels, name).tobytes(), name
    assert (again.found, again.cutoff_m) == (voxels.found, voxels.cutoff_m)


@settings(max_examples=100)
@given(clouds)
def test_voxels_are_in_raster_order_inside_the_grid_and_their_means_inside_their_cells(points):
    try:
        voxels = voxelize(cloud_of(points), SMALL)
    except FrameError:
        return
    _, z, y, x = voxels.coords.T.astype(np.int64)
    depth, height, width = SMALL.grid_zyx
    assert (np.diff((z * height + y) * width + x) > 0).all()
    assert ((z >= 0) & (z < depth) & (y >= 0) & (y < height) & (x >= 0) & (x < width)).all()
    low = np.array(SMALL.point_range_m[:3]) + np.stack([x, y, z], axis=1) * np.array(SMALL.voxel_size_m)
    assert (voxels.features[:, :3] >= low - 1e-5).all()
    assert (voxels.features[:, :3] <= low + np.array(SMALL.voxel_size_m) + 1e-5).all()
    assert (voxels.num_points >= 1).all()
    assert (voxels.num_points <= SMALL.max_points_per_voxel).all()


def test_the_range_is_half_open():
    inside = voxelize(cloud_of([[-1.0, -2.0, -0.5, 7.0], [3.0, 0.0, 0.0, 1.0], [0.0, 2.0, 0.0, 1.0]]), SMALL)
    assert inside.coords.tolist() == [[0, 0, 0, 0]]
    assert inside.features.tolist() == [[-1.0, -2.0, -0.5, 7.0]]


def test_the_cell_of_a_border_point_is_that_of_float32_arithmetic():
    config = load_config("centerpoint").voxels
    borders = (np.arange(1024) * 0.1 - 51.2).astype(np.float32)
    expected = np.floor((borders - np.float32(-51.2)) / np.float32(0.1)).astype(int)
    in_float64 = np.floor((borders.astype(np.float64) + 51.2) / 0.1).astype(int)
    assert (expected != in_float64).any(), "otherwise this test shows nothing"
    for border, cell in zip(borders[expected != in_float64][:20], expected[expected != in_float64][:20], strict=True):
        voxels = voxelize(cloud_of([[border, 0, 0, 1, 0]], (*COLUMNS, "timestamp")), config)
        assert voxels.coords[0, 3] == cell


def test_mirrored_cells_are_ties_that_raster_order_decides():
    config = dataclasses.replace(SMALL, point_range_m=(-2.0, -2.0, -0.5, 2.0, 2.0, 1.5), max_voxels=2)
    corners = [[x, y, 0.0, 1.0] for x in (-1.9, 1.9) for y in (-1.9, 1.9)]
    voxels = voxelize(cloud_of(corners), config)
    assert voxels.coords[:, 1:].tolist() == [[2, 0, 0], [2, 0, 7]]
    assert (voxels.found, voxels.dropped) == (4, 2)
    assert voxels.cutoff_m == pytest.approx(math.hypot(1.75, 1.8), abs=1e-6)


def test_two_spellings_of_zero_make_one_mean():
    points = [[0.0, 0.0, 0.0, -0.0]] * 3 + [[0.0, 0.0, 0.0, 0.0]]
    one, other = voxelize(cloud_of(points), SMALL), voxelize(cloud_of(points[::-1]), SMALL)
    assert one.features.tobytes() == other.features.tobytes()


def test_a_single_sweep_has_a_time_lag_of_zero_and_other_columns_must_be_there():
    config = dataclasses.replace(SMALL, columns=(*COLUMNS, "timestamp"))
    voxels = voxelize(cloud_of([[0.1, 0.1, 0.1, 9.0]]), config)
    assert voxels.features[0, 3:].tolist() == [9.0, 0.0]
    with pytest.raises(FrameError, match=r"columns x, y, z and no 'intensity'"):
        voxelize(cloud_of([[0.1, 0.1, 0.1]], ("x", "y", "z")), SMALL)


def test_unused_columns_are_left_out():
    voxels = voxelize(cloud_of([[0.1, 0.1, 0.1, 5.0, 9.0]], ("x", "y", "z", "ring", "intensity")), SMALL)
    assert voxels.features[0].tolist() == pytest.approx([0.1, 0.1, 0.1, 9.0])


@pytest.mark.parametrize("points", [np.zeros((0, 4)), np.full((5, 4), 50.0)], ids=["no points", "all outside"])
def test_a_frame_without_points_in_range_is_refused_with_the_counts_and_the_range(points):
    with pytest.raises(
        FrameError, match=rf"frame.bin has {len(points)} points and none inside x -1..3, y -2..2, z -0.5..1.5 m"
    ):
        voxelize(cloud_of(points), SMALL)


def test_a_value_that_is_not_finite_is_refused():
    with pytest.raises(FrameError, match="point 1 of 2 has intensity = nan"):
        voxelize(cloud_of([[0, 0, 0, 1], [0, 0, 0, math.nan]]), SMALL)


def test_coordinates_at_the_end_of_float32_are_outside():
    voxels = voxelize(cloud_of([[3.4e38, -3.4e38, 0, 1], [0, 0, 0, 2]]), SMALL)
    assert voxels.found == 1


@pytest.fixture(scope="module")
def frame(shared):
    return read_points(shared / "data/nuscenes/ff9eff4389a740848f9a56ad749a4ae8.f16x5.bin")


@pytest.mark.data
def test_the_real_frame_has_the_cells_of_openpcdet(shared, frame):
    config = dataclasses.replace(load_config("centerpoint").voxels, max_voxels=1_000_000)
    voxels = voxelize(frame, config)
    assert len(voxels.coords) == voxels.found == 83_943
    assert voxels.cutoff_m == math.inf
    with np.load(shared / "oracle/centerpoint_voxel01_nuscenes.npz") as oracle:
        coords, features = oracle["input.voxel_coords"], oracle["b.voxel_features"]
        counts = oracle["input.voxel_num_points"]
    ours = {tuple(row): index for index, row in enumerate(voxels.coords.tolist())}
    rows = np.array([ours[tuple(row)] for row in coords.tolist()])
    assert len(rows) == 60_000
    np.testing.assert_array_equal(voxels.num_points[rows], counts)
    # A count of ten may stand for more points, of which the shuffle chose ten; eleven are needed to tell.
    free = dataclasses.replace(config, max_points_per_voxel=4096)
    whole = voxelize(frame, free).num_points[rows] <= 10
    assert whole.sum() > 50_000
    np.testing.assert_allclose(voxels.features[rows][whole], features[whole], rtol=1e-5, atol=1e-5)


@pytest.mark.data
def test_the_cap_keeps_the_nearest_cells_of_the_real_frame(frame):
    config = dataclasses.replace(load_config("centerpoint").voxels, max_voxels=60_000)
    voxels = voxelize(frame, config)
    assert (len(voxels.coords), voxels.found, voxels.dropped) == (60_000, 83_943, 23_943)
    centres = np.array([-51.2, -51.2]) + (voxels.coords[:, [3, 2]] + 0.5) * 0.1
    assert np.hypot(*centres.T).max() <= voxels.cutoff_m + 1e-6
    assert 20 < voxels.cutoff_m < 25
