"""The 3D backbone as one ONNX node, `dm3d::SparseBackbone3d`, whose function body every runtime can execute.

    SparseBackbone3d(features f32[max_voxels, C], coords i32[max_voxels, 4], count i32[1])
        -> bev f32[1, C_out * D, H, W], status i32[S]
           and for each stage that a second stage reads: features.x_convN f32[sites, C], sites.x_convN i64[3, sites]

`coords` are (batch, z, y, x), unique cells inside the grid, in any order; rows from `count` on are not read, and the
batch column is not either: one frame at a time. `status[0]` is the number of active sites of the input stage, and
`status[i]` that after the i-th strided layer; for VoxelResBackBone8x: conv_input and conv1, conv2, conv3, conv4,
conv_out. A runtime that knows the node (the TensorRT plugin) replaces the body; others run it. `sites` are z, y, x in
raster order. A plan gives all rows that it has room for: behind those of the frame zeros, and -1 for sites.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from jaxtyping import Float32
from onnx import TensorProto, helper

from dm3d_deploy.artifacts import Graph
from dm3d_deploy.errors import ExportError
from exporters import sparse_functions as fn
from exporters.graph_files import OPEN_ROWS, write_graph
from exporters.sparse_functions import Triple
from exporters.voxel_choice import choose_function, put_back_function
from exporters.voxelnext import merged_cells_function, merged_features_function, stage_ends, with_ones_function

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dm3d_deploy.models.detector import Detector

NODE = "SparseBackbone3d"
FIX = "export a VoxelResBackBone8x"


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseLayer:
    """One sparse convolution, its bias, then ReLU. Layers of one `key` share sites and rulebook.

    `adds`: the name of the earlier layer whose result is added before the ReLU, or nothing. `permille`: the thousandths
    of the stage's voxels that it runs on; where that changes, voxels are chosen (`dm3d_deploy.models.voxel_pruning`).
    """

    name: str
    weight: Float32[np.ndarray, "cout kz ky kx cin"]
    bias: Float32[np.ndarray, " cout"]
    stride: Triple
    padding: Triple
    submanifold: bool
    key: str
    adds: str = ""
    permille: int = 1000

    def __post_init__(self) -> None:
        reach = [pad > fn.HALO for pad in self.padding]
        if any(reach) or (self.submanifold and any(size % 2 == 0 for size in self.kernel)):
            raise ExportError(
                f"{self.name}: kernel {self.kernel} with padding {self.padding} cannot be written.",
                fix="use paddings of 0 or 1, and odd kernels of at most 3 in sub-manifold layers",
            )

    @property
    def kernel(self) -> Triple:
        """Kernel size along z, y, x."""
        _, z, y, x, _ = self.weight.shape
        return z, y, x

    @property
    def taps(self) -> list[int]:
        """Kept taps in the order of summation: the centre of a sub-manifold kernel first."""
        centre = fn.centre_tap(self.kernel)
        return sorted(fn.kept_taps(self.weight), key=lambda tap: (not (self.submanifold and tap == centre), tap))

    @property
    def paired_taps(self) -> list[int]:
        """Kept taps that need pairs of rows: all but the centre of a sub-manifold kernel."""
        centre = fn.centre_tap(self.kernel) if self.submanifold else -1
        return [tap for tap in self.taps if tap != centre]


class _Assembly:
    """Writes the body of SparseBackbone3d layer by layer and collects the functions that it calls."""

    def __init__(self, layers: Sequence[SparseLayer], grid: Triple) -> None:
        self.body = fn.Body()
        self.functions: dict[str, onnx.FunctionProto] = {}
        self.grid = grid
        self.counts: list[str] = []
        self.taps: dict[str, set[int]] = {}
        for layer in layers:
            self.taps.setdefault(layer.key, set()).update(layer.paired_taps)
        self.booked: set[str] = set()
        self.passed_by: tuple[str, str] | None = None
        self.kept: dict[str, str] = {}
        self.given: list[onnx.ValueInfoProto] = []
        self.made: list[str] = []
        self.stage = ""

    def _define(self, function: onnx.FunctionProto) -> str:
        self.functions[function.name] = function
        return str(function.name)

    def _index(self, stage: str, cells: str, *, counted: bool = True) -> None:
        """Make the sites of `cells` the current stage; where they are `counted` their number is told."""
        body, index = self.body, "x".join(map(str, self.grid))
        function = self._define(fn.index_function(f"CellIndex_{index}", self.grid))
        outputs = [f"{stage}.{part}" for part in ("sites", "order", "plane", "table")]
        body.call(function, [cells], outputs, f"{stage}.index", grid=self.grid)
        if counted:
            self.counts.append(body.op("Shape", outputs[0], start=1, end=2))
        self.stage = stage

    def enter(self) -> str:
        """Cut the padding off, index the voxels, and put their features into raster order."""
        body = self.body
        count = body.op("Max", body.op("Cast", "count", to=TensorProto.INT64), body.ints([0]))
        first, axis = body.ints([0]), body.ints([0])
        coords = body.op("Slice", "coords", first, count, axis)
        zyx = body.op("Slice", coords, body.ints([1]), body.ints([4]), body.ints([1]))
        cells = body.op("Transpose", body.op("Cast", zyx, to=TensorProto.INT64), perm=[1, 0])
        self._index("input", cells)
        features = body.op("Slice", "features", first, count, axis)
        return body.op("Gather", features, "input.order", axis=0)

    def _rulebook(self, layer: SparseLayer, source: str, grid: Triple) -> None:
        """Emit the rulebook of the layer's key unless an earlier layer of the same key did, or no tap is left."""
        taps = sorted(self.taps[layer.key])
        if layer.key in self.booked or not taps:
            return
        self.booked.add(layer.key)
        shape = (grid, layer.kernel, layer.stride, layer.padding)
        kind = "SubM" if layer.submanifold else "Strided"
        function = self._define(fn.rulebook_function(f"{kind}Rulebook_{layer.key}", *shape, taps))
        outputs = [f"{layer.key}.{pair}" for pair in fn.rulebook_pairs(taps)]
        inputs = [f"{self.stage}.sites", f"{source}.plane", f"{source}.table"]
        kernel, stride, padding = layer.kernel, layer.stride, layer.padding
        self.body.call(
            function, inputs, outputs, f"{layer.key}.rulebook",
            grid=grid, kernel=kernel, stride=stride, padding=padding, taps=taps,
        )  # fmt: skip

    def _down(self, layer: SparseLayer) -> None:
        """Move to the output sites of a strided layer."""
        grid, source, cells = self.grid, self.stage, f"{layer.key}.cells"
        shape = (grid, layer.kernel, layer.stride, layer.padding)
        self.grid = fn.output_grid(*shape)
        if min(self.grid) < 1:
            raise ExportError(f"{layer.name}: a grid of {grid} leaves no output.", fix="use a larger point cloud range")
        function = self._define(fn.strided_cells_function(f"StridedCells_{layer.key}", *shape))
        attributes = {"grid": grid, "kernel": layer.kernel, "stride": layer.stride, "padding": layer.padding}
        self.body.call(function, [f"{source}.sites"], [cells], cells, **attributes)
        self._index(layer.key, cells)
        self._rulebook(layer, source, grid)

    def choose(self, layer: SparseLayer, features: str) -> str:
        """Leave voxels out from here on, until `put_back`; returns the features of the others."""
        self.passed_by = self.stage, features
        stage = layer.key
        function = self._define(choose_function(layer.permille))
        outputs = [f"{stage}.features", f"{stage}.cells", f"{stage}.rows"]
        self.body.call(function, [features, f"{self.stage}.sites"], outputs, f"{stage}.choice")
        self._index(stage, outputs[1], counted=False)
        self.kept[features] = outputs[0]
        return outputs[0]

    def put_back(self, features: str) -> str:
        """Make the whole stage current again, the kept voxels with `features`; returns all of them."""
        if self.passed_by is None:
            return features
        (whole, before), made = self.passed_by, f"{self.stage}.all"
        self.body.call(self._define(put_back_function()), [before, f"{self.stage}.rows", features], [made], made)
        self.stage, self.passed_by = whole, None
        return made

    def convolve(self, layer: SparseLayer, features: str) -> str:
        """Emit one layer; returns the name of its result."""
        body = self.body
        if layer.submanifold:
            self._rulebook(layer, self.stage, self.grid)
        else:
            self._down(layer)
        taps, paired = layer.taps, layer.paired_taps
        centre = len(taps) > len(paired)
        kind = "SubMConv3d" if centre else "SparseConv3d"
        function = self._define(fn.convolution_function(f"{kind}_{len(paired)}", len(paired), centre=centre))
        weight = body.constant(fn.packed_taps(layer.weight, taps), output=f"{layer.name}.weight")
        bias = body.constant(layer.bias.astype(np.float32), output=f"{layer.name}.bias")
        pairs = [f"{layer.key}.{pair}" for pair in fn.rulebook_pairs(paired)]
        total = f"{layer.name}.sum"
        inputs = [features, f"{self.stage}.sites", weight, bias, *pairs]
        body.call(function, inputs, [total], layer.name, kernel=layer.kernel, taps=taps)
        if layer.adds:
            total = body.op("Add", total, self.kept.get(layer.adds, layer.adds))
        return body.op("Relu", total, output=layer.name)

    def merge(self, ends: Sequence[tuple[str, str, Triple]]) -> str:
        """Move to the flat sum of stages (features, stage, grid); returns its features."""
        body, cells = self.body, "merged.cells"
        self.grid = (1, *ends[0][2][1:])
        function = self._define(merged_cells_function("MergedCells", len(ends)))
        body.call(function, [f"{stage}.sites" for _, stage, _ in ends], [cells], cells)
        self._index("merged", cells)
        function = self._define(merged_features_function("MergedFeatures", self.grid, len(ends)))
        index = [f"merged.{part}" for part in ("sites", "plane", "table")]
        body.call(function, [cells, *index, *(end[0] for end in ends)], ["merged"], "merged", grid=self.grid)
        return "merged"

    def tell_active(self, features: str) -> str:
        """Give active cells a last channel of ones."""
        self.body.call(self._define(with_ones_function("WithOnes")), [features], ["active"], "active")
        return "active"

    def give(self, stage: str, features: str, channels: int) -> None:
        """Let the features and sites of a stage out, those of its last layer so far."""
        rows, tensor = f"{OPEN_ROWS}{stage}", helper.make_tensor_value_info
        values = [
            tensor(f"features.{stage}", TensorProto.FLOAT, [rows, channels]),
            tensor(f"sites.{stage}", TensorProto.INT64, [3, rows]),
        ]
        known = [value.name for value in self.given]
        at = known.index(values[0].name) if values[0].name in known else len(known)
        self.given[at : at + 2] = values
        self.made[at : at + 2] = [features, f"{self.stage}.sites"]

    def leave(self, features: str, channels: int) -> None:
        """Emit the BEV map and the status."""
        function = self._define(fn.bev_function("ToBev", self.grid, channels))
        self.body.call(function, [features, f"{self.stage}.sites"], ["bev"], "to_bev", grid=self.grid)
        counts = self.body.op("Concat", *self.counts, axis=0)
        self.body.op("Cast", counts, to=TensorProto.INT32, output="status")


