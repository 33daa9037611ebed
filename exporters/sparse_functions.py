"""Sparse 3D convolution as ONNX functions of standard operators: cell index, rulebooks, convolutions, BEV scatter.

Sites are `[3, M]` int64, rows z, y, x, in raster order. A cell index has two levels: `plane` is the BEV plane with a
halo of one cell and holds the number of each occupied column, counted from 1 (0: no column); `table` holds, for each
z (with a halo of one) and column, the row of that cell, or -1. It costs (H+2)(W+2) + (D+2)(columns+1) words, not DHW.

Index relation: input = output * stride - padding + offset, tap = (kz * KY + ky) * KX + kx.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import onnx
from jaxtyping import Float32
from onnx import helper, numpy_helper

DOMAIN = "dm3d"
OPSET = 18
IR_VERSION = 10
HALO = 1
PLUGIN = {"plugin_namespace": DOMAIN, "plugin_version": "1"}

Triple = tuple[int, int, int]


def output_grid(grid: Triple, kernel: Triple, stride: Triple, padding: Triple) -> Triple:
    """Cells along z, y, x after a strided convolution."""
    z, y, x = (
        (cells + 2 * pad - size) // step + 1
        for cells, size, step, pad in zip(grid, kernel, stride, padding, strict=True)
    )
    return z, y, x


def centre_tap(kernel: Triple) -> int:
    """The tap that maps a site to itself in a sub-manifold convolution."""
    return prod(kernel) // 2


class Body:
    """The nodes of one function, with names that depend on their order alone."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def op(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Append one node of one output and return that output's name."""
        name = output or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def constant(self, value: np.ndarray, *, output: str = "") -> str:
        """Append a constant."""
        return self.op("Constant", output=output, value=numpy_helper.from_array(value))

    def ints(self, values: int | Sequence[Any]) -> str:
        """Append a constant of int64: a scalar, a list or nested lists."""
        return self.constant(np.asarray(values, np.int64))

    def split(self, value: str, outputs: Sequence[str], *sizes: str, axis: int = 0) -> None:
        """Cut `value` along `axis` into `outputs`: equal parts, or the given sizes."""
        parts: dict[str, Any] = {} if sizes else {"num_outputs": len(outputs)}
        self.nodes.append(helper.make_node("Split", [value, *sizes], outputs, axis=axis, **parts))

    def call(
        self, function: str, inputs: Sequence[str], outputs: Sequence[str], name: str, **attributes: Sequence[int]
    ) -> None:
        """Append a call of a function of ours; TensorRT finds its plugin by the attributes of PLUGIN."""
        node = helper.make_node(function, inputs, outputs, name=name, domain=DOMAIN, **PLUGIN)
        for key, value in attributes.items():  # typed by hand: a layer may be left without taps
            node.attribute.append(helper.make_attribute(key, list(value), attr_type=onnx.AttributeProto.INTS))
        self.nodes.append(node)

    def counted(self, values: str, axis: int, first: int = 0) -> str:
        """The numbers first, first + 1, ... for each entry along an axis of `values`."""
        size = self.op("Squeeze", self.op("Shape", values, start=axis, end=axis + 1))
        end = self.op("Add", size, self.ints(first)) if first else size
        return self.op("Range", self.ints(first), end, self.ints(1))

    def flat(self, value: str) -> str:
        """Reshape to one dimension."""
        return self.op("Reshape", value, self.ints([-1]))

    def function(
        self, name: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Sequence[str] = ()
    ) -> onnx.FunctionProto:
        """Close the body."""
        opsets = [helper.make_opsetid("", OPSET)]
        if any(node.domain == DOMAIN for node in self.nodes):
            opsets.append(helper.make_opsetid(DOMAIN, 1))
        return helper.make_function(DOMAIN, name, inputs, outputs, self.nodes, opsets, [*PLUGIN, *attributes])


def _numbered_plane(body: Body, yx: str, cells: int) -> tuple[str, str]:
    """Number the occupied columns in raster order; returns the plane and the number of columns + 1, shape [1]."""
    shape = body.ints([cells])
    empty = body.op("ConstantOfShape", shape, value=numpy_helper.from_array(np.zeros(1, np.bool_)))
    ones = body.op("ConstantOfShape", body.op("Shape", yx), value=numpy_helper.from_array(np.ones(1, np.bool_)))
    columns = body.op("NonZero", body.op("ScatterElements", empty, yx, ones, axis=0))
    zeros = body.op("ConstantOfShape", shape, value=numpy_helper.from_array(np.zeros(1, np.int64)))
    numbers = body.counted(columns, 1, first=1)
    plane = body.op("ScatterElements", zeros, body.flat(columns), numbers, axis=0, output="plane")
    return plane, body.op("Add", body.op("Shape", columns, start=1, end=2), body.ints([1]))


