"""Packed head branches compute what separate ones do, and what can not be packed exactly stays as it is."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from dm3d_deploy.steps.report_layers import verdicts_by_layer
from exporters.graph_checks import sparsity_of
from exporters.head_merge import merge_heads


def conv(weights, name, source, output, weight, **attributes):
    weights[f"{name}.weight"] = weight.astype(np.float32)
    weights[f"{name}.bias"] = np.linspace(-1, 1, len(weight)).astype(np.float32)
    inputs = [source, f"{name}.weight", f"{name}.bias"]
    return helper.make_node("Conv", inputs, [output], name=name, kernel_shape=[3, 3], **{"pads": [1] * 4, **attributes})


def head(widths, *, seed=0, hidden=8, two_four=(), **attributes):
    """One branch of Conv, Relu and Conv for each of `widths` outputs; attributes of the last branch's first Conv."""
    rng = np.random.default_rng(seed)
    weights, nodes, outputs = {}, [], []
    for number, width in enumerate(widths):
        first = rng.normal(size=(hidden + number, 8, 3, 3))
        if number in two_four:
            first.reshape(len(first), 2, 4, 3, 3)[:, :, 1:3] = 0
        extra = attributes if number == len(widths) - 1 else {}
        nodes.append(conv(weights, f"h{number}", "x", f"h{number}", first, **extra))
        nodes.append(helper.make_node("Relu", [f"h{number}"], [f"r{number}"], name=f"r{number}"))
        last = rng.normal(size=(width, hidden + number, 3, 3))
        nodes.append(conv(weights, f"f{number}", f"r{number}", f"b_{number}", last))
        outputs.append(helper.make_tensor_value_info(f"b_{number}", TensorProto.FLOAT, None))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 6, 5])]
    stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "head", inputs, outputs, stored)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    return onnx.shape_inference.infer_shapes(model)


def run(model):
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(9).normal(size=(1, 8, 6, 5)).astype(np.float32)
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, {"x": x}), strict=True))


def packs(model):
    return [node.output[:] for node in model.graph.node if node.op_type == "Split"]


@pytest.mark.parametrize("seed", range(5))
def test_packs_compute_what_branches_do(seed):
    widths = np.random.default_rng(seed).integers(1, 5, 7).tolist()
    model = head(widths, seed=seed)
    merged = merge_heads(model)
    before, after = run(model), run(merged)
    assert list(before) == list(after)
    for name, value in before.items():
        assert np.abs(after[name] - value).max() <= 1e-5 * np.abs(value).max(), name
    assert len(merged.graph.node) < len(model.graph.node)
    for pack in packs(merged):
        assert sum(widths[int(name.removeprefix("b_"))] for name in pack) <= 8


def test_packs_fill_eight_outputs_in_order():
    assert packs(merge_heads(head([2, 1, 3, 2, 2, 1, 8, 1]))) == [["b_0", "b_1", "b_2", "b_3"], ["b_4", "b_5"]]


def test_the_given_graph_is_left_alone():
    model = head([2, 2])
    before = model.SerializeToString(deterministic=True)
    merge_heads(model)
    assert model.SerializeToString(deterministic=True) == before


def test_branches_that_differ_are_not_packed():
    assert packs(merge_heads(head([2, 2, 2], dilations=[2, 2], pads=[2, 2, 2, 2]))) == [["b_0", "b_1"]]
    assert packs(merge_heads(head([2, 2], strides=[2, 2]))) == []
    assert packs(merge_heads(head([2]))) == []


def test_a_hidden_tensor_that_others_read_is_not_packed():
    model = head([2, 2, 2])
    model.graph.output.append(helper.make_tensor_value_info("r2", TensorProto.FLOAT, [1, 10, 6, 5]))
    merged = merge_heads(model)
    assert packs(merged) == [["b_0", "b_1"]]
    before, after = run(model), run(merged)
    assert all(np.allclose(before[name], after[name], rtol=1e-5, atol=1e-5) for name in before)


def test_a_dense_branch_does_not_take_2_4_from_the_others():
    merged = merge_heads(head([2, 2, 2, 2], two_four=(0, 1)))
    assert packs(merged) == [["b_0", "b_1"], ["b_2", "b_3"]]
    legal = {verdict.weight: verdict.legal for verdict in sparsity_of(merged)}
    assert legal["b_0+b_1.hidden.weight"]
    assert not legal["b_2+b_3.hidden.weight"]


def test_the_report_finds_the_verdict_of_a_packed_layer():
    rows = [{"weight": "center_0+hm_11.hidden.weight", "n": 1}, {"weight": "backbone_2d.blocks.0.1.weight", "n": 2}]
    found = verdicts_by_layer(rows)
    assert found["dense_head.heads_list.0.center.0.0"]["n"] == 1
    assert found["dense_head.heads_list.11.hm.0.0"]["n"] == 1
    assert found["backbone_2d.blocks.0.1"]["n"] == 2
