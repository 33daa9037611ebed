"""The plan of a whole backbone in Triton's interpreter, against torch and against a numpy twin of dense volumes."""

import numpy as np
import pytest
import torch
from sparse3d_sample import (
    ONE,
    backbone_of,
    bev_of,
    clustered_cells,
    exported,
    keep_everything,
    layer,
    padded,
    plain_frame,
    tiny_detector,
    torch_reference,
    voxel_frame,
)

from engines.sparse3d.interpreter import interpret
from engines.sparse3d.packing import tiled_weights
from engines.sparse3d.planner import DROPPED, plan_backbone
from engines.sparse3d.shapes import DEVICE, WIDE
from engines.sparse3d.sites import frame_statistics, predicted_tiles

pytest.importorskip("triton")
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3}
ROOM = 1024


@pytest.fixture(scope="module")
def detector(request):
    return tiny_detector(request.path.parents[1] / "fixtures")


@pytest.fixture(scope="module")
def backbone(detector, tmp_path_factory):
    return exported(detector, tmp_path_factory.mktemp("onnx"), ROOM)


def planned(backbone, frame, precision="fp32", **options):
    capacities = {stage.name: ROOM for stage in backbone.stages}
    return plan_backbone(backbone, frame=frame, capacities=capacities, precision=precision, shapes=WIDE, **options)


def close(found, expected, precision):
    assert np.abs(found.astype(np.float64) - expected).max() <= TOLERANCE[precision] * np.abs(expected).max()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_stage_is_that_of_torch(detector, backbone, precision):
    rng = np.random.default_rng(0)
    cells = clustered_cells(rng, detector.backbone_3d.shape_zyx, 260)
    features = rng.normal(size=(len(cells), 5)).astype(np.float32)
    plan = planned(backbone, voxel_frame(detector, ROOM), precision, keep=keep_everything(backbone), count_tiles=True)
    (run,) = interpret(plan, [padded(features, cells, ROOM)]).runs

    ends = torch_reference(detector, features, cells)
    assert len(ends) == 9
    by_name = {item.name: item for item in backbone.layers}
    for name, (keys, expected) in ends.items():
        stage = by_name[name].stage_out
        assert run.status[stage] == run.kept[f"{stage}.count"][0] == len(keys)
        np.testing.assert_array_equal(run.kept[f"{stage}.sites"][: len(keys)], keys)
        channels = expected.shape[1]
        close(run.kept[name][: len(keys), :channels], expected, precision)
        assert not run.kept[name][: len(keys), channels:].any(), "channels of padding stay zero"
    close(run.outputs["bev"], bev_of(*ends["conv_out.0"], backbone.stages[-1].grid), precision)
    assert run.outputs["status"].tolist() == [run.status[stage.name] for stage in backbone.stages]

    statistics = frame_statistics(backbone, padded(features, cells, len(cells))["coords"], conv_rows=WIDE.conv_rows)
    tiled = {item.name: tiled_weights(item) for item in backbone.layers}
    assert run.kept["executed"].tolist() == predicted_tiles(backbone, tiled, statistics).tolist()


def test_order_of_rows_and_programs_and_earlier_frames_change_no_bit(detector, backbone):
    rng = np.random.default_rng(1)
    cells = clustered_cells(rng, detector.backbone_3d.shape_zyx, 150)
    features = rng.normal(size=(len(cells), 5)).astype(np.float32)
    shuffle = rng.permutation(len(cells))
    plan = planned(backbone, voxel_frame(detector, ROOM), "fp16")
    frames = [padded(features, cells, ROOM), padded(features[shuffle], cells[shuffle], ROOM)]
    runs = [*interpret(plan, frames).runs, *interpret(plan, frames[:1], backwards=True).runs]
    assert runs[0].outputs["bev"].any()
    for run in runs[1:]:
        assert run.outputs["bev"].tobytes() == runs[0].outputs["bev"].tobytes()
        assert run.status == runs[0].status


def test_all_rows_in_use_and_more_rows_claimed_than_there_are(detector, backbone):
    rng = np.random.default_rng(4)
    cells = clustered_cells(rng, detector.backbone_3d.shape_zyx, ROOM)
    full = padded(rng.normal(size=(ROOM, 5)).astype(np.float32), cells, ROOM)
    capacities = {stage.name: 4096 for stage in backbone.stages} | {"input": ROOM}
    plan = plan_backbone(backbone, frame=voxel_frame(detector, ROOM), capacities=capacities, shapes=WIDE)
    exact, claimed = interpret(plan, [full, full | {"count": np.array([ROOM + 7], np.int32)}]).runs
    assert exact.status["input"] == claimed.status["input"] == ROOM
    assert sum(exact.status[name] for name in DROPPED) == 0
    assert claimed.status["behind the last row"] == 7
    np.testing.assert_array_equal(exact.outputs["bev"], claimed.outputs["bev"])


def test_the_blocks_of_the_vehicle_give_the_bytes_of_wide_ones(detector, backbone):
    rng = np.random.default_rng(5)
    cells = clustered_cells(rng, detector.backbone_3d.shape_zyx, 90)
    feed = padded(rng.normal(size=(90, 5)).astype(np.float32), cells, ROOM)
    capacities = {stage.name: ROOM for stage in backbone.stages}
    maps = []
    for shapes in (WIDE, DEVICE):
        plan = plan_backbone(backbone, frame=voxel_frame(detector, ROOM), capacities=capacities, shapes=shapes)
        maps.append(interpret(plan, [feed]).runs[0].outputs["bev"].tobytes())
    assert maps[0] == maps[1]


