"""The first steps of a plan against plain numpy: capacity, farthest cells first, points to mean features."""

import numpy as np
import pytest
from sparse3d_sample import backbone_of, layer, padded, plain_frame

from dm3d_deploy.config import VoxelConfig
from dm3d_deploy.geometry.voxelize import voxelize
from dm3d_deploy.pointcloud import PointCloud
from engines.sparse3d.entry import Frame, frame_from_config
from engines.sparse3d.interpreter import interpret
from engines.sparse3d.planner import plan_backbone
from engines.sparse3d.shapes import WIDE

pytest.importorskip("triton")
GRID = (8, 60, 50)
KEPT = ("input.sites", "input.count", "entry.features")


def two_stages(folder, columns=4, grid=GRID):
    rng = np.random.default_rng(0)
    layers = [
        layer(rng, "in", 8, columns, kernel=(1, 1, 1), key="a"),
        layer(rng, "down", 8, 8, stride=(2, 2, 2), key="b"),
    ]
    return backbone_of(layers, grid, 512, folder)


def random_cells(count, seed=0, grid=GRID):
    rng = np.random.default_rng(seed)
    flat = rng.choice(int(np.prod(grid)), count, replace=False)
    return np.stack(np.unravel_index(flat, grid), axis=1), rng.normal(size=(count, 4)).astype(np.float32)


def keys_of(cells, grid=GRID):
    return (cells[:, 0] * grid[1] + cells[:, 1]) * grid[2] + cells[:, 2]


def nearest(cells, capacity, sensor, shift):
    """Whole rings while they fit, the first with cells in any case: which cells stay, and the cut-off in cells."""
    squared = (2 * cells[:, 1] + 1 - sensor[0]) ** 2 + (2 * cells[:, 2] + 1 - sensor[1]) ** 2
    rings = squared // 2**shift
    limit = 0
    while limit < 4096 and (rings <= limit).sum() <= capacity:
        limit += 1
    limit = max(limit, rings.min() + 1)
    return rings < limit, np.sqrt(limit * 2**shift) / 2


@pytest.mark.parametrize("sensor", ["middle", "corner"])
def test_above_the_capacity_the_farthest_cells_go(sensor, tmp_path):
    cells, features = random_cells(400)
    start = 0.0 if sensor == "corner" else None
    frame = plain_frame(GRID, 512)
    if start is not None:
        frame = Frame(
            rows=512, points=False, point_range_m=(0, 0, 0, 25, 30, 4), voxel_size_m=(0.5, 0.5, 0.5), grid_zyx=GRID
        )
    plan = plan_backbone(
        two_stages(tmp_path), frame=frame, capacities={"input": 200, "b": 512}, precision="fp32", shapes=WIDE, keep=KEPT
    )
    near = padded(features[:200], cells[:200], 512)
    full, over = interpret(plan, [near, padded(features, cells, 512)]).runs

    assert full.status["input"] == 200 == full.kept["input.count"][0]
    assert full.status["cut-off"] == full.status["beyond the cut-off"] == 0

    stays, radius = nearest(cells, 200, frame.sensor_yx, frame.ring_shift())
    assert 150 < stays.sum() <= 200
    order = np.argsort(keys_of(cells)[stays])
    assert over.status["input"] == 400
    assert over.status["beyond the cut-off"] == 400 - stays.sum()
    assert over.status["cut-off"] == pytest.approx(radius * frame.voxel_size_m[0])
    assert over.kept["input.count"][0] == over.kept["input.count"].item() == stays.sum()
    np.testing.assert_array_equal(over.kept["input.sites"][: stays.sum()], keys_of(cells)[stays][order])
    np.testing.assert_array_equal(over.kept["entry.features"][: stays.sum(), :4], features[stays][order])


def test_a_ring_that_fills_the_capacity_alone_loses_its_last_cells(tmp_path):
    cells = np.array([[z, 30, 25] for z in range(8)])
    features = np.arange(32, dtype=np.float32).reshape(8, 4)
    plan = plan_backbone(
        two_stages(tmp_path), frame=plain_frame(GRID, 512), capacities={"input": 5, "b": 512}, precision="fp32",
        shapes=WIDE, keep=KEPT,
    )  # fmt: skip
    (run,) = interpret(plan, [padded(features[::-1], cells[::-1], 512)]).runs
    assert run.status["input"] == 8
    assert run.status["beyond the cut-off"] == 3
    assert run.kept["input.count"][0] == 5
    np.testing.assert_array_equal(run.kept["entry.features"][:5, :4], features[:5])


def test_later_stages_drop_their_last_rows(tmp_path):
    cells, features = random_cells(300)
    backbone, runs = two_stages(tmp_path), []
    for room in (1024, 256):
        plan = plan_backbone(
            backbone, frame=plain_frame(GRID, 512), capacities={"input": 512, "b": room}, precision="fp32",
            shapes=WIDE, keep=("b.sites", "b.count", "down"),
        )  # fmt: skip
        runs += interpret(plan, [padded(features, cells, 512)]).runs
    whole, cut = runs
    count = whole.status["b"]
    assert cut.status["b"] == count == cut.outputs["status"][1] > 256
    assert whole.kept["b.count"][0] == count
    assert cut.kept["b.count"][0] == 256
    np.testing.assert_array_equal(cut.kept["b.sites"], whole.kept["b.sites"][:256])
    np.testing.assert_array_equal(cut.kept["down"], whole.kept["down"][:256])
    dense = whole.outputs["bev"].reshape(8, -1)
    dense[:, whole.kept["b.sites"][256:count]] = 0
    np.testing.assert_array_equal(cut.outputs["bev"].reshape(8, -1), dense)


