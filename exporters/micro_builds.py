"""One layer as a graph of its own, in the form that the exported graphs give it: for timing it alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dm3d_deploy.artifacts import digest_of_bytes, write_bytes
from dm3d_deploy.pruning.contracts import Layer
from exporters import sparse_functions as fn

TYPES: dict[str, tuple[int, type[np.floating]]] = {
    "fp16": (TensorProto.FLOAT16, np.float16),
    "fp32": (TensorProto.FLOAT, np.float32),
}


def dense_micro_build(
    path: Path, layer: Layer, *, outputs: int, stride: int, precision: Literal["fp16", "fp32"], two_four: bool = False
) -> str:
    """Write a 2D layer with `outputs` output channels, its bias and ReLU; returns the file's SHA-256.

    Input `x [1, Cin, H, W]` of the extent nearest to a square that has the layer's cells. With `two_four` half of the
    weights are zero, as 2:4 leaves them.
    """
    element, kind = TYPES[precision]
    rows, columns = _extent(round(float(layer.positions[0])))
    shape = (outputs, layer.inputs, *layer.kernel) if layer.kind == "conv2d" else (layer.inputs, outputs, *layer.kernel)
    weight = np.random.default_rng(0).normal(0, 0.05, shape).astype(kind)
    if two_four:
        along = np.moveaxis(weight, 1 if layer.kind == "conv2d" else 0, 0)
        along[0::4], along[1::4] = 0, 0
    if layer.kind == "conv2d":
        given: dict[str, Any] = {"kernel_shape": list(layer.kernel), "strides": [stride, stride]}
        given["pads"] = [layer.kernel[0] // 2, layer.kernel[1] // 2] * 2
        read, written = (rows * stride, columns * stride), (rows, columns)
        node = helper.make_node("Conv", ["x", "weight", "bias"], ["sum"], **given)
    else:
        given = {"kernel_shape": list(layer.kernel), "strides": list(layer.kernel)}
        read, written = (rows, columns), (rows * layer.kernel[0], columns * layer.kernel[1])
        node = helper.make_node("ConvTranspose", ["x", "weight", "bias"], ["sum"], **given)
    graph = helper.make_graph(
        [node, helper.make_node("Relu", ["sum"], ["y"])],
        "layer",
        [helper.make_tensor_value_info("x", element, [1, layer.inputs, *read])],
        [helper.make_tensor_value_info("y", element, [1, outputs, *written])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(np.zeros(outputs, kind), "bias")],
    )
    return _write(path, graph, [])


def sparse_micro_build(
    path: Path, layer: Layer, *, outputs: int, sites_in: int, sites_out: int, pairs: Sequence[int], centre: bool
) -> str:
    """Write a sparse layer over rulebooks that are given; returns the file's SHA-256.

    Inputs `features [sites_in, Cin]`, `sites [3, sites_out]` and, for each tap but the centre of a sub-manifold kernel,
    `in_T [pairs]` and `out_T [pairs, 1]`.
    """
    taps = list(range(len(pairs)))
    function = fn.convolution_function("Layer", len(pairs), centre=centre)
    names = ["features", "sites", "weight", "bias", *fn.rulebook_pairs(taps)]
    body = fn.Body()
    body.call("Layer", names, ["sum"], "layer", taps=taps)
    body.op("Relu", "sum", output="y")
    weight = np.random.default_rng(0).normal(0, 0.05, (len(pairs) + centre, layer.inputs, outputs)).astype(np.float32)
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        body.nodes,
        "layer",
        [
            tensor("features", TensorProto.FLOAT, [sites_in, layer.inputs]),
            tensor("sites", TensorProto.INT64, [3, sites_out]),
            *(tensor(f"in_{tap}", TensorProto.INT64, [count]) for tap, count in enumerate(pairs)),
            *(tensor(f"out_{tap}", TensorProto.INT64, [count, 1]) for tap, count in enumerate(pairs)),
        ],
        [tensor("y", TensorProto.FLOAT, [sites_out, outputs])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(np.zeros(outputs, np.float32), "bias")],
    )
    return _write(path, graph, [function])


def _write(path: Path, graph: onnx.GraphProto, functions: list[onnx.FunctionProto]) -> str:
    opsets = [helper.make_opsetid("", fn.OPSET), helper.make_opsetid(fn.DOMAIN, 1)]
    model = helper.make_model(graph, ir_version=fn.IR_VERSION, functions=functions, opset_imports=opsets)
    data: bytes = model.SerializeToString(deterministic=True)
    write_bytes(path, data)
    return digest_of_bytes(data)


def _extent(cells: int) -> tuple[int, int]:
    """Rows and columns of a map of that many cells, as near to a square as whole numbers allow."""
    rows = next(rows for rows in range(math.isqrt(cells), 0, -1) if cells % rows == 0)
    return rows, cells // rows
