"""Branches of a head merged: an exact rewrite of a graph, done before anything is pruned or built.

A branch is Conv, Relu, Conv from a shared tensor to a graph output. Hardware pays a convolution's outputs in multiples
of 8, and a branch has 1 to 3: so branches are packed until 8 outputs are full. Each pack is one convolution of all
hidden channels, one of all outputs whose weight is block-diagonal, and a Split that gives the outputs their names back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from jaxtyping import Shaped
from onnx import helper, numpy_helper

from exporters.graph_checks import violations_2_4

PAID_OUTPUTS = 8


@dataclass(frozen=True, slots=True)
class _Branch:
    """Conv, Relu and Conv in a row; `output` is the graph output behind them."""

    hidden: onnx.NodeProto
    relu: onnx.NodeProto
    final: onnx.NodeProto
    width: int
    legal_2_4: bool

    @property
    def output(self) -> str:
        return str(self.final.output[0])

    @property
    def form(self) -> tuple[str | bool, ...]:
        """What a pack must share: input, attributes, biases, and 2:4, which one dense branch would take from all."""
        return (self.hidden.input[0], _form(self.hidden), _form(self.final), self.legal_2_4)


def merge_heads(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same function with fewer nodes; outputs keep names and order. A graph without such branches is unchanged.

    Sums run over the same products, with zeros between: equal up to the rounding of a backend's own order of summation.
    """
    merged = onnx.ModelProto()
    merged.CopyFrom(model)
    graph = merged.graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    packs = [pack for pack in _packs(_branches(graph, weights)) if len(pack) > 1]
    chains = (node for pack in packs for branch in pack for node in (branch.hidden, branch.relu, branch.final))
    gone = {node.output[0] for node in chains}
    nodes = [node for node in graph.node if node.output[0] not in gone]
    for pack in packs:
        made, tensors = _merged(pack, weights)
        nodes += made
        weights.update(tensors)
    used = {name for node in nodes for name in node.input}
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]  # `nodes` dies with the list below
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(copies)
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items() if name in used)
    return merged


def _branches(graph: onnx.GraphProto, weights: dict[str, np.ndarray]) -> Iterator[_Branch]:
    """Branches in the order of the graph's outputs."""
    producers = {name: node for node in graph.node for name in node.output}
    uses: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    outputs = [value.name for value in graph.output]
    for output in outputs:
        chain = []
        name = output
        for kind in ("Conv", "Relu", "Conv"):
            node = producers.get(name)
            inner = name != output and (uses.get(name) != 1 or name in outputs)
            if node is None or node.op_type != kind or inner or (kind == "Conv" and not _plain(node, weights)):
                break
            chain.append(node)
            name = node.input[0]
        if len(chain) == 3 and uses.get(output, 0) == 0:
            final, relu, hidden = chain
            width, legal = len(weights[final.input[1]]), _legal_2_4(weights[hidden.input[1]])
            yield _Branch(hidden, relu, final, width, legal)


def _legal_2_4(weight: Shaped[np.ndarray, "outputs inputs ky kx"]) -> bool:
    last = np.moveaxis(weight, 1, -1)
    return weight.shape[1] % 4 == 0 and not violations_2_4(last.reshape(*last.shape[:-1], -1, 4)).any()


def _plain(node: onnx.NodeProto, weights: dict[str, np.ndarray]) -> bool:
    group = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    return group == 1 and all(name in weights for name in node.input[1:])


def _form(node: onnx.NodeProto) -> str:
    attributes = sorted(helper.printable_attribute(attribute) for attribute in node.attribute)
    return f"{attributes} with {len(node.input)} inputs"


def _packs(branches: Iterator[_Branch]) -> list[list[_Branch]]:
    packs: list[list[_Branch]] = []
    for branch in branches:
        last = packs[-1] if packs else []
        fits = sum(other.width for other in last) + branch.width <= PAID_OUTPUTS
        if last and fits and last[0].form == branch.form:
            last.append(branch)
        else:
            packs.append([branch])
    return packs


def _merged(
    pack: Sequence[_Branch], weights: dict[str, np.ndarray]
) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """The nodes of one pack and their new initialisers."""
    name = "+".join(branch.output for branch in pack)
    hidden = {
        part: np.concatenate([weights[branch.hidden.input[i]] for branch in pack])
        for i, part in ((1, "weight"), (2, "bias"))
        if i < len(pack[0].hidden.input)
    }
    final = {"weight": _block_diagonal([weights[branch.final.input[1]] for branch in pack])}
    if len(pack[0].final.input) > 2:
        final["bias"] = np.concatenate([weights[branch.final.input[2]] for branch in pack])
    tensors = {f"{name}.hidden.{part}": array for part, array in hidden.items()}
    tensors |= {f"{name}.final.{part}": array for part, array in final.items()}
    tensors[f"{name}.widths"] = np.array([branch.width for branch in pack], np.int64)
    first = _convolution(pack[0].hidden, pack[0].hidden.input[0], f"{name}.hidden", list(hidden))
    relu = helper.make_node("Relu", [first.output[0]], [f"{name}.relu"], name=f"{name}.relu")
    last = _convolution(pack[0].final, relu.output[0], f"{name}.final", list(final))
    outputs = [branch.output for branch in pack]
    split = helper.make_node("Split", [last.output[0], f"{name}.widths"], outputs, name=f"{name}.split", axis=1)
    return [first, relu, last, split], tensors


def _convolution(like: onnx.NodeProto, source: str, name: str, parts: Sequence[str]) -> onnx.NodeProto:
    node = helper.make_node("Conv", [source, *(f"{name}.{part}" for part in parts)], [name], name=name)
    node.attribute.extend(like.attribute)
    return node


def _block_diagonal(
    blocks: Sequence[Shaped[np.ndarray, "outputs inputs ky kx"]],
) -> Shaped[np.ndarray, "all_outputs all_inputs ky kx"]:
    rows, columns = sum(len(block) for block in blocks), sum(block.shape[1] for block in blocks)
    whole = np.zeros((rows, columns, *blocks[0].shape[2:]), blocks[0].dtype)
    row = column = 0
    for block in blocks:
        outputs, inputs = block.shape[:2]
        whole[row : row + outputs, column : column + inputs] = block
        row, column = row + outputs, column + inputs
    return whole
