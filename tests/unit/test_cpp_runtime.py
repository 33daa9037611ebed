"""The C++ runtime against a stand-in libcuda that records and executes nothing: arguments checked, not executed.

It is built with the address and undefined-behaviour sanitizers and with warnings as errors.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plan_sample import random_plan, sample_images, sample_plan, sample_with_cubins
from run_sample import points_of

import engines
from benchmarks.sparse3d_gpu.cases import Case
from dm3d_deploy.pointcloud import PointCloud
from engines.sparse3d.interpreter_worker import trace_of
from engines.sparse3d.plan import F32, Binding, Buffer, Launch, Memset, Plan, Pointer
from engines.sparse3d.plan_file import decode_plan, encode_plan, write_plan

RUNTIME = Path(str(engines.__file__)).parent / "sparse3d" / "runtime"
NO_TOOLS = shutil.which("cmake") is None or shutil.which("g++") is None
pytestmark = pytest.mark.skipif(NO_TOOLS, reason="needs cmake and g++")


@dataclass(frozen=True)
class Launched:
    """One recorded step, addresses told as in the interpreter's trace: [space, byte]."""

    kernel: str
    grid: list[int]
    args: list[Any]
    threads: int = 0
    shared: int = 0
    hidden: tuple[int, ...] = ()


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built once for all workers of a run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "runtime"
    folder.mkdir(exist_ok=True)
    headers = RUNTIME / "testing" / "tensorrt"
    options = ["-DDM3D_TESTS=ON", "-DDM3D_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=None", f"-DTENSORRT_ROOT={headers}"]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            ["cmake", "-S", str(RUNTIME), "-B", str(folder), *options],
            ["cmake", "--build", str(folder), "--parallel", "2"],
        ):
            made = subprocess.run(command, capture_output=True, text=True, check=False)
            assert made.returncode == 0, made.stdout + made.stderr
            assert "warning" not in made.stdout + made.stderr
    return folder


