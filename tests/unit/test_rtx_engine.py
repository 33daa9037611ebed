"""TensorRT-RTX builds: real ones where the package is installed, and every way one can fail."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from dm3d_deploy.artifacts import Engine
from dm3d_deploy.errors import EngineError, MissingDependency, StaleArtifact, UsageError
from engines import tensorrt_rtx
from engines.onnx_weights import check_precision, kernels_of, two_four_kernels
from engines.tensorrt_rtx import build_rtx_engine, first_error, layers_of_log, open_rtx_engine, rtx_missing

FOUR = ("sm_80", "sm_86", "sm_89", "sm_120")


@pytest.fixture
def rtx() -> None:
    if rtx_missing() is not None:
        pytest.skip(str(rtx_missing()))


def two_four(weight: np.ndarray) -> np.ndarray:
    out = weight.copy()
    out[:, 1::4] = 0
    out[:, 2::4] = 0
    return out


def conv_model(weight: np.ndarray, extra: list[onnx.NodeProto] | None = None, output: str = "y") -> onnx.ModelProto:
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    k, c = weight.shape[:2]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], name="conv1", pads=[1, 1, 1, 1]), *(extra or [])],
        "g",
        [helper.make_tensor_value_info("x", kind, [1, c, 16, 16])],
        [helper.make_tensor_value_info(output, kind, [1, k, 16, 16])],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("nowhere", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.fixture
def weight() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((16, 16, 3, 3)).astype(np.float16)


@pytest.fixture
def onnx_path(tmp_path: Path, weight: np.ndarray) -> Path:
    path = tmp_path / "conv.onnx"
    onnx.save(conv_model(weight), str(path))
    return path


def build(onnx_path: Path, root: Path, **changed: Any) -> Engine:
    arguments: dict[str, Any] = {"targets": ("sm_89",), "precision": "fp16", "log_path": "engines/conv.log"}
    return build_rtx_engine(onnx_path, "engines/conv.engine", root=root, **{**arguments, **changed})


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_one_engine_for_four_compute_capabilities(onnx_path: Path, tmp_path: Path) -> None:
    engine = build(onnx_path, tmp_path / "run", targets=FOUR)
    assert (engine.backend, engine.built_for, engine.precision) == ("tensorrt_rtx", FOUR, "fp16")
    assert not engine.ran_here
    assert engine.standing == "built, not run here"
    assert engine.artifact.checked(tmp_path / "run").name == "conv.engine"
    listed = json.loads((tmp_path / "run/engines/conv.engine.layers.json").read_text())
    assert listed["count"] == engine.layers == len(listed["layers"]) >= 1
    assert [layer["kind"] for layer in listed["layers"] if layer["onnx_nodes"] == ["conv1"]] == ["correlation"]
    assert listed["two_four_weights"] == []
    assert not listed["sparse_weights_flag"]
    log = (tmp_path / "run/engines/conv.log").read_text()
    assert "Number of target compute capabilities: 4" in log
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_the_build_needs_no_place(onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder named engines in the working directory must not be taken for ours, nor relative paths be lost."""
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "__init__.py").write_text("raise SystemExit('wrong engines')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    first = build(Path("conv.onnx"), Path("run1"))
    second = build(onnx_path, tmp_path / "run2")
    assert first.artifact.digest == second.artifact.digest  # seen so far; TensorRT does not promise it


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_two_four_weights_set_the_flag_and_say_what_it_is_worth(tmp_path: Path, weight: np.ndarray) -> None:
    path = tmp_path / "sparse.onnx"
    onnx.save(conv_model(two_four(weight)), str(path))
    build(path, tmp_path)
    listed = json.loads((tmp_path / "engines/conv.engine.layers.json").read_text())
    assert listed["two_four_weights"] == ["w"]
    assert listed["sparse_weights_flag"]
    assert "does nothing" in listed["sparse_note"]


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_a_refused_graph_names_its_first_error_and_node(tmp_path: Path, weight: np.ndarray) -> None:
    path = tmp_path / "unknown.onnx"
    node = helper.make_node("Nope", ["y"], ["z"], name="nope1", domain="nowhere")
    onnx.save(conv_model(weight, [node], "z"), str(path))
    with pytest.raises(EngineError, match=r"Plugin not found.*While parsing node number 1 \[Nope") as caught:
        build(path, tmp_path / "run")
    assert "conv.log" in caught.value.what
    assert "cudaError" not in caught.value.what
    assert (tmp_path / "run/engines/conv.log").is_file()
    assert not (tmp_path / "run/engines/conv.engine").exists()


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_an_unknown_target_names_the_nearest(onnx_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot build for sm_88.*did you mean 'sm_8"):
        build(onnx_path, tmp_path, targets=("sm_89", "sm_88"))


@pytest.mark.parametrize("targets", [(), ("sm_89", "sm_89")])
def test_empty_or_repeated_targets(
    onnx_path: Path, tmp_path: Path, targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_rtx, "rtx_missing", lambda: None)
    with pytest.raises(UsageError, match="empty or repeated"):
        build(onnx_path, tmp_path, targets=targets)


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Let the child process be a shell script."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(tensorrt_rtx, "rtx_missing", lambda: None)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("kill -ABRT $$", r"killed by SIGABRT \(no message\)"),
        ("echo 'out of memory' >&2; kill -KILL $$", r"killed by SIGKILL \(out of memory\)"),
        ("echo 'first' >&2; echo 'ImportError: libx.so' >&2; exit 1", r"ended with code 1 \(ImportError: libx.so\)"),
        ("exit 0", r"ended with code 0 \(no message\)"),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="the stand-in is a shell script")
def test_a_dying_child_is_an_error_and_leaves_no_engine(
    onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, says: str
) -> None:
    old = tmp_path / "run/engines/conv.engine"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"the engine of an earlier build")
    stand_in(tmp_path, monkeypatch, "cat > /dev/null; " + body)
    with pytest.raises(EngineError, match=says):
        build(onnx_path, tmp_path / "run")
    assert old.read_bytes() == b"the engine of an earlier build"


