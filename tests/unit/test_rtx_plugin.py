"""TensorRT-RTX takes the node of backbone3d.onnx for one plugin, of the plan's types and shapes: built, not run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from sparse3d_sample import voxel_frame
from two_stage_sample import variant

import engines
from dm3d_deploy.models.detector import build_detector
from dm3d_deploy.stages import FILES
from engines.sparse3d.onnx_reader import read_backbone
from engines.sparse3d.plan_file import read_plan, write_plan
from engines.sparse3d.planner import plan_backbone
from engines.tensorrt_rtx import rtx_missing
from exporters.backbone3d import export_backbone3d

pytestmark = pytest.mark.tensorrt
CHILD = Path(__file__).with_name("rtx_plugin_child.py")
TYPE_OF = {"fp16": "HALF", "fp32": "FLOAT", "i32": "INT32", "i64": "INT64"}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A folder where the parser finds libtensorrt_rtx.so by that name, which the package gives it with a number."""
    if rtx_missing() is not None:
        pytest.skip(str(rtx_missing()))
    import tensorrt_rtx_libs

    folder = tmp_path_factory.mktemp("lib")
    (home,) = map(Path, tensorrt_rtx_libs.__path__)
    (folder / "libtensorrt_rtx.so").symlink_to(next(home.glob("libtensorrt_rtx.so*")))
    return folder


def child(library, path, cwd, *words):
    """What the child answers for the ONNX file."""
    answer = library / "answer.json"
    done = subprocess.run(
        [sys.executable, str(CHILD), str(path), str(answer), *words],
        env={
            **os.environ,
            "LD_LIBRARY_PATH": str(library),
            "PYTHONPATH": str(Path(str(engines.__file__)).parents[1]),
        },
        cwd=cwd, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(answer.read_text())


@pytest.mark.parametrize("body", [True, False], ids=["with its body", "without its body"])
def test_every_node_of_ours_becomes_one_plugin_of_the_plans_shapes(library, tiny_run, tmp_path, body):
    model = onnx.load(tiny_run / FILES["backbone3d"])
    if not body:
        del model.functions[:]
    onnx.save(model, tmp_path / "backbone3d.onnx")
    told = child(library, tmp_path / "backbone3d.onnx", tiny_run, "plugin")
    nodes = [node for node in model.graph.node if node.domain == "dm3d"]
    assert (told["parsed"], told["errors"]) == (True, [])
    assert told["plugins"] == [node.name for node in nodes] == ["backbone_3d"]
    assert told["layers"] == 1
    plan = read_plan(tiny_run / FILES["plan"])
    assert told["outputs"] == {item.name: [TYPE_OF[item.dtype], list(item.shape)] for item in plan.outputs}
    assert told["calls"] == [str([list(item.shape) for item in [*plan.inputs, *plan.outputs]])]
    assert told["built"]
    assert told["carries_the_plan"]


def test_rows_of_stages_are_outputs_of_the_plugin(library, tmp_path):
    detector = build_detector(variant("voxel-rcnn"))
    export_backbone3d(detector, tmp_path / "backbone3d.onnx", max_voxels=256, plan_file="3d.plan")
    backbone = read_backbone(tmp_path / "backbone3d.onnx")
    rooms = {stage.name: 256 for stage in backbone.stages}
    plan = plan_backbone(backbone, frame=voxel_frame(detector, 256), capacities=rooms)
    write_plan(tmp_path / "3d.plan", plan)
    told = child(library, tmp_path / "backbone3d.onnx", tmp_path, "plugin")
    assert (told["parsed"], told["errors"], told["built"], told["carries_the_plan"]) == (True, [], True, True)
    assert told["outputs"] == {item.name: [TYPE_OF[item.dtype], list(item.shape)] for item in plan.outputs}
    assert told["outputs"]["sites.x_conv4"] == ["INT64", [3, 256]]


def test_without_the_plugin_the_slow_body_is_not_taken_silently(library, tiny_run):
    told = child(library, tiny_run / FILES["backbone3d"], tiny_run)
    assert (told["parsed"], told["plugins"]) == (False, [])
    assert any("SparseBackbone3d" in line for line in told["errors"])


def test_a_plan_that_is_not_found_ends_the_parse(library, tiny_run, tmp_path):
    told = child(library, tiny_run / FILES["backbone3d"], tmp_path, "plugin")
    assert (told["parsed"], told["plugins"]) == (False, [])
    assert any("Could not create the plugin" in line for line in told["errors"])
