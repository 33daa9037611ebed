"""BEV backbone and head as one dense ONNX graph, written module by module: no tracing, equal bytes every time.

Input `bev [1, C, H, W]`. Outputs are the raw maps before any sigmoid, task by task and within a task in the head's own
order: center_0, center_z_0, dim_0, rot_0, vel_0, hm_0, center_1, ...; of an anchor head cls, box and dir, each with the
channels of a cell's anchors one after the other. Initialisers carry the names of the torch parameters. The precision is
that of the whole graph, inputs and outputs included: TensorRT runs it strongly typed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import onnx
from onnx import helper, numpy_helper

from dm3d_deploy.artifacts import Graph
from dm3d_deploy.errors import ExportError, UsageError
from exporters.graph_files import write_graph
from exporters.head_merge import merge_heads
from exporters.sparse_functions import IR_VERSION, OPSET

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dm3d_deploy.models.center_head import SeparateHead
    from dm3d_deploy.models.detector import Detector

TYPES: dict[str, np.dtype] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}


class _Writer:
    """Nodes and initialisers of a graph in one precision."""

    def __init__(self, precision: np.dtype) -> None:
        self.precision = precision
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.refused: list[str] = []
        self.rounded_to_zero = 0

    def weight(self, name: str, tensor: Tensor) -> str:
        """Add an initialiser; what does not fit the precision is noted in `refused`."""
        exact = tensor.detach().cpu().numpy()
        with np.errstate(over="ignore"):
            value = exact.astype(self.precision)
        if not np.isfinite(value).all():
            largest = float(np.abs(exact).max())
            self.refused.append(f"{name} ({int((~np.isfinite(value)).sum())} of {value.size}, largest {largest:g})")
        self.rounded_to_zero += int(((value == 0) & (exact != 0)).sum())
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def node(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Add one node whose output is called like the node."""
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def convolution(self, name: str, module: nn.Conv2d | nn.ConvTranspose2d, source: str, margin: list[int]) -> str:
        """Add a convolution; `margin` (left, right, top, bottom) is that of a ZeroPad2d before it."""
        from torch import nn

        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise ExportError(f"{name} pads by '{module.padding_mode}'.", fix="use zero padding given in cells")
        left, right, top, bottom = margin
        y, x = module.padding
        kind, attributes = "Conv", {}
        if isinstance(module, nn.ConvTranspose2d):
            kind, attributes = "ConvTranspose", {"output_padding": list(module.output_padding)}
            if any(margin):
                raise ExportError(f"{name} is a ConvTranspose2d behind a ZeroPad2d.", fix="pad inside the convolution")
        inputs = [source, self.weight(f"{name}.weight", module.weight)]
        if module.bias is not None:
            inputs.append(self.weight(f"{name}.bias", module.bias))
        return self.node(
            kind,
            inputs,
            name,
            kernel_shape=list(module.kernel_size),
            strides=list(module.stride),
            pads=[y + top, x + left, y + bottom, x + right],
            dilations=list(module.dilation),
            group=module.groups,
            **attributes,
        )

    def chain(self, name: str, module: nn.Module, source: str) -> str:
        """Add the leaves of a torch Sequential, or of nested ones, in order."""
        from torch import nn

        margin = [0, 0, 0, 0]
        leaves = [(path, leaf) for path, leaf in module.named_modules() if not isinstance(leaf, nn.Sequential)]
        for path, leaf in leaves:
            full = f"{name}.{path}" if path else name
            if isinstance(leaf, nn.ZeroPad2d):
                margin = [a + b for a, b in zip(margin, leaf.padding, strict=True)]
            elif isinstance(leaf, nn.Conv2d | nn.ConvTranspose2d):
                source, margin = self.convolution(full, leaf, source, margin), [0, 0, 0, 0]
            elif any(margin):
                raise ExportError(f"{full} follows a ZeroPad2d.", fix="put the padding before a convolution")
            elif isinstance(leaf, nn.ReLU):
                source = self.node("Relu", [source], full)
            elif not isinstance(leaf, nn.Identity):
                raise ExportError(
                    f"{full} is a {type(leaf).__name__}, which has no ONNX form here.",
                    fix="build the detector from Conv2d, ConvTranspose2d, BatchNorm2d, ReLU and ZeroPad2d",
                )
        return source


