"""Rows of stages that a plan gives out, against what ONNX Runtime makes of the same backbone3d.onnx."""

import numpy as np
import pytest
from sparse3d_sample import clustered_cells, layer, merging_layers, padded, plain_frame
from two_stage_sample import VARIANTS, deployed_from, variant
from zoo_sample import small_cloud_points

from dm3d_deploy.artifacts import digest_of_file
from dm3d_deploy.detect_two_stage import GEOMETRY, Frame
from dm3d_deploy.geometry.rois import second_maps
from dm3d_deploy.geometry.voxelize import voxelize
from dm3d_deploy.models.detector import build_detector
from dm3d_deploy.models.seeded import seed_weights
from dm3d_deploy.pointcloud import PointCloud
from engines.onnx_runtime import open_session, run_backbone_stages
from engines.sparse3d.entry import frame_from_config
from engines.sparse3d.interpreter import interpret
from engines.sparse3d.onnx_reader import read_backbone
from engines.sparse3d.planner import plan_backbone
from engines.sparse3d.shapes import WIDE
from engines.sparse3d.sites import frame_statistics
from exporters.backbone3d import backbone_model, export_backbone3d

pytest.importorskip("triton")
ROOM = 1024


def rows_given(outputs, name):
    """The rows that are there; the others must be empty."""
    features, cells = outputs[f"features.{name}"], outputs[f"sites.{name}"]
    count = int((cells[0] >= 0).sum())
    assert (cells[:, :count] >= 0).all()
    assert (cells[:, count:] == -1).all()
    assert not features[count:].any()
    return {f"features.{name}": features[:count], f"sites.{name}": cells[:, :count]}


def second_stage_of(deployed, voxels, rows):
    """All behind the backbone, from its rows."""
    frame = Frame(backbone=rows, points=voxels.points, maps={})
    for stage in ("BEV + head", GEOMETRY, "RoI head"):
        frame = deployed.stages()[stage](frame)
    return frame


@pytest.mark.parametrize("name", VARIANTS)
def test_the_second_stages_of_the_zoo_name_their_stages(tmp_path, name):
    detector = build_detector(variant(name))
    export_backbone3d(detector, tmp_path / "backbone.onnx", max_voxels=ROOM)
    given = read_backbone(tmp_path / "backbone.onnx").given
    assert tuple(given) == detector.config.second_stage.stages_read
    assert all(f"x_{layer.partition('.')[0]}" == stage for stage, layer in given.items())


def test_the_second_stage_reads_from_a_plan_what_it_reads_from_onnx(tmp_path):
    detector = build_detector(variant("pv-rcnn"))  # four stages; Voxel R-CNN reads three of the same backbone
    seed_weights(detector, 3)
    columns = ("x", "y", "z", "intensity")
    cloud = PointCloud(points=small_cloud_points(4, count=300, seed=9), columns=columns, source="a test")
    voxels = voxelize(cloud, detector.config)
    deployed = deployed_from(detector.eval(), tmp_path)
    backbone = read_backbone(tmp_path / "backbone.onnx")
    plan = plan_backbone(
        backbone, frame=frame_from_config(detector.config.voxels, rows=ROOM), precision="fp32", shapes=WIDE,
        capacities={stage.name: ROOM for stage in backbone.stages},
    )  # fmt: skip
    (run,) = interpret(plan, [padded(voxels.features, voxels.coords[:, 1:], ROOM)]).runs

    expected = run_backbone_stages(deployed.backbone, voxels)
    found = {"bev": run.outputs["bev"], "status": run.outputs["status"]}
    for stage in backbone.given:
        found |= rows_given(run.outputs, stage)
        assert len(found[f"features.{stage}"]) == run.status[plan.meta["given"][stage]] > 100
    assert list(found) == list(expected)
    for key, array in expected.items():
        assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape)
        np.testing.assert_allclose(found[key], array, atol=1e-5 * np.abs(array).max(), rtol=0)
        assert array.dtype == np.float32 or np.array_equal(found[key], array), "cells, in their order"

    ours, theirs = (second_stage_of(deployed, voxels, rows) for rows in (found, expected))
    np.testing.assert_array_equal(ours.rois.cells, theirs.rois.cells)
    for key in second_maps(detector.config):
        np.testing.assert_allclose(ours.maps[key], theirs.maps[key], atol=1e-4)


