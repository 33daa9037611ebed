"""What VoxelNeXt needs beyond the other sparse backbones: stages added up in the bird's-eye view, and active cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper, numpy_helper

from exporters import sparse_functions as fn
from exporters.sparse_functions import HALO, Triple

if TYPE_CHECKING:
    from torch import nn


def merged_cells_function(name: str, stages: int) -> onnx.FunctionProto:
    """The cells of stages 1, 2, 4, ... cells of the first wide, side by side: `sites_i [3, N_i]` -> `cells [3, N]`.

    Cells repeat where stages meet; z is 0.
    """
    body = fn.Body()
    inputs = [f"sites_{index}" for index in range(stages)]
    scaled = [body.op("Mul", sites, body.ints([[0], [1 << index], [1 << index]])) for index, sites in enumerate(inputs)]
    body.op("Concat", *scaled, axis=1, output="cells")
    return body.function(name, inputs, ["cells"])


def merged_features_function(name: str, grid: Triple, stages: int) -> onnx.FunctionProto:
    """`cells [3, N]`, `sites [3, M]`, `plane`, `table` of their index, `features_i [N_i, C]` -> their sums `[M, C]`."""
    body = fn.Body()
    pitch = grid[2] + 2 * HALO
    body.split("cells", ["z", "y", "x"])
    row = body.op("Mul", body.op("Add", "y", body.ints(HALO)), body.ints(pitch))
    yx = body.flat(body.op("Add", row, body.op("Add", "x", body.ints(HALO))))
    level = body.op("Gather", "table", body.ints(HALO), axis=0)  # the only height
    site = body.op("Gather", level, body.op("Gather", "plane", yx, axis=0), axis=0)
    features = [f"features_{index}" for index in range(stages)]
    joined = body.op("Concat", *features, axis=0)
    sizes = body.op(
        "Concat", body.op("Shape", "sites", start=1, end=2), body.op("Shape", joined, start=1, end=2), axis=0
    )
    empty = body.op("ConstantOfShape", sizes, value=numpy_helper.from_array(np.zeros(1, np.float32)))
    rows = body.op("Reshape", site, body.ints([-1, 1]))
    body.op("ScatterND", empty, rows, joined, reduction="add", output="result")
    return body.function(name, ["cells", "sites", "plane", "table", *features], ["result"], ["grid"])


def with_ones_function(name: str) -> onnx.FunctionProto:
    """`features [M, C]` -> `result [M, C + 1]`, whose last column is 1."""
    body = fn.Body()
    count = body.op("Concat", body.op("Shape", "features", start=0, end=1), body.ints([1]), axis=0)
    ones = body.op("ConstantOfShape", count, value=numpy_helper.from_array(np.ones(1, np.float32)))
    body.op("Concat", "features", ones, axis=1, output="result")
    return body.function(name, ["features"], ["result"])


def stage_ends(names: Sequence[str]) -> dict[str, str]:
    """The last layer of conv4, conv5 and conv6, to each its stage; nothing unless there is a conv6."""
    last = {name.split(".")[0]: name for name in names}
    return {last[stage]: stage for stage in ("conv4", "conv5", "conv6")} if "conv6" in last else {}


def make_dense(head: nn.Module) -> None:
    """Put a Conv2d in the place of every PointConv2d of a head whose norms are folded."""
    import torch

    from dm3d_deploy.models.voxelnext import PointConv2d

    for name, module in list(head.named_modules()):
        if isinstance(module, PointConv2d) and module.bias is not None:
            conv = torch.nn.Conv2d(module.in_channels, module.out_channels, 1)
            matrix = module.weight.detach().view(module.in_channels, module.out_channels)
            conv.weight = torch.nn.Parameter(matrix.t()[:, :, None, None].contiguous())
            conv.bias = module.bias
            parent, _, leaf = name.rpartition(".")
            setattr(head.get_submodule(parent), leaf, conv)


def only_where_active(model: onnx.ModelProto, empty_logit: float) -> onnx.ModelProto:
    """The same head over a map with one more channel, which is 1 where a cell is active.

    Elsewhere heat maps ("hm_0") hold `empty_logit` and all other outputs 0.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph, element = made.graph, model.graph.input[0].type.tensor_type.elem_type
    channels = graph.input[0].type.tensor_type.shape.dim[1]
    features = channels.dim_value
    channels.dim_value = features + 1
    kind = helper.tensor_dtype_to_np_dtype(element)
    constants = {
        "active.first": np.array([0]), "active.from": np.array([features]), "active.to": np.array([features + 1]),
        "active.axis": np.array([1]), "active.one": np.array(1, kind), "active.silence": np.array(-empty_logit, kind),
    }  # fmt: skip
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    outputs = {output.name for output in graph.output}
    for node in graph.node:
        node.input[:] = ["features" if name == graph.input[0].name else name for name in node.input]
        node.output[:] = [f"{name}.everywhere" if name in outputs else name for name in node.output]
    bev = graph.input[0].name
    before = [
        helper.make_node("Slice", [bev, "active.first", "active.from", "active.axis"], ["features"], name="features"),
        helper.make_node("Slice", [bev, "active.from", "active.to", "active.axis"], ["active"], name="active"),
        helper.make_node("Sub", ["active", "active.one"], ["inactive"], name="inactive"),  # -1 there, else 0
        helper.make_node("Mul", ["inactive", "active.silence"], ["silent"], name="silent"),
    ]
    after = []
    for name in (output.name for output in graph.output):
        heat = name.startswith("hm_")
        own = f"{name}.active" if heat else name
        after.append(helper.make_node("Mul", [f"{name}.everywhere", "active"], [own], name=own))
        if heat:
            after.append(helper.make_node("Add", [own, "silent"], [name], name=name))
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    return onnx.shape_inference.infer_shapes(made, check_type=True, strict_mode=True)