def call(build: Path, program: str, *words: Any, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(build), **variables}
    command = [str(build / f"dm3d_{program}"), *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def run_frame(build: Path, folder: Path, plan: Plan, inputs: Mapping[str, bytes]) -> list[str]:
    """The log of one frame in the example program."""
    write_plan(folder / "plan", plan)
    (folder / "frame").mkdir()
    for name, data in inputs.items():
        (folder / "frame" / f"{name}.bin").write_bytes(data)
    done = call(build, "run_plan", folder / "plan", folder / "out", folder / "frame", DM3D_CUDA_LOG=str(folder / "log"))
    assert done.returncode == 0, done.stdout + done.stderr
    return (folder / "log").read_text().splitlines()


def zeros(plan: Plan) -> dict[str, bytes]:
    return {binding.name: bytes(plan.buffers[binding.buffer].bytes) for binding in plan.inputs}


def recorded(log: Sequence[str], plan: Plan) -> list[Launched]:
    """The steps in a log, each address told by what it lies in; allocations come in the order of the example."""
    bindings = [*plan.inputs, *plan.outputs]
    names = [*(["constants"] if plan.constants else []), *(item.name for item in bindings), "workspace"]
    allocated = [line.split()[1:] for line in log if line.startswith("alloc ")]
    spaces = {name: (int(at, 16), int(size)) for name, (at, size) in zip(names, allocated, strict=True)}
    return [_step(line.split(), plan, spaces) for line in log if line.startswith(("launch ", "memset "))]


def _step(words: list[str], plan: Plan, spaces: Mapping[str, tuple[int, int]]) -> Launched:
    if words[0] == "memset":
        at, word, count, _ = words[1:]
        return Launched("memset", [], [_place(int(at, 16), spaces), int(word, 16), 4 * int(count)])
    kernel = plan.kernels[int(words[1])]
    values = [word.split(":") for word in words[6:]]
    types = [*kernel.signature, *["*hidden"] * (len(values) - len(kernel.signature))]
    args = []
    for (size, value), dtype in zip(values, types, strict=True):
        assert int(size) == {"i32": 4, "fp32": 4}.get(dtype, 8)
        raw = int(value, 16).to_bytes(int(size), "little")
        if dtype == "*hidden":
            args.append(int(value, 16))
        elif dtype.startswith("*"):
            args.append(_place(int(value, 16), spaces))
        else:
            args.append(struct.unpack({"i32": "<i", "i64": "<q", "fp32": "<f"}[dtype], raw)[0])
    known = len(kernel.signature)
    threads, y, z = map(int, words[3].split(","))
    assert (y, z, words[5]) == (1, 1, "0x57")
    grid = [int(size) for size in words[2].split(",")]
    return Launched(kernel.name, grid, args[:known], threads, int(words[4]), tuple(args[known:]))


def _place(address: int, spaces: Mapping[str, tuple[int, int]]) -> list[Any]:
    (found,) = [[name, address - at] for name, (at, size) in spaces.items() if at <= address < at + size]
    return found


def as_trace(steps: Sequence[Launched]) -> list[dict[str, Any]]:
    return [{"kernel": step.kernel, "grid": step.grid, "args": step.args} for step in steps]


def walked(plan: Plan, sm: int) -> Iterator[Launched]:
    """The same steps, from the plan alone."""

    def place(buffer: int, offset: int) -> list[Any]:
        found = plan.buffers[buffer]
        space = {"workspace": "workspace", "constant": "constants"}.get(found.kind, found.name)
        return [space, found.offset + offset]

    for step in plan.steps:
        if isinstance(step, Memset):
            yield Launched("memset", [], [place(step.buffer, step.offset), step.value, step.bytes])
            continue
        cubin = plan.cubins[sm][step.kernel]
        args = [place(arg.buffer, arg.offset) if isinstance(arg, Pointer) else arg.value for arg in step.args]
        nothing = (0,) * cubin.hidden_params
        name = plan.kernels[step.kernel].name
        yield Launched(name, list(step.grid), args, cubin.threads, cubin.shared_bytes, nothing)


def test_steps_are_those_of_the_plan(build: Path, tmp_path: Path) -> None:
    plan = sample_with_cubins(87, 110)
    log = run_frame(build, tmp_path, plan, zeros(plan))
    found = recorded(log, plan)
    assert found == list(walked(plan, 87))
    assert len(found) == 5
    assert "attribute 0 8 50000" in log
    assert not [line for line in log if line.startswith("attribute 1")]


def test_a_wrong_step_would_be_seen(build: Path, tmp_path: Path) -> None:
    plan = sample_with_cubins(87)
    launch = plan.steps[1]
    assert isinstance(launch, Launch)
    other = replace(launch, args=(*launch.args[:5], F32(0.2)))
    log = run_frame(build, tmp_path, replace(plan, steps=(plan.steps[0], other, *plan.steps[2:])), zeros(plan))
    assert recorded(log, plan) != list(walked(plan, 87))


def test_outputs_and_status_are_written(build: Path, tmp_path: Path) -> None:
    plan = sample_with_cubins(87)
    filled = replace(
        plan, steps=(Memset(buffer=4, offset=4, bytes=8, value=7), Memset(buffer=5, offset=4, bytes=4, value=61))
    )
    write_plan(tmp_path / "plan", filled)
    (tmp_path / "frame").mkdir()
    (tmp_path / "frame" / "features.bin").write_bytes(bytes(48))
    done = call(build, "run_plan", tmp_path / "plan", tmp_path / "out", tmp_path / "frame")
    assert done.stdout.splitlines() == [
        "frame flags=1", "  count input=0 capacity=100", "  count conv2=61 capacity=60", "  dropped outside the grid=0",
        "  cutoff_m range=0",
    ]  # fmt: skip
    bev = np.fromfile(tmp_path / "out" / "frame" / "bev.bin", np.int32)
    assert bev.tolist() == [0, 7, 7] + [0] * 9


def test_everything_allocated_is_freed(build: Path, tmp_path: Path) -> None:
    plan = sample_with_cubins(87)
    log = run_frame(build, tmp_path, plan, zeros(plan))
    allocated = [line.split()[1] for line in log if line.startswith("alloc ")]
    assert sorted(allocated) == sorted(line.split()[1] for line in log if line.startswith("free "))
    assert log.count("unload") == len(plan.kernels)


def test_the_plan_is_described_without_a_driver(build: Path, tmp_path: Path) -> None:
    write_plan(tmp_path / "plan", sample_plan())
    done = call(build, "run_plan", tmp_path / "plan", LD_LIBRARY_PATH="")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "workspace 1500 bytes",
        "input features fp32 48 bytes",
        "output bev fp16 48 bytes",
        "output status i32 16 bytes",
    ]