def backbone_model(
    layers: Sequence[SparseLayer], *, grid_zyx: Triple, max_voxels: int, plan_file: str = "", stages: Sequence[str] = ()
) -> onnx.ModelProto:
    """The whole model from plain layers; `grid_zyx` is the sparse grid of the input, `stages` ("x_conv2") also go out.

    `plan_file` tells the TensorRT plugin where the node's plan lies, relative to the folder in which TensorRT runs.
    """
    assembly = _Assembly(layers, grid_zyx)
    features = assembly.enter()
    last, ends = stage_ends([layer.name for layer in layers]), []
    for layer, behind in zip(layers, [*layers[1:], None], strict=True):
        if layer.permille < 1000 and assembly.passed_by is None:
            features = assembly.choose(layer, features)
        features = assembly.convolve(layer, features)
        if behind is None or behind.key != layer.key:
            features = assembly.put_back(features)
        if layer.name in last:
            ends.append((features, assembly.stage, assembly.grid))
            features = assembly.merge(ends) if len(ends) == len(last) else features
        if (stage := f"x_{layer.name.split('.')[0]}") in stages:
            assembly.give(stage, features, len(layer.bias))
    channels = len(layers[-1].bias)
    if last:
        features, channels = assembly.tell_active(features), channels + 1
    assembly.leave(features, channels)
    inputs = ["features", "coords", "count"]
    attributes: dict[str, Any] = {"grid": grid_zyx, "max_voxels": max_voxels}
    if plan_file:
        attributes["plan_file"] = plan_file
    outputs = ["bev", "status", *(value.name for value in assembly.given)]
    main = assembly.body.function(NODE, inputs, ["bev", "status", *assembly.made], list(attributes))
    node = helper.make_node(NODE, inputs, outputs, name="backbone_3d", domain=fn.DOMAIN, **fn.PLUGIN, **attributes)
    depth, height, width = assembly.grid
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "backbone_3d",
        [
            tensor("features", TensorProto.FLOAT, [max_voxels, layers[0].weight.shape[-1]]),
            tensor("coords", TensorProto.INT32, [max_voxels, 4]),
            tensor("count", TensorProto.INT32, [1]),
        ],
        [
            tensor("bev", TensorProto.FLOAT, [1, channels * depth, height, width]),
            tensor("status", TensorProto.INT32, [len(assembly.counts)]),
            *assembly.given,
        ],
    )
    return _as_model(graph, [*assembly.functions.values(), main], grid_zyx)


