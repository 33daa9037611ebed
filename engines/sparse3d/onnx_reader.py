"""The 3D backbone as the exporter wrote it into ONNX: stages of active sites, convolutions between them, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Float32

from dm3d_deploy.errors import EngineError

NODE = "SparseBackbone3d"
DOMAIN = "dm3d"
ENTRY = "input"
MERGED = "merged"
MERGED_STAGES = 3
MAX_TAPS = 31  # taps are bits of one word

Triple = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Active sites on one grid: those of the frame (no `source`), or those that a strided kernel reaches.

    Or, flat, all columns of the stages that it `merges`, whose cells are 1, 2, 4 of its own wide.
    """

    name: str
    grid: Triple
    source: str = ""
    kernel: Triple = (1, 1, 1)
    stride: Triple = (1, 1, 1)
    padding: Triple = (0, 0, 0)
    merges: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Convolution:
    """One layer: relu(convolution of `source` + bias + `adds`); `taps[i]` is the tap of the matrix weight[i].

    `source` and `adds` are names of layers; the empty name is the frame's features, or nothing added. The source
    MERGED is the sum over z of the layers that end the merged stages.
    """

    name: str
    weight: Float32[np.ndarray, "taps cin cout"]
    bias: Float32[np.ndarray, " cout"]
    taps: tuple[int, ...]
    kernel: Triple
    stage_in: str
    stage_out: str
    source: str
    adds: str = ""

    @property
    def submanifold(self) -> bool:
        """Whether its outputs are its inputs' sites."""
        return self.stage_in == self.stage_out

    @property
    def book(self) -> str:
        """The name of its rulebook, which layers with the same sites and kernel share."""
        size = "x".join(map(str, self.kernel))
        return f"{self.stage_out}.book.{size}" if self.submanifold else f"{self.stage_out}.book"


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """The whole: `layers` in forward order, the last of them becomes the bird's-eye view.

    `merged` names the layers that are added up in the stage MERGED. With `tells_active` the view has a last channel,
    1 at active cells.
    `given` names by output ("x_conv3") the layers whose rows leave the node too: features.x_conv3, sites.x_conv3.
    """

    stages: tuple[Stage, ...]
    layers: tuple[Convolution, ...]
    max_voxels: int
    columns: int
    merged: tuple[str, ...] = ()
    tells_active: bool = False
    given: Mapping[str, str] = field(default_factory=dict)

    def stage(self, name: str) -> Stage:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)

    @property
    def bev_shape(self) -> tuple[int, int, int, int]:
        """[1, channels * depth, height, width], a channel more where it tells active cells."""
        last = self.layers[-1]
        depth, height, width = self.stage(last.stage_out).grid
        return 1, (len(last.bias) + self.tells_active) * depth, height, width