@pytest.mark.skipif(os.name != "posix", reason="the stand-in is a shell script")
def test_a_hanging_child_is_stopped(onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, "exec sleep 20")
    with pytest.raises(EngineError, match=r"did not finish within 0\.3 s and was stopped"):
        build(onnx_path, tmp_path, timeout_s=0.3)


@pytest.mark.skipif(os.name != "posix", reason="the stand-in is a shell script")
def test_a_log_without_layers_is_no_evidence(onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "import json,sys; r=json.load(sys.stdin); open(r['answer'],'w').write('{\"version\": \"1\"}')"
    stand_in(tmp_path, monkeypatch, f"exec '{sys.executable}' -c \"$PROGRAM\"")
    monkeypatch.setenv("PROGRAM", answer)
    with pytest.raises(EngineError, match="holds no layer list"):
        build(onnx_path, tmp_path)
    assert not (tmp_path / "engines/conv.engine").exists()


def test_another_machine_is_refused_with_the_reason(
    onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(MissingDependency, match=r"no package for aarch64 on .*own TensorRT"):
        build(onnx_path, tmp_path)


def test_a_missing_package_names_the_extra(onnx_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"'tensorrt_rtx' is not installed.*dm3d-deploy\[rtx\]"):
        build(onnx_path, tmp_path)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"\xff" * 64])
def test_a_broken_onnx_file(onnx_path: Path, damage: Any) -> None:
    onnx_path.write_bytes(damage(onnx_path.read_bytes()))
    with pytest.raises(EngineError, match="cannot be read as ONNX"):
        kernels_of(onnx_path)
    with pytest.raises(EngineError, match="cannot be read as ONNX"):
        kernels_of(onnx_path.parent / "absent.onnx")


def test_weights_in_other_files_are_refused(tmp_path: Path, weight: np.ndarray) -> None:
    path = tmp_path / "outside.onnx"
    onnx.save(conv_model(weight), str(path), save_as_external_data=True, size_threshold=0, location="weights.bin")
    with pytest.raises(EngineError, match="keeps 1 weights in other files, the first is 'w'"):
        kernels_of(path)


def test_precision_is_a_property_of_the_file(onnx_path: Path, tmp_path: Path) -> None:
    kernels = kernels_of(onnx_path)
    check_precision(onnx_path, kernels, "fp16")
    for wrong in ("fp32", "int8"):
        with pytest.raises(EngineError, match=f"was to be built as {wrong}, but .* are float16"):
            check_precision(onnx_path, kernels, wrong)
    with pytest.raises(UsageError, match=r"'fp61' is unknown.*did you mean 'fp16'"):
        check_precision(onnx_path, kernels, "fp61")
    with pytest.raises(EngineError, match="no convolution or linear layer with stored weights"):
        check_precision(onnx_path, {}, "fp16")


def test_an_int8_graph_may_keep_layers_in_float(onnx_path: Path) -> None:
    some = {"a": ("Conv", np.zeros((4, 4, 1, 1), np.int8)), "b": ("Conv", np.zeros((4, 4, 1, 1), np.float32))}
    check_precision(onnx_path, some, "int8")


