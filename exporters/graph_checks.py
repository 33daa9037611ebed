"""What an exported ONNX file promises, checked on the file itself: numpy and onnx, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from jaxtyping import Bool, Shaped

from dm3d_deploy.errors import ExportError
from exporters.graph_files import REFUSALS, array_of, first_line, interface, safe_load
from exporters.sparse_functions import DOMAIN, PLUGIN

OPSETS = range(18, 22)
REDUCTION_AXIS = {"Conv": 1, "ConvTranspose": 0}
OUTPUT_AXIS = {"Conv": 0, "ConvTranspose": 1}
# Depth of the smallest sparse matrix instruction (PTX ISA, mma.sp: m16n8k16 for f16, m16n8k32 for s8), and its width.
REDUCTION_MULTIPLE = {"float16": 16, "int8": 32}
OUTPUT_MULTIPLE = 8
# TensorRT's maintainers expect sparse kernels to win from about here on (NVIDIA/TensorRT issues 3849 and 4065).
GAIN_CHANNELS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class SparsityVerdict:
    """What 2:4 sparsity can do for one convolution; whether it was chosen and what it gained only a device can say.

    `zeros` is the share of zero weights. `reason` says why the first of legal, eligible, expected_gain that is false is
    false; it is empty when all hold.
    """

    node: str
    weight: str
    kind: str
    shape: tuple[int, ...]
    precision: str
    zeros: float
    legal: bool
    eligible: bool
    expected_gain: bool
    reason: str


def check_graph(path: Path) -> onnx.ModelProto:
    """Check an exported file and return it; ExportError names the node or tensor that breaks the contract.

    The contract: self-contained, an opset that TensorRT reads, static shapes, standard operators only - or one node of
    the domain dm3d alone in the graph, its functions defined in the file and its plugin named on every call. A graph
    with open rows among its inputs (see `graph_files.interface`) may have others within.
    """
    model = safe_load(path)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets.get("") not in OPSETS:
        raise ExportError(
            f"{path} has opset {opsets.get('')}; {OPSETS[0]} to {OPSETS[-1]} are supported.", fix="export it again"
        )
    _check_domains(model, path)
    try:
        onnx.checker.check_model(model, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except REFUSALS as error:
        raise ExportError(f"{path}: {first_line(error)}", fix="export the detector again") from None
    is_open = any(-1 in shape for _, shape in interface(list(model.graph.input)).values())
    for values in (model.graph.output, () if is_open else inferred.graph.value_info):
        interface(list(values))
    return model


def _called(node: onnx.NodeProto) -> str:
    return f"node '{node.name or ', '.join(node.output)}' ({node.domain or 'ai.onnx'}::{node.op_type})"


def _check_domains(model: onnx.ModelProto, path: Path) -> None:
    ours = [node for node in model.graph.node if node.domain == DOMAIN]
    if ours and len(model.graph.node) != 1:
        raise ExportError(
            f"{path} holds {len(model.graph.node)} nodes beside or including {_called(ours[0])}.",
            fix="keep the sparse backbone alone in its file: one node, one plugin",
        )
    defined = {(function.domain, function.name) for function in model.functions}
    for node in _all_nodes(model):
        if node.domain == DOMAIN:
            given = {attribute.name: attribute.s.decode(errors="replace") for attribute in node.attribute}
            missing = {key: value for key, value in PLUGIN.items() if given.get(key) != value}
            if missing:
                raise ExportError(
                    f"{path}: {_called(node)} lacks {missing}: TensorRT would inline its slow body.",
                    fix="export the detector again",
                )
            if (node.domain, node.op_type) not in defined:
                raise ExportError(f"{path}: {_called(node)} has no function body.", fix="export the detector again")
        elif node.domain not in ("", "ai.onnx"):
            raise ExportError(f"{path}: {_called(node)} is of a foreign domain.", fix="use standard operators")


def _all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from model.graph.node
    for function in model.functions:
        yield from function.node


def violations_2_4(groups: Shaped[np.ndarray, "*shape 4"]) -> Bool[np.ndarray, "*shape"]:
    """Groups of four with more than two weights other than zero."""
    crowded: np.ndarray = np.count_nonzero(groups, axis=-1) > 2
    return crowded


def sparsity_of(source: Path | onnx.ModelProto) -> tuple[SparsityVerdict, ...]:
    """Judge every Conv and ConvTranspose whose weight the file holds, directly or behind quantisation."""
    model = source if isinstance(source, onnx.ModelProto) else safe_load(source)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {node.output[0]: node for node in model.graph.node if node.output}
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants.update((node.output[0], attribute.t) for attribute in node.attribute if attribute.name == "value")
    verdicts = []
    for node in model.graph.node:
        if node.domain in ("", "ai.onnx") and node.op_type in REDUCTION_AXIS and len(node.input) > 1:
            name, precision = _stored_weight(node.input[1], producers)
            if name in constants:
                weight = array_of(constants[name])
                if weight.ndim < 3:
                    raise ExportError(f"{_called(node)} has a weight of shape {weight.shape}.", fix="export it again")
                verdicts.append(_verdict(node, name, weight, precision or weight.dtype.name))
    return tuple(verdicts)


def _stored_weight(name: str, producers: dict[str, onnx.NodeProto]) -> tuple[str, str]:
    """Walk back through quantisation; the precision is empty where the stored type tells it."""
    precision = ""
    while name in producers and producers[name].op_type in ("DequantizeLinear", "QuantizeLinear"):
        if producers[name].op_type == "QuantizeLinear":
            precision = "int8"
        name = producers[name].input[0]
    return name, precision


def _verdict(node: onnx.NodeProto, name: str, weight: np.ndarray, precision: str) -> SparsityVerdict:
    kind = node.op_type
    group = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    legal = _why_not_legal(weight, REDUCTION_AXIS[kind])
    inputs, outputs = weight.shape[REDUCTION_AXIS[kind]], weight.shape[OUTPUT_AXIS[kind]]
    eligible = legal or _why_not_eligible(inputs, outputs, group, precision)
    gain = eligible or _why_no_gain(inputs, outputs, weight.shape[2:])
    return SparsityVerdict(
        node=node.name,
        weight=name,
        kind=kind,
        shape=tuple(weight.shape),
        precision=precision,
        zeros=float(np.mean(weight == 0)) if weight.size else 0.0,
        legal=not legal,
        eligible=not eligible,
        expected_gain=not gain,
        reason=gain,
    )


def _why_not_legal(weight: np.ndarray, axis: int) -> str:
    channels = weight.shape[axis]
    if channels % 4 or not channels:
        return f"{channels} input channels do not come in fours"
    last = np.moveaxis(weight, axis, -1)
    crowded = violations_2_4(last.reshape(*last.shape[:-1], channels // 4, 4))
    if not crowded.any():
        return ""
    *place, group = (int(i) for i in np.argwhere(crowded)[0])
    return (
        f"{int(crowded.sum())} of {crowded.size} groups hold more than two weights, first: "
        f"output channel {place[0]}, kernel cell {tuple(place[1:])}, input channels {4 * group} to {4 * group + 3}"
    )


def _why_not_eligible(inputs: int, outputs: int, group: int, precision: str) -> str:
    if precision not in REDUCTION_MULTIPLE:
        return f"sparse tensor cores take fp16 and int8, the weight is {precision}"
    if group != 1:
        return f"a convolution in {group} groups has no sparse kernel"
    multiple = REDUCTION_MULTIPLE[precision]
    if inputs % multiple or outputs % OUTPUT_MULTIPLE:
        return f"{inputs} input and {outputs} output channels are not multiples of {multiple} and {OUTPUT_MULTIPLE}"
    return ""


def _why_no_gain(inputs: int, outputs: int, kernel: tuple[int, ...]) -> str:
    if min(inputs, outputs) >= GAIN_CHANNELS and kernel == (3, 3):
        return ""
    shape = "x".join(map(str, kernel))
    return (
        f"no gain expected: {inputs} to {outputs} channels, {shape}; "
        f"sparse kernels win from {GAIN_CHANNELS} to {GAIN_CHANNELS} channels and 3x3"
    )
