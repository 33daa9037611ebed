"""Whole backbones on a real frame, and the index path at full size, in Triton's interpreter against torch and numpy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sparse3d_sample import (
    backbone_of,
    bev_of,
    exported,
    keep_everything,
    layer,
    padded,
    plain_frame,
    torch_reference,
    voxel_frame,
)
from torch import nn

from dm3d_deploy.config import load_config
from dm3d_deploy.geometry.voxelize import voxelize
from dm3d_deploy.models.backbone3d import ConvNormReLU
from dm3d_deploy.models.detector import build_detector
from dm3d_deploy.models.seeded import seed_weights
from dm3d_deploy.models.sparse import SparseConv3d, SparseTensor, SubMConv3d, cell_keys, strided_map, submanifold_map
from dm3d_deploy.pointcloud import PointCloud
from engines.sparse3d.entry import frame_from_config
from engines.sparse3d.interpreter import interpret
from engines.sparse3d.packing import tiled_weights
from engines.sparse3d.planner import plan_backbone
from engines.sparse3d.shapes import WIDE
from engines.sparse3d.sites import capacities_from, frame_statistics, predicted_tiles

pytest.importorskip("triton")
pytestmark = [pytest.mark.data, pytest.mark.slow]
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3}
CUBE, DOWN = (3, 3, 3), (2, 2, 2)
HEADER_BYTES = 20


@pytest.fixture(scope="module")
def scene(shared):
    """A real input of CenterPoint's 3D backbone: features [79745, 5], cells (z, y, x) of 41 x 1440 x 1440."""
    folder = shared / "data" / "scn"
    features = np.fromfile(folder / "in_features.torch.fp16.tensor", np.float16, offset=HEADER_BYTES)
    coords = np.fromfile(folder / "in_indices_zyx.torch.int32.tensor", np.int32, offset=HEADER_BYTES)
    return features.reshape(-1, 5).astype(np.float32), coords.reshape(-1, 4)[:, 1:].astype(np.int64)


class PlainBackbone(nn.Module):
    """VoxelBackBone8x of SECOND and PV-RCNN: no residuals, two convolutions per stage."""

    def __init__(self, shape_zyx):
        super().__init__()
        self.shape_zyx = shape_zyx

        def same(cin, cout, key):
            return ConvNormReLU(SubMConv3d(cin, cout, CUBE, indice_key=key))

        def down(cin, cout, key, padding):
            return ConvNormReLU(SparseConv3d(cin, cout, CUBE, stride=DOWN, padding=padding, indice_key=key))

        self.conv_input = same(5, 16, "subm1")
        self.conv1 = nn.Sequential(same(16, 16, "subm1"))
        for number, (cin, cout, pad) in enumerate([(16, 32, 1), (32, 64, 1), (64, 64, 0)], start=2):
            stage = [down(cin, cout, f"spconv{number}", (pad, 1, 1))]
            stage += [same(cout, cout, f"subm{number}") for _ in range(2)]
            setattr(self, f"conv{number}", nn.Sequential(*stage))
        out = SparseConv3d(64, 128, (3, 1, 1), stride=(2, 1, 1), padding=(0, 0, 0), indice_key="spconv_down2")
        self.conv_out = ConvNormReLU(out)

    def forward(self, x):
        for module in self.children():
            x = module(x)
        return x


def detector_of(shared, kind):
    path = shared / "data/openpcdet_cfgs/nuscenes_models/cbgs_voxel0075_res3d_centerpoint.yaml"
    detector = build_detector(load_config(path))
    if kind == "plain":
        detector.backbone_3d = PlainBackbone(detector.backbone_3d.shape_zyx)
    seed_weights(detector, 0)
    if kind == "half of the tiles":
        prune_tiles(detector, np.random.default_rng(0))
    return detector.eval()