def point_setup(folder, capacity, rows=2000):
    config = VoxelConfig(
        point_range_m=(-5.0, -6.0, -2.0, 5.0, 6.0, 1.2), voxel_size_m=(0.2, 0.2, 0.4), max_points_per_voxel=10**6,
        max_voxels=capacity, columns=("x", "y", "z", "intensity"),
    )  # fmt: skip
    frame = frame_from_config(config, rows=rows, points=True)
    backbone = two_stages(folder, grid=(9, 60, 50))
    plan = plan_backbone(
        backbone, frame=frame, capacities={"input": capacity, "b": 2048}, precision="fp32", shapes=WIDE, keep=KEPT
    )
    return config, frame, plan


def cloud_of(count, seed):
    rng = np.random.default_rng(seed)
    points = np.concatenate([rng.normal(0, 2.5, (count, 3)), rng.uniform(0, 255, (count, 1))], axis=1)
    points[: count // 3] = points[count // 3 : 2 * (count // 3)] + 1e-3
    return points.astype(np.float32)


def feed_of(points, rows=2000):
    padded_points = np.full((rows, points.shape[1]), np.nan, np.float32)
    padded_points[: len(points)] = points
    return {"points": padded_points, "count": np.array([len(points)], np.int32)}


def test_points_become_the_cells_and_means_of_voxelize_in_any_order(tmp_path):
    config, _, plan = point_setup(tmp_path, 1500)
    points = cloud_of(1200, 0)
    edges = np.array([[-5, -6, -2, 1], [5, 0, 0, 1], [0, 6, 0, 2], [0.2, 0.4, 0.4, 3], [-0.0, 0.0, 1.2, 4]], np.float32)
    points = np.concatenate([points, edges])
    strange = np.array(
        [[np.nan, 0, 0, 1], [0, np.inf, 0, 1], [0, 0, 0, -np.inf], [3e38, -3e38, 0, 0], [9e5, 0, 0, 0]], np.float32
    )
    shuffled = np.random.default_rng(1).permutation(len(points))
    feeds = [feed_of(points), feed_of(points[shuffled]), feed_of(np.concatenate([strange, points]))]
    runs = [*interpret(plan, feeds).runs, *interpret(plan, feeds[:1], backwards=True).runs]

    cloud = PointCloud(points=points, columns=config.columns, source="a test")
    expected = voxelize(cloud, config)
    count = len(expected.coords)
    cells = expected.coords[:, 1:].astype(np.int64)
    for run in runs:
        assert run.status["input"] == run.kept["input.count"][0] == count
        np.testing.assert_array_equal(run.kept["input.sites"][:count], keys_of(cells, (9, 60, 50)))
        found = run.kept["entry.features"][:count, :4]
        assert (np.abs(found - expected.features) <= 2e-7 * np.abs(expected.features) + 1e-7).all()
        assert run.outputs["bev"].tobytes() == runs[0].outputs["bev"].tobytes()
        assert run.kept["entry.features"][:count].tobytes() == runs[0].kept["entry.features"][:count].tobytes()
    assert runs[0].status["not finite or beyond 2**20"] == 0
    assert runs[2].status["not finite or beyond 2**20"] == 4
    assert runs[2].status["outside the grid"] == runs[0].status["outside the grid"] + 1


def test_too_many_cells_of_points_lose_the_farthest(tmp_path):
    config, frame, plan = point_setup(tmp_path, 300)
    points = cloud_of(1500, 3)
    (run,) = interpret(plan, [feed_of(points)]).runs
    everything = VoxelConfig(
        point_range_m=config.point_range_m, voxel_size_m=config.voxel_size_m, max_points_per_voxel=10**6,
        max_voxels=10**6, columns=config.columns,
    )  # fmt: skip
    expected = voxelize(PointCloud(points=points, columns=config.columns, source="a test"), everything)
    cells = expected.coords[:, 1:].astype(np.int64)
    stays, radius = nearest(cells, 300, frame.sensor_yx, frame.ring_shift())
    assert run.status["input"] == len(cells) > 300
    assert run.status["cut-off"] == pytest.approx(radius * 0.2)
    np.testing.assert_array_equal(run.kept["input.sites"][: stays.sum()], keys_of(cells[stays], (9, 60, 50)))
    found = run.kept["entry.features"][: stays.sum(), :4]
    np.testing.assert_allclose(found, expected.features[stays], rtol=2e-7, atol=1e-7)


def test_an_empty_cloud_leaves_an_empty_map(tmp_path):
    _, _, plan = point_setup(tmp_path, 300)
    far = np.full((10, 4), 100.0, np.float32)
    for run in interpret(plan, [feed_of(np.zeros((0, 4), np.float32)), feed_of(far)]).runs:
        assert not run.outputs["bev"].any()
        assert run.status["input"] == 0
