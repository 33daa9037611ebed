"""The CUDA executor against a stand-in driver that records and executes nothing: arguments checked, not executed."""

import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from plan_sample import sample_plan, sample_with_cubins
from sparse3d_sample import backbone_of, clustered_cells, layer, padded, plain_frame

import engines
from benchmarks.sparse3d_gpu.replay import replay
from benchmarks.sparse3d_gpu.tools import write_case
from dm3d_deploy.errors import EngineError, UsageError
from engines.sparse3d.cuda_executor import CudaPlan
from engines.sparse3d.interpreter_worker import trace_of
from engines.sparse3d.plan import Cubin, add_cubins
from engines.sparse3d.planner import plan_backbone

SOURCE = Path(engines.__file__).parent / "sparse3d" / "runtime" / "testing" / "stand_in_cuda.cpp"
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
LETTERS = {"i32": "i", "i64": "l", "fp32": "f"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    library = tmp_path_factory.mktemp("driver") / "libcuda.so"
    subprocess.run(["g++", "-std=c++17", "-shared", "-fPIC", str(SOURCE), "-o", str(library)], check=True)
    return library


@pytest.fixture
def driver(built, tmp_path, monkeypatch):
    """A library of its own for each test: the stand-in reads its environment once."""
    monkeypatch.setenv("DM3D_CUDA_LOG", str(tmp_path / "log"))
    return shutil.copy(built, tmp_path / "libcuda.so")


def with_images(plan, sm=87):
    images = []
    for kernel in plan.kernels:
        kinds = "".join("p" if name.startswith("*") else LETTERS[name] for name in kernel.signature) + "pp"
        images.append(
            Cubin(symbol=kernel.name, image=b"\x7fELFdm3d" + kinds.encode() + b"\0", shared_bytes=512, threads=128,
                  hidden_params=2)
        )  # fmt: skip
    return add_cubins(plan, sm, images)


def told(log, plan):
    """The recorded steps in the words of the interpreter's trace."""
    lines = [line.split() for line in log]
    starts = [(int(words[1], 16), int(words[2])) for words in lines if words[0] == "alloc"]
    names = ["constants", *(item.name for item in (*plan.inputs, *plan.outputs)), "workspace"]

    def place(text):
        address = int(text, 16)
        (found,) = [
            [name, address - at] for name, (at, size) in zip(names, starts, strict=True) if at <= address < at + size
        ]
        return found

    rows = []
    for words in lines:
        if words[0] == "memset":
            rows.append(
                {"kernel": "memset", "grid": [], "args": [place(words[1]), int(words[2], 16), 4 * int(words[3])]}
            )
        elif words[0] == "launch":
            kernel, values = plan.kernels[int(words[1])], [word.split(":")[1] for word in words[6:]]
            args = []
            for dtype, value in zip(kernel.signature, values[:-2], strict=True):
                if dtype.startswith("*"):
                    args.append(place(value))
                else:
                    raw = int(value, 16).to_bytes(8, "little")
                    args.append(struct.unpack_from({"i32": "<i", "i64": "<q", "fp32": "<f"}[dtype], raw)[0])
            assert values[-2:] == ["0", "0"], "Triton's own parameters are null"
            assert words[3:5] == ["128,1,1", "512"]
            rows.append({"kernel": kernel.name, "grid": [int(size) for size in words[2].split(",")], "args": args})
    return rows


def test_a_planned_backbone_is_launched_as_the_interpreter_does(driver, tmp_path):
    rng = np.random.default_rng(0)
    grid = (8, 20, 20)
    layers = [layer(rng, "a", 16, 4, key="a"), layer(rng, "b", 32, 16, stride=(2, 2, 2), key="b")]
    backbone = backbone_of(layers, grid, 256, tmp_path)
    plan = with_images(
        plan_backbone(
            backbone, frame=plain_frame(grid, 256), capacities={"input": 200, "b": 256}, keep=("input.sites",)
        )
    )
    cells = clustered_cells(rng, grid, 100)
    with CudaPlan(plan, library=driver) as cuda:
        run = cuda.run(padded(np.ones((100, 4), np.float32), cells, 256))
    log = (tmp_path / "log").read_text().splitlines()
    assert told(log, plan) == trace_of(plan)
    assert run.outputs["bev"].shape == (1, 32 * 4, 10, 10)
    assert run.kept["input.sites"].shape == (200,)
    assert list(run.status) == [word.name for word in plan.status.words]
    assert list(run.status)[-3:] == ["cut-off", "input", "b"]
    allocated, freed = (sorted(line.split()[1] for line in log if line.startswith(word)) for word in ("alloc", "free"))
    assert allocated == freed


def test_times_are_those_of_a_graph_that_was_warm_when_it_was_captured(driver, tmp_path):
    plan = sample_with_cubins(87)
    with CudaPlan(plan, library=driver) as cuda:
        times = cuda.times_ms(7, graph=True, warm_up=3)
    assert times.tolist() == [1.0] * 7
    words = [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()]
    steps = ["launch" if hasattr(step, "kernel") else "memset" for step in plan.steps]
    told = [word for word in words if word in ("launch", "memset", "capture", "captured", "graph")]
    assert told == [*steps, "capture", *steps, "captured", *["graph"] * 10]


def test_times_without_a_graph_are_those_of_every_step(driver, tmp_path):
    plan = sample_with_cubins(87)
    with CudaPlan(plan, library=driver) as cuda:
        assert cuda.times_ms(2, graph=False, warm_up=1).tolist() == [1.0] * 2
    lines = (tmp_path / "log").read_text().splitlines()
    steps = [line for line in lines if line.startswith(("launch ", "memset "))]
    assert len(steps) == 4 * len(plan.steps)
    assert steps[: len(plan.steps)] == steps[-len(plan.steps) :]
    assert not [line for line in lines if line.startswith(("capture", "graph"))]


def test_a_replayed_case_is_compared_with_what_is_expected(driver, tmp_path):
    plan = sample_with_cubins(87)
    features = np.zeros((4, 3), np.float32)
    outputs = {"bev": np.zeros((1, 2, 3, 4), np.float16), "status": np.zeros(4, np.int32)}  # nothing is executed
    assert replay(write_case(tmp_path / "right", plan, {"features": features}, outputs), driver)
    other = {**outputs, "status": np.ones(4, np.int32)}
    assert not replay(write_case(tmp_path / "wrong", plan, {"features": features}, other), driver)


def test_a_plan_for_another_gpu_is_refused(driver):
    with pytest.raises(EngineError, match="this GPU is sm_87 and the plan is compiled for sm_110"):
        CudaPlan(with_images(sample_plan(), 110), library=driver)
    with pytest.raises(EngineError, match="compiled for no GPU"):
        CudaPlan(sample_plan(), library=driver)


def test_no_driver_and_a_failing_driver_are_told(driver, monkeypatch):
    with pytest.raises(EngineError, match="the CUDA driver cannot be loaded"):
        CudaPlan(sample_with_cubins(87), library="libcuda_that_is_absent.so.1")
    monkeypatch.setenv("DM3D_CUDA_FAIL", "cuInit")
    with pytest.raises(EngineError, match="answers cuInit with error 100"):
        CudaPlan(sample_with_cubins(87), library=driver)


def test_a_frame_for_another_plan_is_refused(driver):
    with CudaPlan(sample_with_cubins(87), library=driver) as cuda, pytest.raises(UsageError, match="the plan takes"):
        cuda.run({"features": np.zeros(3, np.float32)})