def prune_tiles(detector, rng):
    """Half of the 32 x 32 tiles of each layer with 32 channels or more, of the 16 x 16 tiles elsewhere."""
    with torch.no_grad():
        for module in detector.backbone_3d.modules():
            if isinstance(module, (SubMConv3d, SparseConv3d)):
                cout, *kernel, cin = module.weight.shape
                side = 16 if min(cin, cout) <= 16 else 32
                keep = rng.random((-(-cout // side), *kernel, -(-cin // side))) < 0.5
                wide = np.repeat(np.repeat(keep, side, axis=0)[:cout], side, axis=4)[..., :cin]
                module.weight *= torch.from_numpy(wide)


@pytest.mark.parametrize("kind", ["residual", "plain", "half of the tiles"])
def test_whole_backbones_equal_torch_on_a_real_frame(kind, shared, scene, tmp_path):
    features, cells = scene
    near = (np.abs(cells[:, 1:] - (900, 720)) < 84).all(axis=1)
    features, cells = features[near], cells[near]
    assert len(cells) >= 3000
    detector = detector_of(shared, kind)
    rows = 4096
    backbone = exported(detector, tmp_path, rows)
    shapes = replace(WIDE, conv_rows=256)
    feed = padded(features, cells, rows)
    statistics = frame_statistics(backbone, feed["coords"][: len(cells)], conv_rows=shapes.conv_rows)
    capacities = capacities_from([statistics], margin=1.2, max_voxels=rows)
    tiled = {item.name: tiled_weights(item) for item in backbone.layers}
    ends = torch_reference(detector, features, cells)
    by_name = {item.name: item for item in backbone.layers}
    for precision, tolerance in TOLERANCE.items():
        plan = plan_backbone(
            backbone, frame=voxel_frame(detector, rows), capacities=capacities, precision=precision, shapes=shapes,
            keep=keep_everything(backbone), count_tiles=True,
        )  # fmt: skip
        (run,) = interpret(plan, [feed]).runs
        worst = 0.0
        for name, (keys, expected) in ends.items():
            stage = by_name[name].stage_out
            assert run.status[stage] == len(keys) <= capacities[stage]
            np.testing.assert_array_equal(run.kept[f"{stage}.sites"][: len(keys)], keys)
            found = run.kept[name][: len(keys), : expected.shape[1]].astype(np.float64)
            worst = max(worst, np.abs(found - expected).max() / np.abs(expected).max())
        dense = bev_of(*ends["conv_out.0"], backbone.stages[-1].grid)
        worst = max(worst, np.abs(run.outputs["bev"].astype(np.float64) - dense).max() / np.abs(dense).max())
        print(f"{kind} {precision}: {len(cells)} voxels, {len(ends)} stages, worst relative error {worst:.2e}")
        assert worst <= tolerance
        executed = run.kept["executed"].astype(np.int64)
        predicted = predicted_tiles(backbone, tiled, statistics)
        print(f"tile products executed {executed.sum()}, predicted {predicted.sum()}")
        assert abs(executed.sum() - predicted.sum()) <= 0.01 * predicted.sum()


def stacked_to(cells, count, grid):
    """`count` unique cells: those of the scene, then its mirror images."""
    images = [cells, cells * (1, 1, -1) + (0, 0, grid[2] - 1), cells * (1, -1, 1) + (0, grid[1] - 1, 0)]
    keys = np.concatenate([(c[:, 0] * grid[1] + c[:, 1]) * grid[2] + c[:, 2] for c in images])
    first = np.sort(np.unique(keys, return_index=True)[1])[:count]
    return np.stack(np.unravel_index(keys[first], grid), axis=1)


@pytest.mark.parametrize("count", [60_000, 120_000, 160_000])
def test_the_index_path_is_that_of_torch_at_full_size(count, scene, tmp_path):
    rng = np.random.default_rng(0)
    grid = (41, 1440, 1440)
    cells = stacked_to(scene[1], count, grid)
    assert len(cells) == count
    cells = rng.permutation(cells)
    layers, shapes = [], replace(WIDE, conv_rows=8192, book_blocks=1)
    for number, pad in enumerate([None, 1, 1, 0], start=1):
        if pad is not None:
            layers.append(layer(rng, f"down{number}", 1, 1, stride=DOWN, padding=(pad, 1, 1), key=f"d{number}"))
        layers.append(layer(rng, f"same{number}", 1, 1, key=f"s{number}"))
    out = {"kernel": (3, 1, 1), "stride": (2, 1, 1), "padding": (0, 0, 0), "submanifold": False}
    layers.append(layer(rng, "out", 1, 1, key="out", **out))
    backbone = backbone_of(layers, grid, count, tmp_path)
    statistics = frame_statistics(backbone, np.pad(cells, ((0, 0), (1, 0))), conv_rows=shapes.conv_rows)
    keep = [f"{stage.name}.sites" for stage in backbone.stages]
    keep += sorted({f"{item.book}.pairs" for item in backbone.layers})
    plan = plan_backbone(
        backbone, frame=plain_frame(grid, count), precision="fp16", shapes=shapes, keep=keep,
        capacities=capacities_from([statistics], margin=1.1, max_voxels=count),
    )  # fmt: skip
    (run,) = interpret(plan, [padded(np.ones((count, 1), np.float32), cells, count)]).runs

    ordered = cells[np.lexsort(cells.T[::-1])]
    x = SparseTensor(torch.zeros(count, 1), torch.from_numpy(np.pad(ordered, ((0, 0), (1, 0)))), grid, 1)
    for item, read in zip(layers, backbone.layers, strict=True):
        if item.submanifold:
            told = submanifold_map(x.coords, x.shape_zyx, item.kernel)
        else:
            told = strided_map(x.coords, x.shape_zyx, item.kernel, item.stride, item.padding)
        x = x.at(told, torch.zeros(len(told.out_coords), 1))
        keys = cell_keys(x.coords, x.shape_zyx).numpy()
        assert run.status[read.stage_out] == len(keys)
        np.testing.assert_array_equal(run.kept[f"{read.stage_out}.sites"][: len(keys)], keys)
        pairs = np.full((told.taps, len(keys)), -1, np.int32)
        for tap, (inputs, outputs) in enumerate(zip(told.in_rows, told.out_rows, strict=True)):
            pairs[tap, outputs.numpy()] = inputs.numpy()
        np.testing.assert_array_equal(run.kept[f"{read.book}.pairs"][:, : len(keys)], pairs)
    print({name: value for name, value in run.status.items() if value})


def test_the_points_of_a_real_frame_become_the_voxels_of_the_detector(shared, tmp_path):
    points = np.fromfile(next((shared / "data" / "nuscenes").glob("*.f16x5.bin")), np.float16).reshape(-1, 5)
    points = points.astype(np.float32)
    path = shared / "data/openpcdet_cfgs/nuscenes_models/cbgs_voxel01_res3d_centerpoint.yaml"
    config = replace(load_config(path).voxels, max_points_per_voxel=10**6, max_voxels=10**6)
    cloud = PointCloud(points=points, columns=("x", "y", "z", "intensity", "timestamp"), source="a real frame")
    expected = voxelize(cloud, config)
    count, grid = len(expected.coords), (41, *config.grid_zyx[1:])
    down = {"kernel": CUBE, "stride": (8, 8, 8), "padding": (0, 0, 0)}
    backbone = backbone_of([layer(np.random.default_rng(0), "d", 1, 5, key="d", **down)], grid, 10, tmp_path)
    frame = frame_from_config(config, rows=300_000, points=True)
    plan = plan_backbone(
        backbone, frame=frame, capacities={"input": count, "d": 32_768}, precision="fp32",
        shapes=replace(WIDE, conv_rows=1024, book_blocks=4), keep=("input.sites", "entry.features"),
    )  # fmt: skip
    feeds = []
    for order in (np.arange(len(points)), np.random.default_rng(0).permutation(len(points))):
        rows = np.full((300_000, 5), np.nan, np.float32)
        rows[: len(points)] = points[order]
        feeds.append({"points": rows, "count": np.array([len(points)], np.int32)})
    run, shuffled = interpret(plan, feeds).runs
    assert run.status["input"] == count
    z, y, x = expected.coords[:, 1:].astype(np.int64).T
    np.testing.assert_array_equal(run.kept["input.sites"], (z * grid[1] + y) * grid[2] + x)
    error = np.abs(run.kept["entry.features"][:, :5] - expected.features)
    print(f"{len(points)} points, {count} cells, largest error {error.max():.1e}")
    assert (error <= 2e-7 * np.abs(expected.features) + 1e-7).all()
    assert run.kept["entry.features"].tobytes() == shuffled.kept["entry.features"].tobytes()
    assert run.outputs["bev"].tobytes() == shuffled.outputs["bev"].tobytes()