def test_two_four_through_dequantisation(tmp_path: Path, weight: np.ndarray) -> None:
    model = conv_model(weight)
    quantised = two_four(np.ones((16, 16, 3, 3), np.int8))
    del model.graph.initializer[:]
    model.graph.initializer.extend(
        [numpy_helper.from_array(quantised, "w_q"), numpy_helper.from_array(np.ones((), np.float16), "s")]
    )
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["w_q", "s"], ["w"]))
    path = tmp_path / "int8.onnx"
    onnx.save(model, str(path))
    kernels = kernels_of(path)
    assert two_four_kernels(kernels) == ["w_q"]
    check_precision(path, kernels, "int8")


@pytest.mark.parametrize(
    ("operator", "shape", "axis", "legal"),
    [
        ("Conv", (3, 8, 3, 3), 1, True),
        ("ConvTranspose", (8, 3, 2, 2), 0, True),
        ("Conv", (8, 3, 3, 3), 0, False),  # the input channels are the other axis
        ("ConvTranspose", (3, 8, 2, 2), 1, False),
        ("Conv", (4, 6, 3, 3), 1, False),  # six channels make no groups of four
    ],
)
def test_two_four_runs_along_the_input_channels(operator: str, shape: tuple[int, ...], axis: int, legal: bool) -> None:
    kernel = np.ones(shape, np.float32)
    np.moveaxis(kernel, axis, 0)[::2] = 0
    assert (two_four_kernels({"w": (operator, kernel)}) == ["w"]) is legal


def test_three_of_four_in_one_group_are_too_many() -> None:
    kernel = np.zeros((2, 8, 1, 1), np.float32)
    kernel[1, 4:7] = 1
    assert two_four_kernels({"w": ("Conv", kernel)}) == []
    kernel[1, 5] = 0
    assert two_four_kernels({"w": ("Conv", kernel)}) == ["w"]


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        ("", ""),
        ("[INFO] fine\n[WARNING] so so\n", ""),
        (
            "[ERROR] IBuilder: API Usage Error (the cause)\n[ERROR] [x] Cuda Runtime (cudaError 35: driver)\n",
            "IBuilder: API Usage Error (the cause)",
        ),
        ("[ERROR] [x] Cuda Runtime (cudaError 35: noise first)\n[INTERNAL_ERROR] real\n", "real"),
        (
            '[ERROR] M.cpp:140: While parsing node number 3 [Add -> "y"]:\n[ERROR] --- Begin node ---\nname: a\n'
            "[ERROR] --- End node ---\n[ERROR] two\nlines\n",
            'two lines (While parsing node number 3 [Add -> "y"])',
        ),
    ],
)
def test_the_first_error_is_the_cause(tmp_path: Path, log: str, cause: str) -> None:
    path = tmp_path / "build.log"
    path.write_text(log)
    assert first_error(path) == cause
    assert first_error(tmp_path / "absent.log") == ""


def test_layers_of_a_log(tmp_path: Path) -> None:
    path = tmp_path / "build.log"
    path.write_text(
        "[VERBOSE] Layer: not this\n[VERBOSE] Layers:\n"
        "Name: a, b_0, LayerType: kgen, Inputs: [ { Name: x }], TacticName: t0, StreamId: 0, Metadata: \n"
        "Name: c, LayerType: correlation, Inputs: [], TacticName: t1, StreamId: 0, "
        "Metadata: [ONNX Layer: conv1][ONNX Layer: relu, 1]\n\n"
        "I/O Tensors:\n Name: x, LayerType: trap, IOMode: Input\n[INFO] Name: z, LayerType: trap, x\n"
    )
    assert layers_of_log(path) == [
        {"name": "a, b_0", "kind": "kgen", "tactic": "t0", "onnx_nodes": []},
        {"name": "c", "kind": "correlation", "tactic": "t1", "onnx_nodes": ["conv1", "relu, 1"]},
    ]


def test_an_engine_is_checked_before_anything_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "e.engine"
    with pytest.raises(StaleArtifact, match="is missing"):
        open_rtx_engine(path, "0" * 64)
    path.write_bytes(b"engine")
    digest = hashlib.sha256(b"engine").hexdigest()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)  # importing it would fail
    with pytest.raises(StaleArtifact, match="not the engine that was built: expected sha256 000000000000…"):
        open_rtx_engine(path, "0" * 64)
    monkeypatch.setattr(tensorrt_rtx, "gpu_here", lambda: None)
    with pytest.raises(EngineError, match="no NVIDIA GPU answers here"):
        open_rtx_engine(path, digest)


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_bytes_that_are_no_engine_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "e.engine"
    path.write_bytes(b"not an engine" * 100)
    monkeypatch.setattr(tensorrt_rtx, "gpu_here", lambda: "a GPU")
    with pytest.raises(EngineError, match="refused to load"):
        open_rtx_engine(path, hashlib.sha256(path.read_bytes()).hexdigest())
