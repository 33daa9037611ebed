"""Plans a 3D backbone: from frame to bird's-eye view as launches with static capacities and counts on the device.

Order of the steps: the frame's cells into the first stage; then layer by layer, and before the first layer of a
stage or rulebook what it needs: the output sites, the rulebook, the tile lists of all layers that share it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np

from dm3d_deploy.errors import EngineError, UsageError, nearest
from engines.sparse3d.assembly import INT_LIMIT, Array, Assembly
from engines.sparse3d.cost import cost_of
from engines.sparse3d.entry import Frame, enter
from engines.sparse3d.onnx_reader import ENTRY, MERGED, Backbone, Convolution, Stage
from engines.sparse3d.packing import TiledWeights, pitch_of, tiled_weights
from engines.sparse3d.plan import ELEMENT_BYTES, Plan, PlanLayer, StatusWord
from engines.sparse3d.shapes import DEVICE, MOST_BLOCKS, KernelShapes, power_of_two, programs
from engines.sparse3d.sites import FrameStatistics, capacities_from

Precision = Literal["fp16", "fp32"]
NUMPY_OF = {"fp16": np.float16, "fp32": np.float32}
DROPPED = (
    "outside the grid",
    "in the cell of another row",
    "not finite or beyond 2**20",
    "beyond the cut-off",
    "behind the last row",
)
COUNTS_FROM = len(DROPPED) + 1  # the cut-off radius lies between
OUT_CHANNELS = 64


def plan_backbone(
    backbone: Backbone,
    *,
    frame: Frame,
    capacities: Mapping[str, int],
    precision: Precision = "fp16",
    shapes: KernelShapes = DEVICE,
    keep: Sequence[str] = (),
    count_tiles: bool = False,
    calibration: Sequence[FrameStatistics] = (),
) -> Plan:
    """The launch plan of one backbone; equal arguments give equal plans.

    `capacities` are rows per stage. `keep` names work arrays that are still there after the run: "STAGE.sites",
    "STAGE.count", "LAYER" (its features). `count_tiles` lets each convolution count the tiles it multiplies, in the
    kept array "executed". With `calibration` the plan's meta states its cost on those frames. UsageError for a stage
    without capacity or an unknown array, EngineError for a backbone that is too large.
    """
    names = [stage.name for stage in backbone.stages]
    if sorted(capacities) != sorted(names) or min(capacities.values()) < 1:
        raise UsageError(
            f"the capacities {dict(capacities)} do not give each stage of {names} room for a row.",
            fix="give a positive number of rows per stage",
        )
    large = [stage.name for stage in backbone.stages if prod(stage.grid) >= INT_LIMIT]
    if large:
        raise EngineError(f"the grid of the stage {large[0]} has 2**31 cells or more.", fix="use larger cells")
    kept = (*keep, "executed") if count_tiles else tuple(keep)
    planner = _Planner(backbone, frame, capacities, precision, shapes, kept, count_tiles=count_tiles)
    return planner.plan(calibration)


def calibrated_plan(
    backbone: Backbone,
    *,
    frame: Frame,
    calibration: Sequence[FrameStatistics],
    margin: float,
    capacities: Mapping[str, int] | None = None,
    precision: Precision = "fp16",
) -> Plan:
    """The plan with capacities from calibration frames (max x `margin`); `capacities` sets single stages.

    Errors of `capacities_from` and `plan_backbone`; UsageError for a capacity of a stage that does not exist.
    """
    rooms = capacities_from(calibration, margin=margin, max_voxels=backbone.max_voxels)
    for name in capacities or {}:
        if name not in rooms:
            raise UsageError(f"the backbone has no stage '{name}'.", fix=nearest(name, rooms))
    rooms |= capacities or {}
    return plan_backbone(backbone, frame=frame, capacities=rooms, precision=precision, calibration=calibration)


@dataclass(frozen=True, slots=True)
class _Book:
    """A rulebook with the tile lists of the layers that share it."""

    pairs: Array
    list: Array
    length: Array
    columns: int
    longest: int
    first_column: Mapping[str, int]


class _Planner:
    def __init__(
        self, backbone: Backbone, frame: Frame, capacities: Mapping[str, int], precision: Precision,
        shapes: KernelShapes, keep: tuple[str, ...], *, count_tiles: bool,
    ) -> None:  # fmt: skip
        self.backbone, self.frame, self.precision, self.shapes = backbone, frame, precision, shapes
        self.capacities = {stage.name: int(capacities[stage.name]) for stage in backbone.stages}
        self.assembly = Assembly(keep)
        self.tiled: dict[str, TiledWeights] = {}
        self.books: dict[str, _Book] = {}
        self.features: dict[str, Array] = {}
        make = self.assembly
        self.report = make.cleared("report", "i32", COUNTS_FROM + len(backbone.stages))
        # in the order of the ONNX node's outputs, as a plugin binds them
        self.bev = make.binding("output", "bev", precision, *backbone.bev_shape)
        self.status = make.binding("output", "status", "i32", len(backbone.stages))
        for name, layer in self._given():
            rows = self.capacities[layer.stage_out]
            make.binding("output", f"features.{name}", "fp32", rows, len(layer.bias))
            make.binding("output", f"sites.{name}", "i64", 3, rows)
        self.executed = make.cleared("executed", "i32", len(backbone.layers)) if count_tiles else self.report
        for stage in backbone.stages:
            words = -(-prod(stage.grid) // 32)
            make.cleared(f"{stage.name}.bits", "i32", words)
            make.work(f"{stage.name}.prefix", "i32", words)
            make.work(f"{stage.name}.sums", "i32", programs(words, shapes.words(words)))
            make.cleared(f"{stage.name}.count", "i32", 1)
            make.work(f"{stage.name}.sites", "i32", self.capacities[stage.name])

    def plan(self, calibration: Sequence[FrameStatistics]) -> Plan:
        """Write all steps and close."""
        for layer in self.backbone.layers:
            self.tiled[layer.name] = tiled_weights(layer)
        self.features[""] = enter(self.assembly, self.frame, self.backbone, self.capacities[ENTRY], self.precision,
                                  self.shapes, self.report, self.status, COUNTS_FROM, self._scan)  # fmt: skip
        started = {ENTRY}
        for number, layer in enumerate(self.backbone.layers):
            stage = self.backbone.stage(layer.stage_out)
            if layer.source == MERGED and MERGED not in started:
                started.add(MERGED)
                self._merge()
            if stage.name not in started:
                started.add(stage.name)
                self._down(stage)
            if layer.book not in self.books:
                self._rulebook(layer, stage)
            self._convolve(layer, number)
            for name, given in self._given():
                if given is layer:
                    self._give(name, layer)
        self._bev()
        words = [StatusWord(name=name, kind="dropped") for name in DROPPED]
        words.append(StatusWord(name="cut-off", kind="cutoff_m"))
        words += [StatusWord(name=stage.name, kind="count") for stage in self.backbone.stages]
        return self.assembly.close(
            capacities=self.capacities, layers=self._said_of_layers(), words=words, report=self.report,
            meta=self._meta(calibration),
        )  # fmt: skip

    def _scan(self, stage: str, *, report: bool) -> None:
        """Bits to prefixes and count of a stage; `report` unless the true count is known already."""
        make, array = self.assembly, self.assembly.array
        bits, sums = array(f"{stage}.bits"), array(f"{stage}.sums")
        words, blocks = bits.shape[0], sums.shape[0]
        block = self.shapes.words(words)
        number = [item.name for item in self.backbone.stages].index(stage)
        make.launch("kernels_index.rank_block_sums", [blocks], bits, sums, words, BLOCK=block)
        make.launch(
            "kernels_index.rank_prefix", [blocks], bits, sums, array(f"{stage}.prefix"), array(f"{stage}.count"),
            self.report, self.status, COUNTS_FROM + number, number, words, blocks, self.capacities[stage],
            REPORT=report, BLOCK=block, BLOCKS=MOST_BLOCKS,
        )  # fmt: skip

    def _down(self, stage: Stage) -> None:
        """The sites of a strided stage."""
        make, array, source = self.assembly, self.assembly.array, self.backbone.stage(stage.source)
        (sz, sy, sx), (kz, ky, kx) = stage.stride, stage.kernel
        reach = prod(-(-size // step) for size, step in zip(stage.kernel, stage.stride, strict=True))
        forms = {
            "SZ": sz, "SY": sy, "SX": sx, "KZ": kz, "KY": ky, "KX": kx,
            "REACH": power_of_two(reach), "BLOCK": self.shapes.strided_rows,
        }  # fmt: skip
        rows = self.capacities[source.name]
        grid = [programs(rows, self.shapes.strided_rows)]
        site, count = array(f"{source.name}.sites"), array(f"{source.name}.count")
        bits, sizes = array(f"{stage.name}.bits"), (*source.grid[1:], *stage.grid, *stage.padding)
        make.launch("kernels_rulebook.bitmap_set_strided", grid, site, count, bits, rows, *sizes, **forms)
        self._scan(stage.name, report=True)
        make.launch(
            "kernels_rulebook.emit_strided_sites", grid, site, count, bits, array(f"{stage.name}.prefix"),
            array(f"{stage.name}.sites"), rows, self.capacities[stage.name], *sizes, **forms,
        )  # fmt: skip

    def _merge(self) -> None:
        """The flat stage, and the sum of the three that it merges."""
        make, array, rows = self.assembly, self.assembly.array, self.capacities[MERGED]
        flat, block = self.backbone.stage(MERGED), self.shapes.strided_rows
        sources = [self.backbone.stage(name) for name in flat.merges]
        bits, prefix, sites = (array(f"{MERGED}.{part}") for part in ("bits", "prefix", "sites"))
        columns = [
            (shift, [programs(self.capacities[source.name], block)], self.capacities[source.name], source)
            for shift, source in enumerate(sources)
        ]  # fmt: skip
        for shift, grid, room, source in columns:
            make.launch(
                "kernels_flat.bitmap_set_flat", grid, array(f"{source.name}.sites"), array(f"{source.name}.count"),
                bits, room, *source.grid[1:], flat.grid[2], SHIFT=shift, BLOCK=block,
            )  # fmt: skip
        self._scan(MERGED, report=True)
        for shift, grid, room, source in columns:
            make.launch(
                "kernels_flat.emit_flat_sites", grid, array(f"{source.name}.sites"), array(f"{source.name}.count"),
                bits, prefix, sites, room, rows, *source.grid[1:], flat.grid[2], SHIFT=shift, BLOCK=block,
            )  # fmt: skip
        pointers = [
            each for name, source in zip(self.backbone.merged, sources, strict=True)
            for each in (self.features[name], array(f"{source.name}.bits"), array(f"{source.name}.prefix"))
        ]  # fmt: skip
        sizes = [size for source in sources for size in (self.capacities[source.name], *source.grid)]
        pitch = pointers[0].shape[1]
        channels = min(OUT_CHANNELS, power_of_two(pitch))
        self.features[MERGED] = make.work(f"{MERGED}.features", self.precision, rows, pitch)
        make.launch(
            "kernels_flat.sum_flat", [programs(rows, self.shapes.conv_rows), programs(pitch, channels)], sites,
            array(f"{MERGED}.count"), self.features[MERGED], *pointers, rows, flat.grid[2], *sizes,
            PITCH=pitch, CHANNELS=channels, BLOCK=self.shapes.conv_rows,
        )  # fmt: skip

    def _rulebook(self, layer: Convolution, stage: Stage) -> None:
        """The rulebook that `layer` is the first to need, and the tile lists of all that share it."""
        make, array, shapes, name = self.assembly, self.assembly.array, self.shapes, layer.book
        source, out_rows = self.backbone.stage(layer.stage_in), self.capacities[stage.name]
        taps, blocks = prod(layer.kernel), programs(out_rows, shapes.conv_rows)
        pairs = make.work(f"{name}.pairs", "i32", taps, out_rows)
        needed = make.work(f"{name}.taps", "i32", blocks)
        centred = tuple(size // 2 for size in layer.kernel)
        stride, padding = ((1, 1, 1), centred) if layer.submanifold else (stage.stride, stage.padding)
        kz, ky, kx = layer.kernel
        make.launch(
            "kernels_rulebook.rulebook", [programs(out_rows, shapes.conv_rows * shapes.book_blocks)],
            array(f"{stage.name}.sites"), array(f"{stage.name}.count"), array(f"{source.name}.bits"),
            array(f"{source.name}.prefix"), pairs, needed, out_rows, self.capacities[source.name], *stage.grid[1:],
            *source.grid, *stride, *padding,
            KZ=kz, KY=ky, KX=kx, TAPS=power_of_two(taps), ROWS=shapes.conv_rows, BLOCKS=shapes.book_blocks,
        )  # fmt: skip
        first_column, lists = self._columns(name)
        entries = np.array([entry for column in lists for entry in column] or [0], np.int32)
        starts = np.cumsum([0, *(len(column) for column in lists)]).astype(np.int32)
        longest = power_of_two(max(map(len, lists)))
        made = make.work(f"{name}.list", "i32", blocks, len(lists), longest)
        length = make.work(f"{name}.length", "i32", blocks, len(lists))
        make.launch(
            "kernels_rulebook.tile_lists", [blocks, len(lists)], needed, array(f"{stage.name}.count"),
            make.constant(f"{name}.tiles", entries), make.constant(f"{name}.starts", starts), made, length,
            out_rows, len(lists), ROWS=shapes.conv_rows, LONGEST=longest,
        )  # fmt: skip
        self.books[name] = _Book(pairs, made, length, len(lists), longest, first_column)

    def _columns(self, book: str) -> tuple[dict[str, int], list[tuple[int, ...]]]:
        """The first column of each layer of a rulebook, and all columns; layers with equal lists share theirs."""
        first: dict[str, int] = {}
        known: dict[tuple[tuple[int, ...], ...], int] = {}
        lists: list[tuple[int, ...]] = []
        for layer in self.backbone.layers:
            if layer.book == book:
                columns = self.tiled[layer.name].columns
                if columns not in known:
                    known[columns] = len(lists)
                    lists += columns
                first[layer.name] = known[columns]
        return first, lists

    def _convolve(self, layer: Convolution, number: int) -> None:
        make, tiled, book = self.assembly, self.tiled[layer.name], self.books[layer.book]
        rows, (tile_in, tile_out) = self.capacities[layer.stage_out], tiled.tile_shape
        channels_in, channels_out = pitch_of(layer.weight.shape[1]), pitch_of(len(layer.bias))
        weight = make.constant(f"{layer.name}.weight", tiled.tiles.astype(NUMPY_OF[self.precision]))
        padded = np.zeros(channels_out, np.float32)
        padded[: len(layer.bias)] = layer.bias
        bias = make.constant(f"{layer.name}.bias", padded)
        out = make.work(layer.name, self.precision, rows, channels_out)
        make.launch(
            "kernels_conv.conv_tile_list",
            [programs(rows, self.shapes.conv_rows), channels_out // tile_out],
            self.features[layer.source], book.pairs, make.array(f"{layer.stage_out}.count"), book.list, book.length,
            weight, bias, self.features[layer.adds] if layer.adds else out, out, self.executed,
            rows, book.columns, book.longest, book.first_column[layer.name], number,
            CIN=channels_in, COUT=channels_out, ROWS=self.shapes.conv_rows, TILE_IN=tile_in, TILE_OUT=tile_out,
            RESIDUAL=bool(layer.adds), COUNTED=self.executed is not self.report,
        )  # fmt: skip
        self.features[layer.name] = out

    def _given(self) -> list[tuple[str, Convolution]]:
        """The layers that give their rows out, by the name of the output."""
        layers = {layer.name: layer for layer in self.backbone.layers}
        return [(name, layers[layer]) for name, layer in self.backbone.given.items()]

    def _give(self, name: str, layer: Convolution) -> None:
        """Write the rows of a layer as the ONNX node gives them, on all rows of the capacity."""
        array, stage, shapes = self.assembly.array, self.backbone.stage(layer.stage_out), self.shapes
        rows, channels = self.capacities[stage.name], len(layer.bias)
        block = min(OUT_CHANNELS, power_of_two(channels))
        self.assembly.launch(
            "kernels_conv.give_rows", [programs(rows, shapes.strided_rows), programs(channels, block)],
            self.features[layer.name], array(f"{stage.name}.sites"), array(f"{stage.name}.count"),
            array(f"features.{name}"), array(f"sites.{name}"), rows, channels, *stage.grid[1:],
            PITCH=pitch_of(channels), CHANNELS=block, BLOCK=shapes.strided_rows,
        )  # fmt: skip

    def _bev(self) -> None:
        make, layer = self.assembly, self.backbone.layers[-1]
        depth, height, width = self.backbone.stage(layer.stage_out).grid
        channels, cells = len(layer.bias), self.shapes.bev_cells
        active = int(self.backbone.tells_active)
        block = min(OUT_CHANNELS, power_of_two(channels + active))
        make.launch(
            "kernels_conv.to_bev", [programs(height * width, cells), depth, programs(channels + active, block)],
            self.features[layer.name], make.array(f"{layer.stage_out}.bits"),
            make.array(f"{layer.stage_out}.prefix"), self.bev, self.capacities[layer.stage_out], depth, height * width,
            channels, PITCH=pitch_of(channels), CHANNELS=block, BLOCK=cells, ACTIVE=active,
        )  # fmt: skip

    def _said_of_layers(self) -> list[PlanLayer]:
        return [
            PlanLayer(
                name=layer.name, tiles_kept=self.tiled[layer.name].kept, tiles_total=self.tiled[layer.name].total,
                taps=prod(layer.kernel), in_channels=layer.weight.shape[1], out_channels=len(layer.bias),
            )
            for layer in self.backbone.layers
        ]  # fmt: skip

    def _meta(self, calibration: Sequence[FrameStatistics]) -> dict[str, Any]:
        cost = {}
        if calibration:
            paid = cost_of(
                self.backbone, self.tiled, calibration, frame=self.frame, capacities=self.capacities,
                element_bytes=ELEMENT_BYTES[self.precision], conv_rows=self.shapes.conv_rows,
            )  # fmt: skip
            cost = {"cost": paid}
        given = {name: layer.stage_out for name, layer in self._given()}
        return {
            **cost,
            **({"given": given} if given else {}),
            "precision": self.precision,
            "conv_rows": self.shapes.conv_rows,
            "tile_shapes": {name: list(tiled.tile_shape) for name, tiled in self.tiled.items()},
        }