def index_function(name: str, grid: Triple) -> onnx.FunctionProto:
    """Index cells that come in any order and may repeat.

    `cells [3, N]` -> `sites [3, M]` in raster order, `order [M]` (the row of `cells` that each site keeps; the last of
    equal cells), `plane [(H+2)(W+2)]`, `table [D+2, columns+1]`.
    """
    body = Body()
    depth, height, width = grid
    pitch = width + 2 * HALO
    body.split("cells", ["z", "y", "x"])
    rows = body.op("Mul", body.op("Add", "y", body.ints(HALO)), body.ints(pitch))
    yx = body.flat(body.op("Add", rows, body.op("Add", "x", body.ints(HALO))))
    plane, columns = _numbered_plane(body, yx, (height + 2 * HALO) * pitch)
    z = body.op("Mul", body.flat(body.op("Add", "z", body.ints(HALO))), columns)
    slot = body.op("Add", z, body.op("Gather", plane, yx, axis=0))
    size = body.op("Mul", columns, body.ints([depth + 2 * HALO]))
    none = body.op("ConstantOfShape", size, value=numpy_helper.from_array(np.full(1, -1, np.int64)))
    source = body.op("ScatterElements", none, slot, body.counted("cells", 1), axis=0)
    filled = body.op("NonZero", body.op("GreaterOrEqual", source, body.ints(0)))
    slots = body.flat(filled)
    body.op("Gather", source, slots, axis=0, output="order")
    body.op("Gather", "cells", "order", axis=1, output="sites")
    table = body.op("ScatterElements", none, slots, body.counted(filled, 1), axis=0)
    body.op("Reshape", table, body.ints([depth + 2 * HALO, -1]), output="table")
    return body.function(name, ["cells"], ["sites", "order", "plane", "table"], ["grid"])


