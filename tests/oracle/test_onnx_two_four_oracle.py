"""2:4 verdicts against a walk over every group of four, one weight at a time."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from exporters.graph_checks import sparsity_of


def graph_with(kind, weight):
    node = helper.make_node(kind, ["x", "w"], ["y"], name="layer")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    graph = helper.make_graph([node], "g", values[:1], values[1:], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph)


def crowded_groups(kind, weight):
    """By the definition: four neighbouring input channels of one output channel and one kernel cell."""
    first, second, height, width = weight.shape
    inputs, outputs = (second, first) if kind == "Conv" else (first, second)
    found = 0
    for k, r, s, start in itertools.product(range(outputs), range(height), range(width), range(0, inputs, 4)):
        group = [
            weight[k, c, r, s] if kind == "Conv" else weight[c, k, r, s] for c in range(start, min(start + 4, inputs))
        ]
        found += sum(1 for value in group if value != 0) > 2
    return inputs, found


@settings(max_examples=150)
@given(data=st.data())
def test_every_group_of_four_is_judged(data):
    kind = data.draw(st.sampled_from(["Conv", "ConvTranspose"]))
    shape = [data.draw(st.integers(1, 9)) for _ in range(2)] + [data.draw(st.integers(1, 3)) for _ in range(2)]
    axis = 1 if kind == "Conv" else 0
    if data.draw(st.booleans()):
        shape[axis] = 4 * data.draw(st.integers(1, 2))
    rng = np.random.default_rng(data.draw(st.integers(0, 9999)))
    weight = rng.normal(size=shape).astype(np.float32)
    if data.draw(st.booleans()):  # make it legal, then perhaps spoil one weight
        channels = np.moveaxis(weight, axis, 0)
        channels[0::4] = 0
        channels[3::4] = 0
        if data.draw(st.booleans()):
            place = tuple(int(rng.integers(size)) for size in shape)
            weight[place] = 1
    (verdict,) = sparsity_of(graph_with(kind, weight))
    inputs, crowded = crowded_groups(kind, weight)
    assert verdict.legal == (inputs % 4 == 0 and crowded == 0)
    assert verdict.zeros == float((weight == 0).sum()) / weight.size
    assert verdict.shape == tuple(shape)
    if inputs % 4:
        assert f"{inputs} input channels do not come in fours" in verdict.reason
    elif crowded:
        assert verdict.reason.startswith(f"{crowded} of {weight.size // 4} groups hold more than two weights")
