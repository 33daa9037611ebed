"""The point network of pillars as one ONNX node, `dm3d::PillarsToBev`, whose body every runtime can execute.

    PillarsToBev(features f32[max_points, C], coords i32[max_points, 4], count i32[1])
        -> bev f32[1, C_out, H, W], status i32[1]

A row is a decorated point (`geometry.voxelize.pillar_points`), `coords` its pillar's cell (batch, 0, y, x); rows from
`count` on are not read. `status` is the number of pillars. The interface is that of SparseBackbone3d.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dm3d_deploy.artifacts import Graph
from dm3d_deploy.errors import ExportError
from exporters import sparse_functions as fn
from exporters.graph_files import write_graph

if TYPE_CHECKING:
    from dm3d_deploy.models.detector import Detector
    from dm3d_deploy.models.pillars import PFNLayer

NODE = "PillarsToBev"
MAX_POINTS = 2_000_000  # a graph's room is reserved once; no sensor gives as many points
INPUTS, OUTPUTS = ("features", "coords", "count"), ("bev", "status")


class _Pillars:
    """Writes the body: pillars are the cells of the flat bird's-eye view."""

    def __init__(self, size: tuple[int, int], places: int) -> None:
        self.body = fn.Body()
        self.size = size
        self.places = places

    def enter(self) -> str:
        """Cut the padding off, number each point's cell, and count the points of each; returns the points."""
        body = self.body
        count, first, axis = body.op("Cast", "count", to=TensorProto.INT64), body.ints([0]), body.ints([0])
        coords = body.op("Slice", "coords", first, count, axis)
        y = body.op("Slice", coords, body.ints([2]), body.ints([3]), body.ints([1]))
        x = body.op("Slice", coords, body.ints([3]), body.ints([4]), body.ints([1]))
        width = body.constant(np.array([self.size[1]], np.int32))
        self.cell = body.op("Add", body.op("Mul", y, width), x)  # [points, 1]
        ones = body.op("Add", body.op("Sub", x, x), body.constant(np.array([1], np.int32)))
        empty = self._grid(1, np.zeros(1, np.int32))
        self.counts = body.op("ScatterElements", empty, self.cell, ones, axis=0, reduction="add")
        self.occupied = body.op("Greater", self.counts, body.constant(np.array([0], np.int32)))
        return body.op("Slice", "features", first, count, axis)

    def _grid(self, channels: int, value: np.ndarray) -> str:
        shape = self.body.ints([self.size[0] * self.size[1], channels])
        return self.body.op("ConstantOfShape", shape, value=numpy_helper.from_array(value))

    def layer(self, name: str, rows: str, weight: np.ndarray, bias: np.ndarray) -> tuple[str, str]:
        """Emit linear, ReLU and the maximum over each pillar; returns features of points and of cells."""
        body = self.body
        product = body.op("MatMul", rows, body.constant(np.ascontiguousarray(weight.T), output=f"{name}.weight"))
        points = body.op("Relu", body.op("Add", product, body.constant(bias, output=f"{name}.bias")), output=name)
        channels = len(bias)
        index = body.op("Expand", self.cell, body.ints([1, channels]))
        empty = self._grid(channels, np.zeros(1, np.float32))
        top = body.op("ScatterElements", empty, index, points, axis=0, reduction="max")
        if self.places:  # an empty place passes the layer as a point of zeros and takes part in the maximum
            free = body.op("Less", self.counts, body.constant(np.array([self.places], np.int32)))
            spare = body.constant(np.maximum(bias, 0)[None])
            padded = body.op("And", self.occupied, free)
            top = body.op("Where", padded, body.op("Max", top, spare), top)
        return points, top

    def points_of(self, top: str, points: str) -> str:
        """Each point's features beside its pillar's."""
        return self.body.op("Concat", points, self.body.op("Gather", top, self.body.flat(self.cell), axis=0), axis=1)

    def leave(self, top: str, channels: int) -> None:
        """Emit the map and the status."""
        body = self.body
        body.op("Reshape", body.op("Transpose", top, perm=[1, 0]), body.ints([1, channels, *self.size]), output="bev")
        number = body.op("ReduceSum", body.op("Cast", self.occupied, to=TensorProto.INT32), keepdims=0)
        body.op("Reshape", number, body.ints([1]), output="status")


def export_pillars(detector: Detector, path: Path) -> Graph:
    """Write the point network, batch norms folded, with room for every point that the caps leave."""
    from dm3d_deploy.models.fold import fold_batch_norms

    voxels = detector.config.voxels
    capacity = min(voxels.max_voxels * voxels.max_points_per_voxel, MAX_POINTS)
    writer = _Pillars(detector.bev_shape, detector.vfe.places)
    rows, top, channels, columns = writer.enter(), "", 0, 0
    layers = [cast("PFNLayer", layer) for layer in fold_batch_norms(detector).vfe.pfn_layers]
    for index, layer in enumerate(layers):
        weight, bias = layer.linear.weight.detach().cpu().numpy(), layer.linear.bias.detach().cpu().numpy()
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            name = f"vfe.pfn_layers.{index}"
            raise ExportError(f"{name} holds weights that are not finite.", fix="check the checkpoint")
        points, top = writer.layer(f"pfn_layers.{index}", rows, weight, bias)
        channels, columns = len(bias), columns or weight.shape[1]
        if index + 1 < len(layers):
            rows = writer.points_of(top, points)
    writer.leave(top, channels)
    return write_graph(_model(writer, capacity, columns, channels), path, kind="pillars")


def _model(writer: _Pillars, capacity: int, columns: int, channels: int) -> onnx.ModelProto:
    grid = (1, *writer.size)
    attributes: dict[str, Any] = {"grid": grid, "max_points": capacity}
    node = helper.make_node(NODE, INPUTS, OUTPUTS, name="pillars", domain=fn.DOMAIN, **fn.PLUGIN, **attributes)
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "pillars",
        [
            tensor("features", TensorProto.FLOAT, [capacity, columns]),
            tensor("coords", TensorProto.INT32, [capacity, 4]),
            tensor("count", TensorProto.INT32, [1]),
        ],
        [tensor("bev", TensorProto.FLOAT, [1, channels, *writer.size]), tensor("status", TensorProto.INT32, [1])],
    )
    model = helper.make_model(
        graph,
        producer_name="dm3d-deploy",
        ir_version=fn.IR_VERSION,
        functions=[writer.body.function(NODE, INPUTS, OUTPUTS, list(attributes))],
        opset_imports=[helper.make_opsetid("", fn.OPSET), helper.make_opsetid(fn.DOMAIN, 1)],
    )
    helper.set_model_props(model, {"dm3d.grid_zyx": ",".join(map(str, grid))})
    return model
