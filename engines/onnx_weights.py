"""What TensorRT will see of the weights in an ONNX file: their type, and which of them are 2:4 sparse."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from dm3d_deploy.errors import EngineError, UsageError, nearest

PRECISIONS = {"fp32": "float32", "fp16": "float16", "int8": "int8"}
_INPUT_AXIS = {"Conv": 1, "ConvTranspose": 0, "MatMul": 0}
Kernel = tuple[str, Shaped[np.ndarray, "..."]]  # ONNX operator, its weight


def kernels_of(onnx_path: Path) -> dict[str, Kernel]:
    """Weight name -> (operator, array) of every convolution and linear layer, also through a DequantizeLinear.

    EngineError for a file that is not ONNX, or one whose weights lie in other files.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(str(onnx_path), load_external_data=False)
    except (OSError, DecodeError, ValueError) as error:
        raise EngineError(f"{onnx_path} cannot be read as ONNX: {error}.", fix="export it again") from None
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    constants = [node for node in model.graph.node if node.op_type == "Constant"]
    stored |= {node.output[0]: value.t for node in constants for value in node.attribute if value.name == "value"}
    outside = [name for name, tensor in stored.items() if tensor.data_location == onnx.TensorProto.EXTERNAL]
    if outside:
        raise EngineError(
            f"{onnx_path} keeps {len(outside)} weights in other files, the first is '{outside[0]}'.",
            fix="export it as one file",
        )
    source = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    kernels: dict[str, Kernel] = {}
    for node in model.graph.node:
        if node.op_type in _INPUT_AXIS and len(node.input) > 1:
            name = source.get(node.input[1], node.input[1])
            if name in stored:
                kernels[name] = (node.op_type, onnx.numpy_helper.to_array(stored[name]))
    return kernels


def check_precision(onnx_path: Path, kernels: Mapping[str, Kernel], precision: str) -> None:
    """Refuse a precision that is not the graph's own: a strongly typed network is built as it was written."""
    if precision not in PRECISIONS:
        raise UsageError(f"the precision '{precision}' is unknown.", fix=nearest(precision, PRECISIONS))
    types = [str(array.dtype) for _, array in kernels.values()]
    wanted = PRECISIONS[precision]
    if not types:
        raise EngineError(
            f"{onnx_path} holds no convolution or linear layer with stored weights: nothing shows that it is "
            f"{precision}.",
            fix="give the graph of a head that was exported",
        )
    other = sorted({kind for kind in types if kind != wanted})
    if other and (precision != "int8" or wanted not in types):  # an int8 graph may keep some layers in float
        raise EngineError(
            f"{onnx_path} was to be built as {precision}, but its weights are {', '.join(other)}.",
            fix=f"export the graph in {precision}: precision is a property of the file",
        )


def two_four_kernels(kernels: Mapping[str, Kernel]) -> list[str]:
    """Names of the weights in which every four neighbours along the input channels hold at most two non-zeros."""
    return [name for name, (operator, array) in kernels.items() if _is_two_four(array, _INPUT_AXIS[operator])]


def _is_two_four(weight: Any, axis: int) -> bool:
    channels_last = np.moveaxis(weight, axis, -1)
    if channels_last.size == 0 or channels_last.shape[-1] % 4:
        return False
    groups = channels_last.reshape(*channels_last.shape[:-1], -1, 4)
    return bool((np.count_nonzero(groups, axis=-1) <= 2).all())
