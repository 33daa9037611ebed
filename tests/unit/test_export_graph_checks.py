"""What an ONNX file promises, and what is refused when it does not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from dm3d_deploy.errors import Dm3dError, ExportError
from exporters.backbone3d import SparseLayer, backbone_model
from exporters.graph_checks import check_graph, sparsity_of
from exporters.graph_files import interface, safe_load


def dense_model(weight=None, **attributes):
    weight = np.ones((4, 4, 3, 3), np.float32) if weight is None else weight
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["hidden"], name="conv", **attributes),
        helper.make_node("Relu", ["hidden"], ["y"], name="relu"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, weight.shape[1], 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, weight.shape[0], 6, 6])
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def sparse_model():
    weight, bias = np.ones((2, 3, 3, 3, 2), np.float32), np.zeros(2, np.float32)
    one = (1, 1, 1)
    layer = SparseLayer(name="a", weight=weight, bias=bias, stride=one, padding=one, submanifold=True, key="s")
    return backbone_model([layer], grid_zyx=(2, 3, 3), max_voxels=4)


def saved(tmp_path, model, name="model.onnx"):
    path = tmp_path / name
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("model", [dense_model(), sparse_model()], ids=["dense", "sparse"])
def test_good_files_pass(tmp_path, model):
    assert check_graph(saved(tmp_path, model)) == model


def test_files_that_are_no_graphs(tmp_path):
    with pytest.raises(ExportError, match=r"none\.onnx is not a file"):
        safe_load(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_bytes(b"\xff\xff\xff\xff not protobuf")
    with pytest.raises(ExportError, match="with 17 bytes is not an ONNX file"):
        safe_load(tmp_path / "text.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(ExportError, match="is not a valid ONNX graph"):
        safe_load(tmp_path / "empty.onnx")
    path = saved(tmp_path, dense_model())
    size = path.stat().st_size
    with pytest.raises(ExportError, match=f"has {size} bytes; at most 10 are read"):
        safe_load(path, max_bytes=10)


@pytest.mark.parametrize("where", ["initializer", "constant", "function", "branch", "node in a branch"])
def test_weights_in_other_files_are_refused(tmp_path, where):
    model = dense_model()
    if where == "initializer":
        tensor = model.graph.initializer[0]
    elif where == "constant":
        model.graph.node.insert(
            0, helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.ones(3), "t"))
        )
        tensor = model.graph.node[0].attribute[0].t
    elif where == "function":
        model = sparse_model()
        body = model.functions[-1].node
        tensor = next(node for node in body if node.op_type == "Constant").attribute[0].t
        tensor.name = "t"
    else:
        values = numpy_helper.from_array(np.ones(3), "t")
        node = helper.make_node("Constant", [], ["c"], value=values)
        inner = helper.make_graph(
            *(([], "inner", [], [], [values]) if where == "branch" else ([node], "inner", [], []))
        )
        model.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=inner, else_branch=inner))
        branch = next(a.g for a in model.graph.node[-1].attribute if a.name == "then_branch")
        tensor = branch.initializer[0] if where == "branch" else branch.node[0].attribute[0].t
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../secret")
    with pytest.raises(ExportError, match=r"tensor '[wt]' lies in another file"):
        safe_load(saved(tmp_path, model))


def broken(change):
    model = dense_model()
    change(model)
    return model


def old_opset(model):
    model.opset_import[0].version = 13


def no_shape(model):
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"


def wrong_shape(model):
    model.graph.output[0].type.tensor_type.shape.dim[3].dim_value = 7


def wrong_rank(model):
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((4, 4, 3), np.float32), "w"))


def foreign(model):
    model.graph.node[1].domain = "com.example"
    model.opset_import.add(domain="com.example", version=1)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (old_opset, "has opset 13; 18 to 21 are supported"),
        (no_shape, r"'x' has the shape \[1, 4, 'height', 8\], which is not static"),
        (wrong_shape, "node name: relu"),
        (wrong_rank, "node name: conv"),
        (foreign, r"node 'relu' \(com\.example::Relu\) is of a foreign domain"),
    ],
)
def test_broken_contracts_are_named(tmp_path, change, text):
    with pytest.raises(ExportError, match=text):
        check_graph(saved(tmp_path, broken(change)))


def test_a_sparse_graph_is_one_node_that_names_its_plugin(tmp_path):
    model = sparse_model()
    model.graph.node.append(helper.make_node("Relu", ["bev"], ["extra"], name="relu"))
    with pytest.raises(ExportError, match=r"holds 2 nodes beside or including node 'backbone_3d' \(dm3d::SparseB"):
        check_graph(saved(tmp_path, model))
    model = sparse_model()
    call = next(node for node in model.functions[-1].node if node.name == "a")
    version = next(attribute for attribute in call.attribute if attribute.name == "plugin_version")
    version.s = b"2"
    with pytest.raises(ExportError, match=r"node 'a' .* lacks {'plugin_version': '1'}: TensorRT would inline"):
        check_graph(saved(tmp_path, model))


def verdict_of(weight, kind="Conv", **attributes):
    node = helper.make_node(kind, ["x", "w"], ["y"], name="layer", **attributes)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    graph = helper.make_graph([node], "g", values[:1], values[1:], [numpy_helper.from_array(weight, "w")])
    (verdict,) = sparsity_of(helper.make_model(graph))
    return verdict


def two_four(shape, axis, kind=np.float16):
    weight = np.ones(shape, kind)
    np.moveaxis(weight, axis, 0)[0::2] = 0
    return weight


def test_legal_eligible_and_expected_gain_are_three_things():
    best = verdict_of(two_four((256, 256, 3, 3), 1))
    assert (best.legal, best.eligible, best.expected_gain, best.reason) == (True, True, True, "")
    assert best.zeros == 0.5
    small = verdict_of(two_four((64, 64, 3, 3), 1))
    assert (small.legal, small.eligible, small.expected_gain) == (True, True, False)
    assert "no gain expected: 64 to 64 channels, 3x3" in small.reason
    pointwise = verdict_of(two_four((256, 256, 1, 1), 1))
    assert "no gain expected: 256 to 256 channels, 1x1" in pointwise.reason
    exact = verdict_of(two_four((256, 256, 3, 3), 1, np.float32))
    assert (exact.legal, exact.eligible) == (True, False)
    assert "sparse tensor cores take fp16 and int8, the weight is float32" in exact.reason
    narrow = verdict_of(two_four((2, 64, 3, 3), 1))
    assert (narrow.legal, narrow.eligible) == (True, False)
    assert "64 input and 2 output channels are not multiples of 16 and 8" in narrow.reason
    grouped = verdict_of(two_four((64, 16, 3, 3), 1), group=4)
    assert "a convolution in 4 groups has no sparse kernel" in grouped.reason
    odd = verdict_of(np.zeros((8, 6, 3, 3), np.float16))
    assert (odd.legal, odd.reason) == (False, "6 input channels do not come in fours")


def test_the_channel_axis_of_a_deconvolution_is_the_first():
    up = two_four((16, 8, 2, 2), 0)
    assert verdict_of(up, "ConvTranspose").legal
    assert not verdict_of(up, "Conv").legal
    up[5, 3, 1, 0] = up[4, 3, 1, 0] = up[7, 3, 1, 0] = 1
    reason = verdict_of(up, "ConvTranspose").reason
    assert reason.startswith("1 of 128 groups hold more than two weights")
    assert "output channel 3, kernel cell (1, 0), input channels 4 to 7" in reason


def test_weights_behind_quantisation_are_judged_as_int8():
    weight = two_four((256, 256, 3, 3), 1, np.int8)
    scale, zero = numpy_helper.from_array(np.float32(0.1), "s"), numpy_helper.from_array(np.int8(0), "z")
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"]),
        helper.make_node("Conv", ["x", "d"], ["y"], name="layer"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    stored = [numpy_helper.from_array(weight, "w"), scale, zero]
    (verdict,) = sparsity_of(helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], stored)))
    assert (verdict.weight, verdict.precision, verdict.expected_gain) == ("w", "int8", True)
    nodes.insert(0, helper.make_node("QuantizeLinear", ["f", "s", "z"], ["w"]))
    stored[0] = numpy_helper.from_array(weight.astype(np.float32), "f")
    (verdict,) = sparsity_of(helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], stored)))
    assert (verdict.weight, verdict.precision, verdict.expected_gain) == ("f", "int8", True)


def test_stored_weights_that_are_no_weights_are_refused():
    short = dense_model()
    short.graph.initializer[0].raw_data = b"\x00" * 10
    with pytest.raises(ExportError, match=r"tensor 'w' of shape \[4, 4, 3, 3\] cannot be read"):
        sparsity_of(short)
    with pytest.raises(ExportError, match=r"node 'conv' \(ai\.onnx::Conv\) has a weight of shape \(4, 4\)"):
        sparsity_of(dense_model(np.ones((4, 4), np.float32)))


def test_unknown_element_types_are_refused(tmp_path):
    model = dense_model()
    model.graph.input[0].type.tensor_type.elem_type = 99
    with pytest.raises(ExportError):
        check_graph(saved(tmp_path, model))
    with pytest.raises(ExportError, match="'x' has the element type 99"):
        interface(list(model.graph.input))


def test_weights_that_the_file_does_not_hold_have_no_verdict():
    node = helper.make_node("Conv", ["x", "computed"], ["y"])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "computed", "y")]
    assert sparsity_of(helper.make_model(helper.make_graph([node], "g", values[:2], values[2:]))) == ()


SEEDS = [dense_model().SerializeToString(), sparse_model().SerializeToString()]


@settings(max_examples=150)
@given(data=st.data())
def test_mutated_files_end_in_a_model_or_a_refusal(data, tmp_path_factory):
    content = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content) - 1))
        action = data.draw(st.sampled_from(["set", "cut", "insert", "copy"]))
        if action == "set":
            content[at] = data.draw(st.integers(0, 255))
        elif action == "cut":
            del content[at : at + data.draw(st.integers(1, 40))]
        elif action == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        else:
            content[at:at] = content[at : at + 30]
        content = content or bytearray(b"\x00")
    path = tmp_path_factory.getbasetemp() / "mutated.onnx"
    path.write_bytes(content)
    try:
        model = check_graph(path) if data.draw(st.booleans()) else safe_load(path)
    except Dm3dError:
        return
    assert isinstance(model, onnx.ModelProto)