def read_backbone(path: Path) -> Backbone:
    """Read backbone3d.onnx. EngineError for a file that is not ONNX, or not a backbone that can be planned."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError, ValueError) as error:
        raise EngineError(f"{path} cannot be read as ONNX: {error}.", fix="export it again") from None
    bodies = [function for function in model.functions if (function.domain, function.name) == (DOMAIN, NODE)]
    if len(bodies) != 1 or [node.op_type for node in model.graph.node] != [NODE]:
        raise EngineError(
            f"{path} is no 3D backbone: it does not hold one {DOMAIN}::{NODE} node and its function.",
            fix="give the backbone3d.onnx of an export, functions included",
        )
    call = _attributes(model.graph.node[0])
    shapes = {value.name: [size.dim_value for size in value.type.tensor_type.shape.dim] for value in model.graph.input}
    reader = _Reader(str(path))
    for node in bodies[0].node:
        reader.read(node)
    reader.outputs = dict(zip(model.graph.node[0].output, bodies[0].output, strict=False))
    return reader.backbone(max_voxels=int(call["max_voxels"]), columns=shapes["features"][1])


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


class _Reader:
    """Collects stages and layers from the nodes of the body, in their order."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.constants: dict[str, np.ndarray] = {}
        self.stages: dict[str, Stage] = {}
        self.layers: dict[str, Convolution] = {}
        self.cells: dict[str, dict[str, Any]] = {}
        self.sums: dict[str, str] = {}
        self.added: dict[str, str] = {}
        self.merges: dict[str, tuple[str, ...]] = {}
        self.merged: tuple[str, ...] = ()
        self.ones: dict[str, str] = {}
        self.outputs: dict[str, str] = {}
        self.last = ""

    def read(self, node: Any) -> None:
        """Take what the planner needs from one node; standard operators of the reference body say nothing new."""
        kind = node.op_type
        if node.domain == DOMAIN and kind.startswith("ChooseVoxels"):
            raise EngineError(
                f"{self.path} cannot be planned: it chooses voxels by their features, and a plan knows its cells "
                "before it computes one.",
                fix="run backbone3d.onnx in ONNX Runtime, or build with --voxel-keep 1",
            )
        if kind == "Constant":
            self._constant(node)
        elif kind == "Add" and node.input[0] in self.sums:
            self.sums[node.output[0]] = self.sums[node.input[0]]
            self.added[self.sums[node.input[0]]] = node.input[1]
        elif kind == "Relu" and node.input[0] in self.sums:
            self._close(self.sums[node.input[0]], node.output[0])
        elif node.domain == DOMAIN and kind.startswith("StridedCells"):
            self.cells[node.output[0]] = {**_attributes(node), "source": _stage_of(node.input[0])}
        elif node.domain == DOMAIN and kind.startswith("MergedCells"):
            self.merges[node.output[0]] = tuple(map(_stage_of, node.input))
        elif node.domain == DOMAIN and kind.startswith("MergedFeatures"):
            self.merged = tuple(node.input)[4:]  # behind cells, sites, plane, table
        elif node.domain == DOMAIN and kind.startswith("WithOnes"):
            self.ones[node.output[0]] = node.input[0]
        elif node.domain == DOMAIN and kind.startswith("CellIndex"):
            self._stage(node)
        elif node.domain == DOMAIN and kind.startswith(("SubMConv3d", "SparseConv3d")):
            self._convolution(node)
        elif node.domain == DOMAIN and kind == "ToBev":
            self.last = node.input[0]

    def _constant(self, node: Any) -> None:
        from onnx import numpy_helper

        if node.output[0].endswith((".weight", ".bias")):
            self.constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)

    def _stage(self, node: Any) -> None:
        name, grid = _stage_of(node.output[0]), _triple(_attributes(node)["grid"])
        shape = self.cells.get(node.input[0])
        if shape is None:
            self.stages[name] = Stage(name=name, grid=grid, merges=self.merges.get(node.input[0], ()))
            return
        kernel, stride, padding = (_triple(shape[word]) for word in ("kernel", "stride", "padding"))
        self.stages[name] = Stage(
            name=name, grid=grid, source=shape["source"], kernel=kernel, stride=stride, padding=padding
        )

    def _convolution(self, node: Any) -> None:
        name, attributes = node.name, _attributes(node)
        weight, bias = (self.constants.get(f"{name}.{part}") for part in ("weight", "bias"))
        if weight is None or bias is None or weight.dtype != np.float32 or weight.ndim != 3:
            self._refuse(f"the layer {name} holds no fp32 weights [taps, Cin, Cout]")
        source = self.layers.get(node.input[0])
        stage_in, before = (source.stage_out, source.name) if source else (ENTRY, "")
        if node.input[0] == MERGED:
            stage_in = before = MERGED
        stage_out = _stage_of(node.input[1])
        taps = tuple(int(tap) for tap in attributes.get("taps", ()))
        kernel = _triple(attributes["kernel"])
        if len(taps) != len(weight) or prod(kernel) > MAX_TAPS or any(not 0 <= tap < prod(kernel) for tap in taps):
            self._refuse(f"the layer {name} has taps {list(taps)} of a kernel {kernel}; at most {MAX_TAPS} can be run")
        self.layers[name] = Convolution(
            name=name, weight=weight, bias=bias, taps=taps, kernel=kernel,
            stage_in=stage_in, stage_out=stage_out, source=before,
        )  # fmt: skip
        self.sums[node.output[0]] = name

    def _close(self, name: str, output: str) -> None:
        adds = self.added.get(name, "")
        if output != name or (adds and adds not in self.layers):
            self._refuse(f"the layer {name} ends in '{output}' and adds '{adds}', not the result of a layer")
        self.layers[name] = replace(self.layers[name], adds=adds)

    def backbone(self, *, max_voxels: int, columns: int) -> Backbone:
        """Check what was collected."""
        layers = list(self.layers.values())
        if not layers or self.ones.get(self.last, self.last) != layers[-1].name or ENTRY not in self.stages:
            self._refuse(f"its map is made of '{self.last}', which is not the last layer")
        first = layers[0].source == "" and all(layer.source for layer in layers[1:])
        if not first or layers[0].weight.shape[1] != columns:
            self._refuse("more than one layer, or one of other channels, takes the frame's features")
        for layer in layers:
            self._check(layer)
        self._check_merged()
        return Backbone(
            stages=tuple(self.stages.values()), layers=tuple(layers), max_voxels=max_voxels, columns=columns,
            merged=self.merged, tells_active=self.last in self.ones, given=self._given(),
        )  # fmt: skip

    def _given(self) -> dict[str, str]:
        """The layers whose rows leave the node, in the order of its outputs: bev, status, then features and sites."""
        names = [name.removeprefix("features.") for name in self.outputs if name.startswith("features.")]
        pairs = [f"{part}.{name}" for name in names for part in ("features", "sites")]
        if list(self.outputs) != ["bev", "status", *pairs]:
            self._refuse(f"its outputs are {list(self.outputs)}, not bev, status, and features and sites of stages")
        given = {name: self.outputs[f"features.{name}"] for name in names}
        for name, layer in given.items():
            if layer not in self.layers or self.outputs[f"sites.{name}"] != f"{self.layers[layer].stage_out}.sites":
                self._refuse(f"its output features.{name} is '{layer}', which is no layer with the sites given")
        return given

    def _check(self, layer: Convolution) -> None:
        stage = self.stages[layer.stage_out]
        fits = layer.submanifold or (stage.source == layer.stage_in and stage.kernel == layer.kernel)
        added = self.layers.get(layer.adds)
        if not fits:
            self._refuse(f"the layer {layer.name} joins {layer.stage_in} to {layer.stage_out} by no kernel of its own")
        if added is not None and (added.stage_out, len(added.bias)) != (layer.stage_out, len(layer.bias)):
            self._refuse(f"the layer {layer.name} adds {layer.adds}, which has other sites or channels")

    def _check_merged(self) -> None:
        """Three stages, each with the last layer on it, all of the same channels, on grids that halve."""
        stages = self.stages[MERGED].merges if MERGED in self.stages else ()
        ends = [self.layers.get(name) for name in self.merged]
        if not stages and not ends:
            return
        height, width = self.stages[MERGED].grid[1:]
        halved = [(-(-height >> shift), -(-width >> shift)) for shift in range(MERGED_STAGES)]
        told = [(end.stage_out, len(end.bias)) for end in ends if end]
        wanted = [(stage, told[0][1]) for stage in stages] if told else []
        if told != wanted or [self.stages[stage].grid[1:] for stage in stages if stage in self.stages] != halved:
            self._refuse(f"it merges {list(self.merged)} of the stages {list(stages)}, not {MERGED_STAGES} that halve")

    def _refuse(self, what: str) -> NoReturn:
        raise EngineError(f"{self.path} cannot be planned: {what}.", fix="export it again with this version")


def _stage_of(output: str) -> str:
    return output.rpartition(".")[0]


def _triple(values: Iterator[int]) -> Triple:
    z, y, x = (int(value) for value in values)
    return z, y, x