def bev_head_model(detector: Detector, *, precision: Literal["fp16", "fp32"]) -> tuple[onnx.ModelProto, int]:
    """The graph, and how many weights other than zero the precision rounded to zero."""
    from dm3d_deploy.geometry.center_boxes import EMPTY_LOGIT
    from dm3d_deploy.models.fold import fold_batch_norms
    from dm3d_deploy.models.voxelnext import SparseCenterHead
    from exporters.voxelnext import make_dense, only_where_active

    if precision not in TYPES:
        raise UsageError(f"there is no precision '{precision}'.", fix="choose fp16 or fp32")
    folded = fold_batch_norms(detector)
    sparse = isinstance(folded.dense_head, SparseCenterHead)
    if sparse:
        make_dense(folded.dense_head)
    writer = _Writer(TYPES[precision])
    flow, levels = "bev", []
    for i, (block, deblock) in enumerate(zip(folded.backbone_2d.blocks, folded.backbone_2d.deblocks, strict=True)):
        flow = writer.chain(f"backbone_2d.blocks.{i}", block, flow)
        levels.append(writer.chain(f"backbone_2d.deblocks.{i}", deblock, flow))
    features = writer.node("Concat", levels, "backbone_2d.features", axis=1) if levels else flow
    anchors = "conv_cls" in dict(folded.dense_head.named_children())
    outputs = (_anchor_outputs if anchors else _center_outputs)(writer, folded.dense_head, features)
    if writer.refused:
        raise ExportError(
            f"{len(writer.refused)} tensors do not fit {precision}: {'; '.join(writer.refused[:5])}.",
            fix="export fp32, or check the checkpoint for weights that grew without bound",
        )
    model = _model(writer, _bev_shape(folded), outputs)
    return only_where_active(model, EMPTY_LOGIT) if sparse else model, writer.rounded_to_zero


def _center_outputs(writer: _Writer, dense_head: nn.Module, features: str) -> list[str]:
    """Write a CenterHead, or the sparse one, which has no shared convolution; returns the outputs."""
    shared = features
    if "shared_conv" in dict(dense_head.named_children()):
        shared = writer.chain("dense_head.shared_conv", dense_head.get_submodule("shared_conv"), features)
    outputs = []
    for task, head in enumerate(cast("Iterable[SeparateHead]", dense_head.get_submodule("heads_list").children())):
        for branch in head.names:
            writer.chain(f"dense_head.heads_list.{task}.{branch}", head.get_submodule(branch), shared)
            writer.nodes[-1].output[0] = f"{branch}_{task}"
            outputs.append(f"{branch}_{task}")
    return outputs


def _anchor_outputs(writer: _Writer, dense_head: nn.Module, features: str) -> list[str]:
    """Write an anchor head, its maps of all anchors whole: cls, box and dir; returns the outputs."""
    outputs = []
    for name, module in dense_head.named_children():
        writer.chain(f"dense_head.{name}", module, features)
        outputs.append(name.split("_")[1])
        writer.nodes[-1].output[0] = outputs[-1]
    return outputs


def _bev_shape(detector: Detector) -> list[int]:
    """Without the channel that tells active cells from others."""
    from torch import nn

    modules = (*detector.backbone_2d.modules(), *detector.dense_head.modules())
    first = next(module for module in modules if isinstance(module, nn.Conv2d))
    return [1, first.in_channels, *detector.bev_shape]


def _model(writer: _Writer, shape: list[int], outputs: list[str]) -> onnx.ModelProto:
    element = helper.np_dtype_to_tensor_dtype(writer.precision)
    graph = helper.make_graph(
        writer.nodes,
        "bev_head",
        [helper.make_tensor_value_info("bev", element, shape)],
        [helper.make_tensor_value_info(name, element, None) for name in outputs],
        writer.weights,
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, producer_name="dm3d-deploy", ir_version=IR_VERSION, opset_imports=opsets)
    return onnx.shape_inference.infer_shapes(merge_heads(model), check_type=True, strict_mode=True)


def export_bev_head(detector: Detector, path: Path, *, precision: Literal["fp16", "fp32"]) -> Graph:
    """Write the graph, batch norms folded; `rounded_to_zero` of the result counts weights lost to the precision."""
    model, rounded = bev_head_model(detector, precision=precision)
    return write_graph(model, path, kind=f"bev_head_{precision}", rounded_to_zero=rounded)
