"""The interpreter's own refusals: stray addresses, wrong inputs, a missing package, a child that fails or hangs."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from sparse3d_sample import backbone_of, clustered_cells, layer, padded, plain_frame

from dm3d_deploy.errors import EngineError, MissingDependency, UsageError
from engines.sparse3d.interpreter import interpret
from engines.sparse3d.interpreter_worker import trace_of
from engines.sparse3d.plan import I32, Launch, Pointer
from engines.sparse3d.planner import plan_backbone
from engines.sparse3d.shapes import WIDE

pytest.importorskip("triton")
GRID = (6, 12, 12)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    rng = np.random.default_rng(0)
    layers = [layer(rng, "a", 16, 4, key="a"), layer(rng, "b", 16, 16, stride=(2, 2, 2), key="b")]
    backbone = backbone_of(layers, GRID, 128, tmp_path_factory.mktemp("onnx"))
    return plan_backbone(
        backbone, frame=plain_frame(GRID, 128), capacities={"input": 128, "b": 192}, shapes=WIDE, keep=("a", "b")
    )


@pytest.fixture(scope="module")
def feed():
    cells = clustered_cells(np.random.default_rng(0), GRID, 60)
    return padded(np.ones((60, 4), np.float32), cells, 128)


def with_step(plan, function, change):
    """The plan whose first launch of a kernel is another."""
    steps = list(plan.steps)
    for number, step in enumerate(steps):
        if isinstance(step, Launch) and plan.kernels[step.kernel].function.endswith(function):
            steps[number] = replace(step, args=tuple(change(list(step.args))))
            return replace(plan, steps=tuple(steps))
    raise AssertionError(function)


def test_the_trace_is_that_of_the_plan(plan, feed):
    told = interpret(plan, [feed])
    assert list(told.trace) == trace_of(plan)
    assert len(told.trace) == len(plan.steps)
    assert told.runs[0].outputs["bev"].any()


def more_rows(args):
    """A capacity beyond the array, the first of the numbers."""
    first = next(place for place, arg in enumerate(args) if not isinstance(arg, Pointer))
    args[first] = I32(10**6)
    return args


def other_features(args):
    """Input rows of a smaller array."""
    args[0] = args[6]
    return args


@pytest.mark.parametrize(
    ("function", "change"),
    [("conv_tile_list", more_rows), ("rulebook", more_rows), ("conv_tile_list", other_features)],
)
def test_an_address_outside_the_arrays_of_a_launch_ends_the_run(plan, feed, function, change):
    with pytest.raises(EngineError, match="addresses lie outside the arrays of the launch"):
        interpret(with_step(plan, function, change), [feed])


def test_inputs_of_another_plan_are_refused(plan, feed):
    with pytest.raises(UsageError, match="the plan takes"):
        interpret(plan, [feed | {"features": feed["features"].astype(np.float64)}])
    with pytest.raises(UsageError, match="the plan takes"):
        interpret(plan, [{"coords": feed["coords"]}])


def test_a_kernel_that_does_not_exist_ends_in_one_sentence(plan, feed):
    kernels = (replace(plan.kernels[0], function="kernels_index.nothing"), *plan.kernels[1:])
    with pytest.raises(EngineError, match=r"ended with code 1: .*no attribute 'nothing'"):
        interpret(replace(plan, kernels=kernels), [feed])


def test_a_child_that_hangs_is_stopped(plan, feed):
    with pytest.raises(EngineError, match=r"did not finish within 0\.01 s"):
        interpret(plan, [feed], timeout_s=0.01)


def test_a_missing_package_is_named_with_its_extra(plan, feed, monkeypatch, tmp_path):
    (tmp_path / "triton.py").write_text("raise ModuleNotFoundError(\"No module named 'triton'\", name='triton')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingDependency, match=r"dm3d-deploy\[sparse3d\]"):
        interpret(plan, [feed])