@pytest.mark.parametrize("seed", range(8))
def test_what_python_writes_is_run(build: Path, tmp_path: Path, seed: int) -> None:
    plan = random_plan(np.random.default_rng(seed))
    assert decode_plan(encode_plan(plan)) == plan
    log = run_frame(build, tmp_path, plan, zeros(plan))
    assert recorded(log, plan) == list(walked(plan, 87))


def test_every_refusal_of_the_interface(build: Path, tmp_path: Path) -> None:
    write_plan(tmp_path / "plan", sample_with_cubins(87, 120))
    done = call(build, "check_runtime", tmp_path / "plan")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(" checks, 0 failures\n")
    assert int(done.stdout.split()[0]) > 50


def test_the_tensorrt_plugin_does_what_is_asked_of_it(build: Path, tmp_path: Path) -> None:
    """Against declarations of our own, not TensorRT."""
    plan = sample_with_cubins(87)
    write_plan(tmp_path / "plan", plan)
    sites = Binding(name="sites", dtype="i64", shape=(3, 2), buffer=len(plan.buffers))
    buffers = (*plan.buffers, Buffer(name="sites", offset=0, bytes=48, kind="output"))
    write_plan(tmp_path / "sites", replace(plan, buffers=buffers, outputs=(*plan.outputs, sites)))
    done = call(build, "check_tensorrt", tmp_path / "plan", tmp_path / "sites")
    assert (done.returncode, done.stdout) == (0, "0 failures\n"), done.stderr


@pytest.mark.parametrize(
    ("damage", "code", "sentence"),
    [
        (lambda data: data[:-1], 12, "it should have"),
        (lambda data: data[:300] + bytes([data[300] ^ 4]) + data[301:], 12, "do not have the digest"),
        (lambda data: data[:12] + b"\x09" + data[13:], 13, "needs a reader of version 9; this one reads 1"),
        (lambda data: b"", 12, "its 0 bytes do not begin like a launch plan"),
        (lambda data: data[:4], 12, "its 4 bytes do not begin like a launch plan"),
    ],
)
def test_damaged_files_are_refused(build: Path, tmp_path: Path, damage: Any, code: int, sentence: str) -> None:
    (tmp_path / "plan").write_bytes(damage(encode_plan(sample_with_cubins(87))))
    done = call(build, "run_plan", tmp_path / "plan")
    assert (done.returncode, done.stderr.count("\n")) == (code, 1)
    assert sentence in done.stderr


def test_bad_frames_and_another_gpu_are_refused(build: Path, tmp_path: Path) -> None:
    write_plan(tmp_path / "plan", sample_with_cubins(87))
    (tmp_path / "frame").mkdir()
    words = (tmp_path / "plan", tmp_path / "out", tmp_path / "frame")
    assert "features.bin cannot be read" in call(build, "run_plan", *words).stderr
    (tmp_path / "frame" / "features.bin").write_bytes(bytes(47))
    assert "features.bin has 47 bytes where the plan wants 48" in call(build, "run_plan", *words).stderr
    done = call(build, "run_plan", *words, DM3D_CUDA_SM="110")
    assert (done.returncode, "this GPU is sm_110, the plan holds kernels for: sm_87" in done.stderr) == (14, True)
    assert call(build, "run_plan", *words[:2]).returncode == 2


def test_mutated_plans_never_crash_it(build: Path, tmp_path: Path) -> None:
    write_plan(tmp_path / "plan", sample_with_cubins(87, 110))
    done = call(build, "fuzz_plan", tmp_path / "plan", 10000, 1, DM3D_CUDA_QUIET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("10000 mutated plans, no crash\n")


def test_only_the_c_interface_is_exported(build: Path) -> None:
    told = subprocess.run(
        ["nm", "-D", "--defined-only", build / "libdm3d_plan.so"], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1] for line in told.stdout.splitlines() if " T " in line}
    declared = {"load", "prepare", "workspace_bytes", "binding_count", "binding", "enqueue", "status", "destroy"}
    assert names == {f"dm3d_plan_{name}" for name in declared} | {"dm3d_result_text", "dm3d_last_error"}


