"""A small VoxelNeXt down the line: build to its verification, detect and evaluate without torch's detector, inspect."""

import json

import numpy as np
import pytest
from run_sample import tiny_recipe
from zoo_sample import small_cloud_points, variant_text

from dm3d_deploy import build as builder
from dm3d_deploy.evaluate import evaluate
from dm3d_deploy.inspection import describe_path
from dm3d_deploy.plan_facts import describe_plan_of_run
from exporters.graph_files import safe_load


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A build to the stage `verify`; the sessions of ONNX Runtime take most of the time, so it stops there."""
    folder = tmp_path_factory.mktemp("voxelnext")
    (folder / "mine.yaml").write_text(variant_text("voxelnext"))
    (folder / "drives").mkdir()
    for frame in range(4):
        np.save(folder / "drives" / f"{frame}.npy", small_cloud_points(4, seed=frame))
    recipe = tiny_recipe(folder / "drives", model=str(folder / "mine.yaml"), calibration_frames=1)
    builder.build(recipe, folder / "run", last="verify")
    return folder / "run"


def test_what_is_exported_computes_what_torch_computes(run):
    parity = json.loads((run / "work/verification.json").read_text())["parity"]
    assert {"BEV map", "hm", "center", "boxes before NMS", "boxes"} <= {row["output"] for row in parity}
    assert all(row["passed"] for row in parity), [row["worst"] for row in parity if not row["passed"]]


def test_its_plans_merge_stages_and_tell_active_cells(run):
    pytest.importorskip("triton")
    (skipped,) = json.loads((run / "engines/backbone3d/resources.json").read_text())["skipped"]
    assert skipped["layer"] == "the head at active cells alone"
    assert "every cell of the map" in skipped["reason"]
    _, channels, height, width = safe_load(run / "onnx/bev_head.onnx").graph.input[0].type.tensor_type.shape.dim
    for kind in ("plan", "points_plan"):
        told = describe_plan_of_run(run, kind)
        size = [1, channels.dim_value, height.dim_value, width.dim_value]
        assert told["outputs"]["bev"] == f"fp16{size}"
        assert told["launches_of"]["kernels_flat.bitmap_set_flat"] == 3
        assert told["launches_of"]["kernels_flat.sum_flat"] == 1
        assert told["capacities"]["merged"] % 64 == 0
        assert [row["sm"] for row in told["images"]] == ["sm_87"]


def test_it_is_evaluated_and_inspected(run, tmp_path):
    found = evaluate(run, metric="nuscenes", out=tmp_path / "ap", sensor="hdl64", frames=1)
    assert found.frames == 1
    told = describe_path(run)
    assert told["files_changed_or_missing"] == 0
    assert told["kept"]["of scope"] <= 0.5
    nodes = describe_path(run / "onnx/backbone3d.onnx")["nodes_in_function_bodies"]
    assert nodes["dm3d::MergedFeatures"] == 1