def strided_cells_function(
    name: str, grid: Triple, kernel: Triple, stride: Triple, padding: Triple
) -> onnx.FunctionProto:
    """The output cells that each input site reaches, with repeats: `sites [3, N]` -> `cells [3, M]`.

    Weights play no part: a pruned tap still creates its output sites, as in the network that was trained.
    """
    body = Body()
    body.split("sites", ["z", "y", "x"])
    reached, legal = [], []
    out = output_grid(grid, kernel, stride, padding)
    for axis, (coordinate, size, step, pad) in enumerate(zip("zyx", kernel, stride, padding, strict=True)):
        shifted = body.op("Add", coordinate, body.ints(pad))
        steps = np.arange(-(-size // step)).reshape([-1 if a == axis else 1 for a in range(3)] + [1])
        cell = body.op("Sub", body.op("Div", shifted, body.ints(step)), body.ints(steps.tolist()))
        offset = body.op("Sub", shifted, body.op("Mul", cell, body.ints(step)))
        inside = body.op(
            "And", body.op("GreaterOrEqual", cell, body.ints(0)), body.op("Less", cell, body.ints(out[axis]))
        )
        legal.append(body.op("And", inside, body.op("Less", offset, body.ints(size))))
        reached.append(cell)
    valid = body.op("And", body.op("And", legal[0], legal[1]), legal[2])
    shape, kept = body.op("Shape", valid), body.flat(valid)
    rows = [body.op("Compress", body.op("Expand", cell, shape), kept) for cell in reached]
    rows = [body.op("Reshape", row, body.ints([1, -1])) for row in rows]
    body.op("Concat", *rows, axis=0, output="cells")
    return body.function(name, ["sites"], ["cells"], ["grid", "kernel", "stride", "padding"])


def rulebook_pairs(taps: Sequence[int]) -> list[str]:
    """Names of a rulebook's outputs: for each tap the input rows `[P]`, then the output rows `[P, 1]`."""
    return [f"in_{tap}" for tap in taps] + [f"out_{tap}" for tap in taps]


def rulebook_function(
    name: str, grid: Triple, kernel: Triple, stride: Triple, padding: Triple, taps: Sequence[int]
) -> onnx.FunctionProto:
    """Pairs of input and output rows for each of `taps`: `sites [3, M]` (of the output), `plane`, `table` of the input.

    `grid` is the input's. A sub-manifold convolution is the case stride 1, padding kernel // 2.
    """
    body = Body()
    pitch = grid[2] + 2 * HALO
    body.split("sites", ["z", "y", "x"])
    z, y, x = (
        body.op("Add", body.op("Mul", coordinate, body.ints(step)), body.ints(HALO - pad))
        for coordinate, step, pad in zip("zyx", stride, padding, strict=True)
    )
    kz, ky, kx = np.unravel_index(np.asarray(taps, np.int64), kernel)
    corner = body.op("Add", body.op("Mul", y, body.ints(pitch)), x)
    offsets, which = np.unique(ky * pitch + kx, return_inverse=True)
    column = body.op("Gather", "plane", body.op("Add", corner, body.ints(offsets[:, None].tolist())), axis=0)
    heights = body.op("Add", z, body.ints(np.arange(kernel[0])[:, None].tolist()))
    level = body.op("Mul", heights, body.op("Shape", "table", start=1, end=2))
    slot = body.op(
        "Add",
        body.op("Gather", level, body.ints(kz.tolist()), axis=0),
        body.op("Gather", column, body.ints(which.tolist()), axis=0),
    )
    rows = body.op("Gather", body.flat("table"), slot, axis=0)
    hit = body.op("GreaterOrEqual", rows, body.ints(0))
    counts = body.op("ReduceSum", body.op("Cast", hit, to=onnx.TensorProto.INT64), body.ints([1]), keepdims=0)
    kept, own = body.flat(hit), body.op("Expand", body.counted("sites", 1), body.op("Shape", hit))
    found = body.op("Reshape", body.op("Compress", own, kept), body.ints([-1, 1]))
    names = rulebook_pairs(taps)
    body.split(body.op("Compress", rows, kept), names[: len(taps)], counts)
    body.split(found, names[len(taps) :], counts)
    return body.function(name, ["sites", "plane", "table"], names, ["grid", "kernel", "stride", "padding", "taps"])


def convolution_function(name: str, pairs: int, *, centre: bool) -> onnx.FunctionProto:
    """`features [N, Cin]`, `sites [3, M]`, `weight [T, Cin, Cout]`, `bias [Cout]`, then the pairs -> `[M, Cout]`.

    `centre`: weight 0 is that of the tap that maps every row to itself, and is added first; T = pairs + centre.
    """
    body = Body()
    taps = list(range(pairs))
    if centre:
        own = body.op("MatMul", "features", body.op("Gather", "weight", body.ints(0), axis=0))
        total = body.op("Add", own, "bias")
    else:
        shape = body.op("Concat", body.op("Shape", "sites", start=1, end=2), body.op("Shape", "bias"), axis=0)
        total = body.op("Expand", "bias", shape)
    for tap in taps:
        weight = body.op("Gather", "weight", body.ints(tap + centre), axis=0)
        product = body.op("MatMul", body.op("Gather", "features", f"in_{tap}", axis=0), weight)
        total = body.op("ScatterND", total, f"out_{tap}", product, reduction="add")
    body.op("Identity", total, output="result")
    inputs = ["features", "sites", "weight", "bias", *rulebook_pairs(taps)]
    return body.function(name, inputs, ["result"], ["taps"])


def bev_function(name: str, grid: Triple, channels: int) -> onnx.FunctionProto:
    """`features [M, C]`, `sites [3, M]` -> `bev [1, C * D, H, W]`; channel c at height d is c * D + d.

    That is the order of OpenPCDet's HeightCompression: a dense [C, D, H, W] whose first two axes are merged.
    """
    body = Body()
    depth, height, width = grid
    body.split("sites", ["z", "y", "x"])
    zy = body.op("Add", body.op("Mul", "z", body.ints(height)), "y")
    cell = body.op("Add", body.op("Mul", zy, body.ints(width)), "x")
    empty = body.op("ConstantOfShape", body.ints([prod(grid), channels]))
    dense = body.op("ScatterND", empty, body.op("Reshape", cell, body.ints([-1, 1])), "features")
    turned = body.op("Transpose", dense, perm=[1, 0])
    body.op("Reshape", turned, body.ints([1, channels * depth, height, width]), output="bev")
    return body.function(name, ["features", "sites"], ["bev"], ["grid"])


def kept_taps(weight: Float32[np.ndarray, "cout kz ky kx cin"]) -> list[int]:
    """Taps that hold at least one weight other than zero."""
    cout, kz, ky, kx, cin = weight.shape
    alive = np.any(weight.reshape(cout, kz * ky * kx, cin) != 0, axis=(0, 2))
    return [int(tap) for tap in np.flatnonzero(alive)]


def packed_taps(
    weight: Float32[np.ndarray, "cout kz ky kx cin"], taps: Sequence[int]
) -> Float32[np.ndarray, "taps cin cout"]:
    """The matrices of `taps`, in that order."""
    cout, kz, ky, kx, cin = weight.shape
    matrices = weight.transpose(1, 2, 3, 4, 0).reshape(kz * ky * kx, cin, cout)
    return np.ascontiguousarray(matrices[list(taps)], np.float32)
