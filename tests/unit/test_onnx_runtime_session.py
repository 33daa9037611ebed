"""ONNX Runtime sessions: the right file, the right arrays, and plain words otherwise."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from dm3d_deploy.artifacts import digest_of_bytes
from dm3d_deploy.errors import EngineError, FrameError, StaleArtifact, UsageError
from dm3d_deploy.pointcloud import Voxels
from engines.onnx_runtime import open_session, run_backbone

ROOT = Path(__file__).resolve().parents[2]


def model_bytes(nodes, inputs, outputs, stored=(), metadata=None):
    graph = helper.make_graph(nodes, "g", inputs, outputs, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, metadata or {})
    return model.SerializeToString()


def tensor(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def opened(tmp_path, data, threads=1):
    path = tmp_path / "graph.onnx"
    path.write_bytes(data)
    return open_session(path, digest=digest_of_bytes(data), threads=threads)


DOUBLE = model_bytes([helper.make_node("Add", ["x", "x"], ["y"])], [tensor("x", [2, 3])], [tensor("y", [2, 3])])


def test_it_runs_exactly_what_was_asked(tmp_path):
    session = opened(tmp_path, DOUBLE)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert session.inputs == {"x": ("float32", (2, 3))}
    assert session.outputs == {"y": ("float32", (2, 3))}
    assert session.name == "graph.onnx"
    np.testing.assert_array_equal(session.run({"x": x})["y"], 2 * x)


def test_half_precision_runs_on_the_cpu(tmp_path):
    weight = numpy_helper.from_array(np.full((4, 4, 3, 3), 0.5, np.float16), "w")
    half = TensorProto.FLOAT16
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])
    data = model_bytes([node], [tensor("x", [1, 4, 5, 5], half)], [tensor("y", [1, 4, 5, 5], half)], [weight])
    y = opened(tmp_path, data).run({"x": np.ones((1, 4, 5, 5), np.float16)})["y"]
    assert y.dtype == np.float16
    assert y[0, 0, 2, 2] == 18


def test_another_file_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "graph.onnx"
    with pytest.raises(StaleArtifact, match=r"graph\.onnx is missing"):
        open_session(path, digest="0" * 64, threads=1)
    path.write_bytes(b"not even a graph")
    found = digest_of_bytes(b"not even a graph")[:12]
    with pytest.raises(StaleArtifact, match=f"expected sha256 000000000000…, found {found}…"):
        open_session(path, digest="0" * 64, threads=1)
    with pytest.raises(EngineError, match=r"ONNX Runtime [\d.]+ refuses .*graph\.onnx: .*INVALID_PROTOBUF"):
        opened(tmp_path, b"not even a graph")
    with pytest.raises(UsageError, match="0 threads cannot run anything"):
        open_session(path, digest=found, threads=0)


def test_graphs_without_static_shapes_are_refused(tmp_path):
    data = model_bytes([helper.make_node("Relu", ["x"], ["y"])], [tensor("x", ["n", 3])], [tensor("y", ["n", 3])])
    with pytest.raises(EngineError, match=r"'x' is tensor\(float\) \['n', 3\]; only static shapes"):
        opened(tmp_path, data)


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({}, "takes the inputs x, not none"),
        ({"z": np.ones((2, 3), np.float32)}, "takes the inputs x, not z"),
        ({"x": np.ones((2, 4), np.float32)}, r"input 'x' must be float32 \[2, 3\], not float32 \[2, 4\]"),
        ({"x": np.ones((2, 3))}, r"input 'x' must be float32 \[2, 3\], not float64 \[2, 3\]"),
    ],
)
def test_wrong_inputs_are_named(tmp_path, inputs, text):
    with pytest.raises(EngineError, match=text):
        opened(tmp_path, DOUBLE).run(inputs)


def test_a_failure_inside_the_graph_is_one_sentence(tmp_path):
    node = helper.make_node("Gather", ["table", "i"], ["y"])
    stored = [numpy_helper.from_array(np.ones(4, np.float32), "table")]
    data = model_bytes([node], [tensor("i", [2], TensorProto.INT64)], [tensor("y", [2])], stored)
    with pytest.raises(EngineError, match=r"graph\.onnx failed in ONNX Runtime .*[Gg]ather"):
        opened(tmp_path, data).run({"i": np.array([0, 99])})


def test_nothing_is_written_to_the_terminal(tmp_path, capfd):
    with pytest.raises(EngineError):
        opened(tmp_path, b"\x00" * 20)
    unused = [numpy_helper.from_array(np.ones(4, np.float32), "unused")]
    data = model_bytes([helper.make_node("Relu", ["x"], ["y"])], [tensor("x", [3])], [tensor("y", [3])], unused)
    opened(tmp_path, data).run({"x": np.ones(3, np.float32)})
    assert capfd.readouterr() == ("", "")


def backbone_bytes(capacity=3, metadata=None):
    """A stand-in: the map holds the sum over all rows of the features, the status the count."""
    nodes = [
        helper.make_node("ReduceSum", ["features"], ["total"], keepdims=0),
        helper.make_node("Reshape", ["total", "shape"], ["bev"]),
        helper.make_node("Add", ["count", "first"], ["status"]),
        helper.make_node("ReduceSum", ["coords"], ["first_"], keepdims=0),
        helper.make_node("Reshape", ["first_", "one"], ["first"]),
    ]
    nodes = [*nodes[3:], *nodes[:3]]
    inputs = [
        tensor("features", [capacity, 2]),
        tensor("coords", [capacity, 4], TensorProto.INT32),
        tensor("count", [1], TensorProto.INT32),
    ]
    outputs = [tensor("bev", [1, 1, 1, 1]), tensor("status", [1], TensorProto.INT32)]
    stored = [
        numpy_helper.from_array(np.ones(4, np.int64), "shape"),
        numpy_helper.from_array(np.ones(1, np.int64), "one"),
    ]
    return model_bytes(nodes, inputs, outputs, stored, {"dm3d.grid_zyx": "5,6,7"} if metadata is None else metadata)


def voxels(coords, columns=2):
    coords = np.array(coords, np.int32).reshape(-1, 4)
    count = len(coords)
    features = np.full((count, columns), 1.5, np.float32)
    return Voxels(features=features, coords=coords, num_points=np.ones(count, np.int32), found=count, cutoff_m=math.inf)


def test_voxels_are_padded_to_the_capacity(tmp_path):
    session = opened(tmp_path, backbone_bytes())
    bev, status = run_backbone(session, voxels([[0, 4, 5, 6], [0, 0, 0, 1]]))
    assert bev.item() == 6.0
    assert status.item() == 2 + 16
    assert run_backbone(session, voxels([]))[1].item() == 0
    assert run_backbone(session, voxels([[0, 0, 0, i] for i in range(3)]))[1].item() == 6


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        (voxels([[0, 0, 0, i] for i in range(4)]), r"has 4 voxels and graph\.onnx has room for 3"),
        (voxels([[0, 0, 0, 0]], columns=5), r"have 5 columns and graph\.onnx takes 2"),
        (voxels([[0, 0, 0, 0], [0, 4, 6, 0]]), r"voxel 1 lies at .* \[0, 4, 6, 0\], outside the grid \(5, 6, 7\)"),
        (voxels([[1, 0, 0, 0]]), r"voxel 0 lies at .* \[1, 0, 0, 0\], outside"),
        (voxels([[0, -1, 0, 0]]), r"voxel 0 lies at .* \[0, -1, 0, 0\], outside"),
    ],
)
def test_frames_that_do_not_fit_are_refused(tmp_path, frame, text):
    with pytest.raises(FrameError, match=text):
        run_backbone(opened(tmp_path, backbone_bytes()), frame)


def test_another_graph_is_no_backbone(tmp_path):
    with pytest.raises(EngineError, match=r"is no 3D backbone: it does not record dm3d\.grid_zyx"):
        run_backbone(opened(tmp_path, backbone_bytes(metadata={"other": "1"})), voxels([]))


def test_the_engine_imports_neither_torch_nor_exporters():
    code = (
        "import sys, engines.onnx_runtime as e; "
        "assert 'onnxruntime' not in sys.modules; import onnxruntime; "
        "bad = {'torch', 'exporters'} & {m.split('.')[0] for m in sys.modules}; assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_graph_checks_import_no_torch():
    code = "import sys, exporters.graph_checks, exporters.backbone3d; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
