"""Engines of second stages: the full-size graph of Voxel R-CNN, and bounds that are missing or cannot be."""

import json

import pytest
from plan_sample import sample_plan
from two_stage_sample import variant

from dm3d_deploy.config import load_config
from dm3d_deploy.errors import EngineError, InternalError, UsageError
from dm3d_deploy.models.detector import build_detector
from dm3d_deploy.models.seeded import seed_weights
from dm3d_deploy.steps.open_rows import plans_needed, second_stage_rows
from engines.tensorrt_rtx import OpenRows, build_rtx_engine, rtx_missing
from exporters.graph_files import safe_load
from exporters.second_stage import export_second_stage


@pytest.fixture
def rtx():
    if rtx_missing() is not None:
        pytest.skip(str(rtx_missing()))


def engine_of(config, root, bounds):
    """Export the second stage of a seeded detector and build its engine."""
    detector = build_detector(config)
    seed_weights(detector, 3)
    export_second_stage(detector, root / "second.onnx")
    return build_rtx_engine(
        root / "second.onnx", "second.engine", root=root, targets=("sm_86", "sm_89"), precision="fp32",
        log_path="second.log", rows=bounds,
    )  # fmt: skip


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_every_product_of_the_full_size_second_stage_is_in_its_engine(tmp_path):
    config = load_config("voxel-rcnn")
    most = {"rows_of_x_conv2": 68_608, "rows_of_x_conv3": 38_464, "rows_of_x_conv4": 15_040}
    bounds = {name: OpenRows(least=1, most=rows, source="a test") for name, rows in most.items()}
    bounds["rows_of_places"] = OpenRows(least=6**3, most=100 * 6**3, source="a test")
    made = engine_of(config, tmp_path, bounds)
    listed = json.loads((tmp_path / "second.engine.layers.json").read_text())
    assert made.layers == listed["count"] == 34
    done = {node for layer in listed["layers"] for node in layer["onnx_nodes"]}
    nodes = safe_load(tmp_path / "second.onnx").graph.node
    products = {f"node_of_{node.output[0]}" for node in nodes if node.op_type == "MatMul"}
    assert len(products) == 3 * 3 + 2 + 2 * 3  # three stages of three, the shared layers, two branches of three
    assert products <= done


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_a_dimension_without_bounds_is_refused(tmp_path):
    bounds = {"rows_of_x_conv2": OpenRows(least=1, most=100, source="a test")}
    with pytest.raises(EngineError, match="the dimension rows_of_x_conv3 of the graph has no bounds"):
        engine_of(variant("voxel-rcnn"), tmp_path, bounds)
    assert not (tmp_path / "second.engine").exists()
    for least, most in ((0, 5), (6, 5)):
        with pytest.raises(UsageError, match=f"an open dimension cannot have {least} to {most} rows"):
            OpenRows(least=least, most=most, source="a test")


def test_a_plan_of_another_backbone_says_no_rows():
    with pytest.raises(InternalError, match=r"the plan has no 'features.x_conv2' among "):
        second_stage_rows(variant("voxel-rcnn"), {"plan": sample_plan()})
    assert (plans_needed(variant("voxel-rcnn")), plans_needed(variant("pv-rcnn"))) == (
        ("plan",),
        ("plan", "points_plan"),
    )
