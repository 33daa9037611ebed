"""The contracts of pruning refuse to be born wrong."""

import re
from typing import Any

import numpy as np
import pytest

from dm3d_deploy.errors import FrameError, InternalError, UsageError
from dm3d_deploy.pruning.contracts import Allocation, Budget, Choice, Curve, Layer, WeightMask
from dm3d_deploy.pruning.normalisation import OutputScale, output_distortion, output_scale, sigmoid, top_cells


def layer(**changes: Any) -> Layer:
    fields = {"name": "x", "part": "3d", "kind": "sparse", "shape": (8, 3, 1, 1, 4), "positions": np.ones(3)}
    return Layer(**{**fields, **changes})


def test_what_a_layer_knows() -> None:
    some = layer(positions=np.array([1.0, 2.5, 3.0]))
    assert (some.inputs, some.outputs, some.kernel, some.taps, some.weights) == (4, 8, (3, 1, 1), 3, 96)
    assert some.macs == 6.5 * 32
    conv = layer(part="2d", kind="conv2d", shape=(8, 4, 3, 2), positions=np.ones(6))
    deconv = layer(part="2d", kind="deconv2d", shape=(8, 4, 3, 2), positions=np.ones(6))
    assert (conv.inputs, conv.outputs, deconv.inputs, deconv.outputs) == (4, 8, 8, 4)
    assert conv.macs == deconv.macs == 192


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"part": "4d"}, "no such part or kind of layer: '4d'"),
        ({"kind": "conv4d"}, "no such part or kind"),
        ({"shape": (8, 3, 4)}, "is no sparse weight"),
        ({"shape": (8, 0, 1, 1, 4)}, "is no sparse weight"),
        ({"positions": np.ones(2)}, "do not fit 3 taps"),
        ({"positions": np.ones(3, np.float32)}, "type float32 do not fit"),
        ({"positions": np.array([1, -1.0, 1])}, "finite and not negative"),
        ({"positions": np.array([1, np.nan, 1])}, "finite and not negative"),
    ],
)
def test_layers(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InternalError, match=re.escape(text)):
        layer(**changes)


def curve(**changes: Any) -> Curve:
    fields = {"layer": "x", "pattern": "tile", "ratio": [0.0, 0.5], "distortion": [0.0, 1.0], "cost": [4.0, 2.0]}
    fields |= changes
    return Curve(**{key: np.array(value) if isinstance(value, list) else value for key, value in fields.items()})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"pattern": "blocks"}, "no such pattern or unit"),
        ({"unit": "ms"}, "no such pattern or unit 'ms'"),
        ({"ratio": []}, "curve arrays disagree"),
        ({"cost": [4.0]}, "curve arrays disagree"),
        ({"distortion": [0.0, np.nan]}, "must be finite"),
        ({"ratio": [0.5, 0.4]}, "must rise"),
        ({"ratio": [0.5, 1.4]}, "must rise"),
        ({"distortion": [2.0, 1.0]}, "must not fall"),
        ({"cost": [2.0, 4.0]}, "must not rise"),
        ({"distortion": [0.1, 1.0]}, "nothing pruned, yet the distortion is 0.1"),
    ],
)
def test_curves(changes: dict[str, Any], text: str) -> None:
    curve()
    with pytest.raises(InternalError, match=re.escape(text)):
        curve(**changes)


@pytest.mark.parametrize("value", [0.0, -0.5, 1.01, 50, float("nan")])
def test_targets_outside_0_to_1(value: float) -> None:
    with pytest.raises(UsageError, match=rf"The target {re.escape(f'{value:g}')} is no share .*--target"):
        Budget(value=value, denominator=1.0)


def test_budgets() -> None:
    assert Budget(value=0.25, denominator=8.0, scope="model").limit == 2
    with pytest.raises(InternalError, match="no such scope or unit of a budget: 'head'"):
        Budget(value=0.5, denominator=1.0, scope="head")
    with pytest.raises(InternalError, match="finite and positive, not 0"):
        Budget(value=0.5, denominator=0.0)