def test_real_images_take_the_arguments_that_are_passed(
    build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in reads number and size of a kernel's parameters from the compiled image."""
    pytest.importorskip("triton")
    from engines.sparse3d.aot import compile_plan

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    sample = sample_plan()
    scale = replace(
        sample.kernels[0],
        function="kernels_sample.scale",
        signature=("*fp16", "*fp16", "i32", "fp32"),
        constexprs={"BLOCK": 128, "SHIFT": 0.5},
    )
    launch = Launch(kernel=0, grid=(3, 1, 1), args=(Pointer(0), Pointer(4), sample.steps[1].args[3], F32(2.5)))
    plan, _ = compile_plan(replace(sample, kernels=(scale,), steps=(launch,)), (87, 120), package="aot_sample")
    for sm in (87, 120):
        monkeypatch.setenv("DM3D_CUDA_SM", str(sm))
        (folder := tmp_path / str(sm)).mkdir()
        assert recorded(run_frame(build, folder, plan, zeros(plan)), plan) == list(walked(plan, sm))


def test_a_whole_backbone_is_launched_as_the_interpreter_launches_it(build: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from sparse3d_sample import backbone_of, layer, padded, plain_frame

    from engines.sparse3d.interpreter import interpret
    from engines.sparse3d.planner import plan_backbone
    from engines.sparse3d.shapes import WIDE

    rng = np.random.default_rng(5)
    layers = [
        layer(rng, "conv_input", 16, 4, key="subm1"),
        layer(rng, "down", 32, 16, stride=(2, 2, 2), key="down"),
        layer(rng, "conv", 32, 32, key="subm2", dead=0.5),
        layer(rng, "out", 32, 32, kernel=(3, 1, 1), stride=(2, 1, 1), padding=(0, 0, 0), submanifold=False, key="out"),
    ]
    grid, rows = (9, 16, 16), 64
    backbone = backbone_of(layers, grid, rows, tmp_path)
    frame = plain_frame(grid, rows)
    capacities = {stage.name: rows for stage in backbone.stages}
    plan = plan_backbone(backbone, frame=frame, capacities=capacities, precision="fp16", shapes=WIDE)
    cells = np.array([[1, 2, 3], [4, 8, 8]])
    inputs = padded(rng.normal(size=(2, 4)).astype(np.float32), cells, rows)
    trace = interpret(plan, [inputs]).trace
    built = sample_images(plan, 87)
    log = run_frame(build, tmp_path, built, {name: array.tobytes() for name, array in inputs.items()})
    assert as_trace(recorded(log, built)) == list(trace)
    assert len(trace) > 20


CASES = [
    ("centerpoint", 21, 1.0, False), ("centerpoint", 21, 0.5, False), ("centerpoint", 21, 0.5, True),
    ("voxelnext", 32, 0.5, True), ("pv-rcnn", 12, 0.5, False),
]  # fmt: skip


@pytest.mark.parametrize(("model", "layers", "kept", "points"), CASES)
def test_all_of_a_model_is_described_and_launched_as_the_interpreter_does(
    build: Path, tmp_path: Path, model: str, layers: int, kept: float, points: bool
) -> None:
    """Dense and with half of the tiles, with the rows of a second stage: nothing is executed, so they cost little."""
    columns = ("x", "y", "z", "intensity", "timestamp")[: 4 if model == "pv-rcnn" else 5]
    cloud = PointCloud(points=points_of(0, columns=len(columns)), columns=columns)
    case = Case(model=model, kept=kept, cloud=cloud)
    plan = sample_images(case.plan("fp16", points=points), 87)
    assert len(plan.layers) == layers
    assert any(layer.tiles_kept < layer.tiles_total for layer in plan.layers) == (kept < 1)
    log = run_frame(build, tmp_path, plan, {name: array.tobytes() for name, array in case.feed(points=points).items()})
    assert as_trace(recorded(log, plan)) == trace_of(plan)
    told = call(build, "run_plan", tmp_path / "plan", LD_LIBRARY_PATH="").stdout.splitlines()
    outputs = {item.name: (item.dtype, plan.buffers[item.buffer].bytes) for item in plan.outputs}
    assert {f"output {name} {dtype} {size} bytes" for name, (dtype, size) in outputs.items()} < set(told)
    written = {path.stem: path.stat().st_size for path in (tmp_path / "out" / "frame").iterdir()}
    assert written == {name: size for name, (_, size) in outputs.items()}
    assert len(outputs) == (2 + 2 * 4 if model == "pv-rcnn" else 2)


def test_the_runtime_needs_no_cuda_headers() -> None:
    sources = [path.read_text() for path in RUNTIME.rglob("*") if path.suffix in (".h", ".hpp", ".cpp")]
    assert len(sources) > 8
    assert not [text for text in sources if "#include <cuda" in text]