def _as_model(graph: onnx.GraphProto, functions: list[onnx.FunctionProto], grid_zyx: Triple) -> onnx.ModelProto:
    model = helper.make_model(
        graph,
        producer_name="dm3d-deploy",
        ir_version=fn.IR_VERSION,
        functions=functions,
        opset_imports=[helper.make_opsetid("", fn.OPSET), helper.make_opsetid(fn.DOMAIN, 1)],
    )
    helper.set_model_props(model, {"dm3d.grid_zyx": ",".join(map(str, grid_zyx))})
    return model


def _layer(name: str, conv: nn.Module, adds: str = "") -> SparseLayer:
    from dm3d_deploy.models.sparse import SparseConv3d, SubMConv3d

    if not isinstance(conv, SparseConv3d | SubMConv3d):
        raise ExportError(f"{name} is a {type(conv).__name__}, not a sparse convolution.", fix=FIX)
    z, y, x = conv.kernel
    return SparseLayer(
        name=name,
        weight=_array(conv.weight).reshape(conv.out_channels, *conv.kernel, conv.in_channels),
        bias=np.zeros(conv.out_channels, np.float32) if conv.bias is None else _array(conv.bias),
        stride=(1, 1, 1) if isinstance(conv, SubMConv3d) else conv.stride,
        padding=(z // 2, y // 2, x // 2) if isinstance(conv, SubMConv3d) else conv.padding,
        submanifold=isinstance(conv, SubMConv3d),
        key=conv.indice_key,
        adds=adds,
    )


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().cpu().numpy().astype(np.float32)
    return array


def _layers_of(name: str, module: nn.Module, source: str) -> Iterator[SparseLayer]:
    """The layers of one module; `source` is the layer that feeds it."""
    from dm3d_deploy.models.backbone3d import ConvNormReLU, SparseBasicBlock

    if isinstance(module, ConvNormReLU):
        yield _layer(f"{name}.0", module[0])
    elif isinstance(module, SparseBasicBlock):
        yield _layer(f"{name}.conv1", module.conv1)
        yield _layer(f"{name}.conv2", module.conv2, adds=source)
    elif type(module).__name__ == "Sequential":
        for child, inner in module.named_children():
            for layer in _layers_of(f"{name}.{child}", inner, source):
                yield layer
                source = layer.name
    elif type(module).__name__ != "Identity":  # that is what a removed block leaves
        raise ExportError(
            f"{name} is a {type(module).__name__}: the exporter knows ConvNormReLU and SparseBasicBlock.",
            fix=FIX,
        )


def sparse_layers(detector: Detector) -> tuple[SparseLayer, ...]:
    """The 3D backbone as plain layers in forward order, batch norms folded, named as the torch modules are."""
    from dm3d_deploy.models.fold import fold_batch_norms
    from dm3d_deploy.models.voxel_pruning import permille_of

    layers: list[SparseLayer] = []
    for name, module in fold_batch_norms(detector).backbone_3d.named_children():
        layers += _layers_of(name, module, layers[-1].name if layers else "")
    shares = permille_of(detector)
    return tuple(
        replace(layer, permille=shares[stage], key=f"{layer.key}_kept")
        if layer.submanifold and (stage := layer.name.split(".")[0]) in shares
        else layer
        for layer in layers
    )


def export_backbone3d(detector: Detector, path: Path, *, max_voxels: int, plan_file: str = "") -> Graph:
    """Write the 3D backbone, batch norms folded, taps without weights left out; equal detectors give equal bytes.

    `plan_file` is the attribute by which the TensorRT plugin finds the node's plan (`backbone_model`).
    """
    if max_voxels < 1:
        raise ExportError(f"max_voxels is {max_voxels}.", fix="give the backbone room for at least one voxel")
    layers = sparse_layers(detector)
    finite = [layer.name for layer in layers if not (np.isfinite(layer.weight).all() and np.isfinite(layer.bias).all())]
    if finite:
        raise ExportError(
            f"{len(finite)} layers hold weights that are not finite, first {finite[0]}.", fix="check the checkpoint"
        )
    grid = detector.backbone_3d.shape_zyx
    second = detector.config.second_stage
    stages = () if second is None else second.stages_read
    model = backbone_model(layers, grid_zyx=grid, max_voxels=max_voxels, plan_file=plan_file, stages=stages)
    return write_graph(model, path, kind="backbone3d")