def choice(**changes: Any) -> Choice:
    fields = {"layer": "x", "pattern": "tile", "step": 1, "ratio": 0.5, "distortion": 2.0, "cost": 3.0}
    return Choice(**{**fields, **changes})


def allocation(**changes: Any) -> Allocation:
    fields = {"choices": (choice(),), "distortion": 2.0, "cost": 3.0, "lower_bound": 1.5}
    return Allocation(**{**fields, "budget": Budget(value=0.5, denominator=6.0), **changes})


def test_allocations() -> None:
    some = allocation()
    assert (some.share, some.gap, some.choice("x").step) == (0.5, 0.25, 1)
    assert allocation(lower_bound=2.5).gap == 0
    assert allocation(distortion=0.0, lower_bound=0.0).gap == 0
    assert allocation(cost=3.0 * (1 + 1e-13)).cost > 3
    with pytest.raises(InternalError, match="no choice was made for the layer y"):
        some.choice("y")
    for changes, text in (
        ({"cost": 3.0 * (1 + 1e-11)}, "exceeds its budget of 3"),
        ({"cost": float("nan")}, "exceeds its budget"),
        ({"choices": ()}, "needs one choice per layer"),
        ({"choices": (choice(), choice())}, "not 2 for 1"),
        ({"lower_bound": float("-inf")}, "must be finite"),
    ):
        with pytest.raises(InternalError, match=text):
            allocation(**changes)
    for changes in ({"ratio": 1.5}, {"distortion": -1.0}, {"cost": float("inf")}):
        with pytest.raises(InternalError, match="make no choice"):
            choice(**changes)


def test_masks() -> None:
    assert WeightMask(layer="x", pattern="tile", keep=np.array([True, False, False, True])).density == 0.5
    for keep in (np.ones(3), np.ones(0, dtype=bool)):
        with pytest.raises(InternalError, match="a mask holds booleans"):
            WeightMask(layer="x", pattern="tile", keep=keep)


def maps(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"0.hm": rng.normal(size=(1, 1, 8, 8)), "0.dim": rng.normal(size=(1, 3, 8, 8))}


def test_sigmoid_at_the_ends() -> None:
    ends = sigmoid(np.array([-1e4, -40.0, 0.0, 40.0, 1e4], dtype=np.float32))
    assert ends[0] == 0
    assert ends[1] == pytest.approx(np.exp(-40), rel=1e-12)
    assert ends[2] == 0.5
    assert ends[4] == 1


def test_the_same_outputs_have_no_distortion() -> None:
    scale = output_scale([maps()], 40)
    assert output_distortion(maps(), maps(), scale, top_cells(maps(), 40)) == 0


def test_outputs_without_scale_are_refused() -> None:
    with pytest.raises(FrameError, match="there are no calibration frames"):
        output_scale([])
    with pytest.raises(InternalError, match="give no scale"):
        OutputScale(score_energy=0.0, box_deviation={"0.dim": np.ones(3)}, box_cells=4, frames=1, pooled=())
    with pytest.raises(InternalError, match=r"deviations of 0\.dim must be finite and positive"):
        OutputScale(score_energy=1.0, box_deviation={"0.dim": np.zeros(3)}, box_cells=4, frames=1, pooled=())


def test_outputs_that_cannot_be_compared_are_refused() -> None:
    scale, cells = output_scale([maps()], 40), top_cells(maps(), 40)
    with pytest.raises(InternalError, match="differ in their maps"):
        output_distortion(maps(), {"0.hm": maps()["0.hm"]}, scale, cells)
    with pytest.raises(InternalError, match="differ in their maps"):
        output_distortion(maps(), maps() | {"0.dim": np.zeros((1, 2, 8, 8))}, scale, cells)
    with pytest.raises(InternalError, match="by no finite number"):
        output_distortion(maps(), maps() | {"0.dim": np.full((1, 3, 8, 8), np.nan)}, scale, cells)
    with pytest.raises(InternalError, match="without NaN"):
        top_cells(maps() | {"0.hm": np.full((1, 1, 8, 8), np.nan)}, 40)