def test_a_stage_beyond_its_rows_gives_the_first_of_them(tmp_path):
    """In half precision, with channels that fill no tile and more of them than one program takes."""
    rng = np.random.default_rng(3)
    column = {"kernel": (3, 1, 1), "stride": (2, 1, 1), "padding": (0, 0, 0), "submanifold": False}
    layers = [
        layer(rng, "a.0", 24, 4, key="a"),
        layer(rng, "d.0", 72, 24, stride=(2, 2, 2), key="d"),
        layer(rng, "o.0", 8, 72, key="o", **column),
    ]
    grid, path = (9, 14, 13), tmp_path / "layers.onnx"
    path.write_bytes(
        backbone_model(layers, grid_zyx=grid, max_voxels=128, stages=("x_a", "x_d")).SerializeToString()
    )  # fmt: skip
    cells = clustered_cells(rng, grid, 70)
    feed = padded(rng.normal(size=(70, 4)).astype(np.float32), cells, 128)
    expected = open_session(path, digest=digest_of_file(path), threads=1).run(feed)
    plan = plan_backbone(
        read_backbone(path), frame=plain_frame(grid, 128), shapes=WIDE, capacities={"input": 128, "d": 64, "o": 64}
    )
    (run,) = interpret(plan, [feed]).runs
    assert run.status["d"] == expected["features.x_d"].shape[0] > 64
    for name, count in (("x_a", 70), ("x_d", 64)):
        found = rows_given(run.outputs, name)
        features, sites = expected[f"features.{name}"][:count], expected[f"sites.{name}"][:, :count]
        np.testing.assert_array_equal(found[f"sites.{name}"], sites)
        np.testing.assert_allclose(found[f"features.{name}"], features, atol=2e-3 * features.max(), rtol=0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_merged_stages_and_the_channel_of_active_cells_are_those_of_onnx(tmp_path, precision):
    """64 channels and one: the map takes two programs of channels. Odd sizes: the last cells have no whole parents."""
    rng = np.random.default_rng(5)
    grid, path = (11, 21, 19), tmp_path / "layers.onnx"
    path.write_bytes(backbone_model(merging_layers(rng), grid_zyx=grid, max_voxels=128).SerializeToString())
    cells = clustered_cells(rng, grid, 60)
    feed = padded(rng.normal(size=(60, 4)).astype(np.float32), cells, 128)
    expected = open_session(path, digest=digest_of_file(path), threads=1).run(feed)
    backbone = read_backbone(path)
    statistics = frame_statistics(backbone, feed["coords"][:60], conv_rows=WIDE.conv_rows)
    plan = plan_backbone(
        backbone, frame=plain_frame(grid, 128), shapes=WIDE, precision=precision,
        capacities={stage.name: 512 for stage in backbone.stages}, calibration=[statistics],
    )  # fmt: skip
    (run,) = interpret(plan, [feed]).runs
    assert run.outputs["status"].tolist() == expected["status"].tolist() == list(statistics.counts.values())
    found, wanted = run.outputs["bev"][0], expected["bev"][0]
    assert found.shape == wanted.shape == (65, 11, 10)
    np.testing.assert_array_equal(found[64], wanted[64])
    assert 0 < wanted[64].sum() == statistics.counts["out"] < wanted[64].size
    tolerance = {"fp32": 1e-5, "fp16": 2e-3}[precision]
    np.testing.assert_allclose(found[:64], wanted[:64], atol=tolerance * wanted[:64].max(), rtol=0)
