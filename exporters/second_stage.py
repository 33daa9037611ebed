"""The layers of a second stage as one ONNX graph: features in, scores and residuals of the RoIs out, float32.

    (features.x_convN f32[sites, C] ..., with keypoints also raw_points f32[points, C] and bev f32[1, C, H, W],
     and all that `geometry.pooling` names) -> rcnn_cls f32[rois, 1], rcnn_reg f32[rois, 7]

Everything that is an index or an offset comes in; keypoints and neighbours are searched in numpy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from dm3d_deploy.artifacts import Graph
from dm3d_deploy.config import PoolSource
from dm3d_deploy.errors import ExportError
from dm3d_deploy.geometry.pooling import KEYPOINTS, RAW
from dm3d_deploy.geometry.rois import CLS, REG, second_stage
from exporters import sparse_functions as fn
from exporters.graph_files import OPEN_ROWS, write_graph

if TYPE_CHECKING:
    from torch import nn

    from dm3d_deploy.models.detector import Detector

PLACES, ROIS = f"{OPEN_ROWS}places", f"{OPEN_ROWS}rois"


class _Writer:
    """Nodes and inputs of the graph; values are rows by channels."""

    def __init__(self) -> None:
        self.body = fn.Body()
        self.inputs: list[onnx.ValueInfoProto] = []

    def given(self, name: str, kind: int, shape: list[Any]) -> str:
        """Declare an input."""
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def rows_and_offsets(self, source: PoolSource, index: int, around: str, places: int | str) -> tuple[str, str, int]:
        """Declare the geometry of one grouping."""
        samples, name = source.groupings[index].samples, f"{around}.{source.name}.{index}"
        rows = self.given(f"{name}.rows", TensorProto.INT64, [places, samples])
        return rows, self.given(f"{name}.offsets", TensorProto.FLOAT, [places, samples, 3]), samples

    def mlp(self, name: str, module: nn.Module, rows: str) -> str:
        """Emit the linear layers and ReLUs of a torch Sequential, or of one layer."""
        from torch import nn

        for path, leaf in module.named_modules():
            full = f"{name}.{path}" if path else name
            if isinstance(leaf, nn.Linear):
                weight = leaf.weight.detach().flatten(1).t().cpu().numpy()
                bias = leaf.bias.detach().cpu().numpy()
                if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
                    raise ExportError(f"{full} holds weights that are not finite.", fix="check the checkpoint")
                matrix = self.body.constant(np.ascontiguousarray(weight), output=f"{full}.weight")
                product = self.body.op("MatMul", rows, matrix)
                rows = self.body.op("Add", product, self.body.constant(bias, output=f"{full}.bias"), output=full)
            elif isinstance(leaf, nn.ReLU):
                rows = self.body.op("Relu", rows, output=full)
            elif not isinstance(leaf, nn.Identity | nn.Dropout | nn.Sequential):
                raise ExportError(
                    f"{full} is a {type(leaf).__name__}, which has no ONNX form here.",
                    fix="build the second stage from linear layers, norms and ReLUs",
                )
        return rows

    def grouped(self, features: str, channels: int, rows: str) -> str:
        """Emit the features of neighbours, [places, samples, channels]; the row behind the last one is zero."""
        zeros = self.body.constant(np.zeros((1, channels), np.float32))
        return self.body.op("Gather", self.body.op("Concat", features, zeros, axis=0), rows, axis=0)

    def flat(self, value: str, channels: int) -> str:
        """Emit rows of `channels`."""
        return self.body.op("Reshape", value, self.body.ints([-1, channels]))

    def largest(self, rows: str, samples: int, channels: int) -> str:
        """Emit the maximum over the neighbours of each place."""
        whole = self.body.op("Reshape", rows, self.body.ints([-1, samples, channels]))
        return self.body.op("ReduceMax", whole, self.body.ints([1]), keepdims=0)

    def joined(self, parts: list[str]) -> str:
        """Emit parts side by side."""
        return parts[0] if len(parts) == 1 else self.body.op("Concat", *parts, axis=1)

    def ball_pool(self, scope: str, module: nn.Module, source: PoolSource, features: str, around: Any) -> str:
        """Emit a BallPool; `around` is (name, number of places)."""
        pooled = []
        for index, grouping in enumerate(source.groupings):
            rows, offsets, samples = self.rows_and_offsets(source, index, *around)
            found = self.body.op("Concat", offsets, self.grouped(features, source.channels, rows), axis=2)
            mlp = f"{scope}.mlps.{index}"
            hidden = self.mlp(mlp, module.get_submodule(f"mlps.{index}"), self.flat(found, 3 + source.channels))
            pooled.append(self.largest(hidden, samples, grouping.widths[-1]))
        return self.joined(pooled)

    def voxel_pool(self, scope: str, module: nn.Module, source: PoolSource, features: str) -> str:
        """Emit a VoxelPool."""
        pooled = []
        for index, grouping in enumerate(source.groupings):
            rows, offsets, samples = self.rows_and_offsets(source, index, "rois", PLACES)
            width = grouping.widths[0]
            names = {part: f"{scope}.mlps_{part}.{index}" for part in ("in", "pos", "out")}
            layers = {part: module.get_submodule(f"mlps_{part}.{index}") for part in names}
            inside = self.mlp(names["in"], layers["in"], features)
            found = self.flat(self.grouped(inside, width, rows), width)
            total = self.body.op("Add", found, self.mlp(names["pos"], layers["pos"], self.flat(offsets, 3)))
            top = self.largest(self.body.op("Relu", total), samples, width)
            pooled.append(self.mlp(names["out"], layers["out"], top))
        return self.joined(pooled)


def second_stage_model(detector: Detector) -> onnx.ModelProto:
    """The graph, batch norms folded."""
    from dm3d_deploy.models.fold import fold_batch_norms

    folded, stage, writer = fold_batch_norms(detector), second_stage(detector.config), _Writer()
    head, body = folded.get_submodule("roi_head"), writer.body
    widths = {
        source.name: source.channels
        for source in (*(stage.keypoints.sources if stage.keypoints else ()), *stage.sources)
    }
    features = {
        name: writer.given(f"features.{name}", TensorProto.FLOAT, [f"{OPEN_ROWS}{name}", widths[name]])
        for name in stage.stages_read
    }
    if stage.keypoints is None:
        parts = []
        for index, source in enumerate(stage.sources):
            scope = f"roi_grid_pool_layers.{index}"
            parts.append(
                writer.voxel_pool(f"roi_head.{scope}", head.get_submodule(scope), source, features[source.name])
            )
        pooled = writer.flat(writer.joined(parts), stage.grid**3 * sum(s.out_channels for s in stage.sources))
        names = [["cls_fc_layers", "cls_pred_layer"], ["reg_fc_layers", "reg_pred_layer"]]
    else:
        (source,) = stage.sources
        scope = "roi_grid_pool_layer"
        keypoints = _keypoints(writer, folded, features)
        places = writer.ball_pool(f"roi_head.{scope}", head.get_submodule(scope), source, keypoints, ("rois", PLACES))
        cubes = body.op("Reshape", places, body.ints([-1, stage.grid**3, source.out_channels]))
        pooled = writer.flat(body.op("Transpose", cubes, perm=[0, 2, 1]), stage.grid**3 * source.out_channels)
        names = [["cls_layers"], ["reg_layers"]]
    shared = writer.mlp("roi_head.shared_fc_layer", head.get_submodule("shared_fc_layer"), pooled)
    for output, modules in zip((CLS, REG), names, strict=True):
        rows = shared
        for name in modules:
            rows = writer.mlp(f"roi_head.{name}", head.get_submodule(name), rows)
        body.op("Identity", rows, output=output)
    return _model(writer)


def _keypoints(writer: _Writer, folded: Detector, features: dict[str, str]) -> str:
    """Emit VoxelSetAbstraction and PointHeadSimple; returns the weighted features of the keypoints."""
    config, body = second_stage(folded.config).keypoints, writer.body
    if config is None:
        raise ExportError(f"{folded.config.name} has no keypoints.", fix="export a PV-RCNN")
    parts = []
    if config.bev_channels:
        height, width = folded.bev_shape
        bev = writer.given("bev", TensorProto.FLOAT, [1, config.bev_channels, height, width])
        cells = writer.flat(body.op("Transpose", bev, perm=[0, 2, 3, 1]), config.bev_channels)
        rows = writer.given("keypoints.bev.rows", TensorProto.INT64, [config.count, 4])
        weights = writer.given("keypoints.bev.weights", TensorProto.FLOAT, [config.count, 4])
        corners = body.op("Gather", cells, rows, axis=0)
        weighed = body.op("Mul", corners, body.op("Unsqueeze", weights, body.ints([2])))
        parts.append(body.op("ReduceSum", weighed, body.ints([1]), keepdims=0))
    stages = [source for source in config.sources if source.name != RAW]
    for source in config.sources:
        scope = "pfe.SA_rawpoints" if source.name == RAW else f"pfe.SA_layers.{stages.index(source)}"
        rows = features.get(source.name) or writer.given(RAW, TensorProto.FLOAT, [f"{OPEN_ROWS}{RAW}", source.channels])
        around = (KEYPOINTS, config.count)
        parts.append(writer.ball_pool(scope, folded.get_submodule(scope), source, rows, around))
    whole = writer.joined(parts)
    names = ("pfe.vsa_point_feature_fusion", "point_head.cls_layers")
    fused, score = (writer.mlp(name, folded.get_submodule(name), whole) for name in names)
    return body.op("Mul", fused, body.op("Sigmoid", score))


def _model(writer: _Writer) -> onnx.ModelProto:
    tensor = helper.make_tensor_value_info
    outputs = [tensor(CLS, TensorProto.FLOAT, [ROIS, 1]), tensor(REG, TensorProto.FLOAT, [ROIS, 7])]
    graph = helper.make_graph(writer.body.nodes, "second_stage", writer.inputs, outputs)
    opsets = [helper.make_opsetid("", fn.OPSET)]
    return helper.make_model(graph, producer_name="dm3d-deploy", ir_version=fn.IR_VERSION, opset_imports=opsets)


def export_second_stage(detector: Detector, path: Path) -> Graph:
    """Write the graph; equal detectors give equal bytes."""
    return write_graph(second_stage_model(detector), path, kind="second_stage")