def test_no_voxel_one_voxel_and_voxels_outside(detector, backbone):
    grid = detector.backbone_3d.shape_zyx
    none = padded(np.zeros((0, 5), np.float32), np.zeros((0, 3), np.int64), ROOM)
    one = padded(np.ones((1, 5), np.float32), np.array([[7, 3, 100]]), ROOM)
    strangers = np.array([[7, 3, 100], [-1, 0, 0], [grid[0], 0, 0], [0, grid[1], 0], [0, 0, grid[2]], [0, -5, 2**30]])
    outside = padded(np.ones((6, 5), np.float32), strangers, ROOM)
    twice = padded(np.ones((2, 5), np.float32), np.array([[7, 3, 100]] * 2), ROOM)
    negative = none | {"count": np.array([-4], np.int32)}
    runs = interpret(planned(backbone, voxel_frame(detector, ROOM)), [none, one, outside, twice, negative]).runs
    for run in (runs[0], runs[4]):
        assert not run.outputs["bev"].any()
        assert not any(run.status.values())
    assert runs[1].outputs["bev"].any()
    assert runs[1].status["outside the grid"] == 0
    assert runs[2].status["outside the grid"] == 5
    assert runs[3].status["in the cell of another row"] == 1
    for run in runs[2:4]:
        np.testing.assert_array_equal(run.outputs["bev"], runs[1].outputs["bev"])


def dense_twin(layers, features, cells, grid):
    """The same network on dense volumes by torch's conv3d; returns the values and active cells of the last layer."""
    volume = torch.zeros(1, features.shape[1], *grid)
    volume[0, :, cells[:, 0], cells[:, 1], cells[:, 2]] = torch.from_numpy(features.T)
    active = torch.zeros(1, 1, *grid)
    active[0, 0, cells[:, 0], cells[:, 1], cells[:, 2]] = 1
    results = {}
    for item in layers:
        weight = torch.from_numpy(item.weight).permute(0, 4, 1, 2, 3)
        shape = {"stride": item.stride, "padding": item.padding}
        if not item.submanifold:
            active = (torch.nn.functional.conv3d(active, torch.ones(1, 1, *item.kernel), **shape) > 0).float()
        volume = torch.nn.functional.conv3d(volume, weight, torch.from_numpy(item.bias), **shape)
        if item.adds:
            volume = volume + results[item.adds]
        volume = results[item.name] = torch.relu(volume) * active
    return volume.numpy(), int(active.sum())


def plain_layers(rng):
    """A plain network with channels that fill no tile, pruned tiles and a dead layer's worth of taps."""
    return [
        layer(rng, "in", 16, 4, key="a"),
        layer(rng, "a1", 40, 16, key="a", dead=0.5),
        layer(rng, "a2", 40, 40, key="a", dead=0.6),
        layer(rng, "d", 64, 40, stride=(2, 2, 2), padding=(0, 1, 1), key="b", dead=0.3),
        layer(rng, "b1", 64, 64, key="c"),
        layer(rng, "b2", 64, 64, key="c", adds="d", dead=1.0),
        layer(rng, "out", 24, 64, kernel=(3, 1, 1), stride=(2, 1, 1), padding=(0, 0, 0), submanifold=False, key="o"),
    ]


def flat_layers(rng):
    """Two dimensions, strides that differ per axis, a column kernel with stride 1: VoxelNeXt and SECOND."""
    return [
        layer(rng, "in", 8, 3, kernel=(1, 3, 3), key="a"),
        layer(rng, "d", 16, 8, kernel=(1, 3, 3), stride=(1, 2, 1), padding=(0, 1, 1), submanifold=False, key="b"),
        layer(rng, "b", 16, 16, kernel=(1, 3, 3), key="c", adds="d"),
    ]


def column_layers(rng):
    """SECOND's column kernels with other strides and paddings."""
    return [
        layer(rng, "in", 16, 3, kernel=(3, 1, 1), key="a"),
        layer(rng, "d", 16, 16, kernel=(3, 1, 1), stride=(3, 1, 1), padding=(1, 0, 0), submanifold=False, key="b"),
        layer(rng, "e", 16, 16, kernel=(2, 2, 2), stride=(1, 2, 2), padding=(0, 0, 0), submanifold=False, key="c"),
        layer(rng, "f", 16, 16, stride=ONE, submanifold=False, key="d"),
    ]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("make", "grid"), [(plain_layers, (9, 14, 13)), (flat_layers, (1, 30, 22)), (column_layers, (10, 9, 8))]
)
def test_other_networks_equal_dense_ones(make, grid, precision, tmp_path):
    rng = np.random.default_rng(3)
    layers = make(rng)
    cells = clustered_cells(rng, grid, 70)
    features = rng.normal(size=(len(cells), layers[0].weight.shape[-1])).astype(np.float32)
    backbone = backbone_of(layers, grid, 128, tmp_path)
    plan = planned(backbone, plain_frame(grid, 128), precision, count_tiles=True)
    (run,) = interpret(plan, [padded(features, cells, 128)]).runs
    expected, count = dense_twin(layers, features, cells, grid)
    close(run.outputs["bev"], expected.reshape(run.outputs["bev"].shape), precision)
    assert run.outputs["status"][-1] == count
    dead = [number for number, item in enumerate(plan.layers) if item.tiles_kept == 0]
    assert all(run.kept["executed"][number] == 0 for number in dead)
