"""What a plan moves and multiplies for calibration frames: useful bytes, not the sectors that a cache fetches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from dm3d_deploy.errors import UsageError
from engines.sparse3d.entry import Frame
from engines.sparse3d.onnx_reader import ENTRY, MERGED, Backbone, Convolution
from engines.sparse3d.packing import TiledWeights, pitch_of
from engines.sparse3d.sites import FrameStatistics, predicted_tiles

WORD_BYTES = 4


def cost_of(
    backbone: Backbone, tiled: Mapping[str, TiledWeights], frames: Sequence[FrameStatistics], *, frame: Frame,
    capacities: Mapping[str, int], element_bytes: int, conv_rows: int,
) -> dict[str, Any]:  # fmt: skip
    """Mean over the frames, per part of the plan, and per layer the tile products that are predicted.

    `frame` is what the plan starts at, `capacities` the rows of its stages. `multiplications` are those of the tiles
    that run, padding included; `dense_multiplications` those of the same plan if no weight were pruned;
    `useful_multiplications` those of pairs of rows with the channels of stored tiles. UsageError for a plan that starts
    at points and frames that do not say how many they had.
    """
    if frame.points and any(item.points is None for item in frames):
        raise UsageError(
            "the calibration frames do not say how many points they had.", fix="give frame_statistics their `points`"
        )
    rows = [
        {
            "entry_bytes": _entry_bytes(backbone, item, frame, capacities[ENTRY], element_bytes),
            **_frame(backbone, tiled, item, element_bytes, conv_rows),
            "given_bytes": _given_bytes(backbone, item, capacities, element_bytes),
        }
        for item in frames
    ]
    for row in rows:
        row["moved_bytes"] = sum(row[f"{part}_bytes"] for part in ("entry", "index", "convolution", "map", "given"))
    products = np.stack([predicted_tiles(backbone, tiled, item) for item in frames])
    return {
        "frames": len(frames),
        **{name: round(float(np.mean([row[name] for row in rows]))) for name in rows[0]},
        "tile_products": {
            layer.name: float(mean) for layer, mean in zip(backbone.layers, products.mean(axis=0), strict=True)
        },
    }


def _frame(
    backbone: Backbone, tiled: Mapping[str, TiledWeights], frame: FrameStatistics, element_bytes: int, conv_rows: int
) -> dict[str, int]:
    products = predicted_tiles(backbone, tiled, frame)
    convolution, multiplications, dense_multiplications, useful = 0, 0, 0, 0
    for layer, count in zip(backbone.layers, products.tolist(), strict=True):
        tile_in, tile_out = tiled[layer.name].tile_shape
        gathered = _gathered_rows(layer, tiled[layer.name], frame)
        written = frame.counts[layer.stage_out] * pitch_of(len(layer.bias)) * (2 if layer.adds else 1)
        convolution += (gathered * tile_in + count * tile_in * tile_out + written) * element_bytes
        convolution += count * conv_rows * WORD_BYTES
        multiplications += count * conv_rows * tile_in * tile_out
        pitches = pitch_of(layer.weight.shape[1]) * pitch_of(len(layer.bias))
        dense_multiplications += int(frame.blocks[layer.book].sum()) * conv_rows * pitches
        useful += gathered * tile_in * tile_out
    last = backbone.layers[-1]
    dense = prod(backbone.bev_shape) + frame.counts[last.stage_out] * pitch_of(len(last.bias))
    convolution += _merged_bytes(backbone, frame, element_bytes)
    return {
        "index_bytes": _index_bytes(backbone, frame),
        "convolution_bytes": convolution,
        "map_bytes": dense * element_bytes,
        "multiplications": multiplications,
        "dense_multiplications": dense_multiplications,
        "useful_multiplications": useful,
    }


def _gathered_rows(layer: Convolution, tiled: TiledWeights, frame: FrameStatistics) -> int:
    """Rows that the tiles of a layer read, each tile on its own."""
    pairs = frame.pairs[layer.book]
    return sum(int(pairs[entry & 31]) for column in tiled.columns for entry in column)


def _entry_bytes(backbone: Backbone, found: FrameStatistics, frame: Frame, capacity: int, element_bytes: int) -> int:
    """The frame into the rows of the first stage; an atomic counts once, and no point is taken to lie outside the grid.

    enter_voxels and canonicalise, or enter_points, sum_points (64-bit sums) and mean_features, and what they want
    cleared; with rings their count and the cut-off, which drops nothing of a frame that fits.
    """
    sites, columns, rings = found.counts[ENTRY], backbone.columns, frame.rings(capacity)
    words = (2 * rings + sites) if rings else 0
    if frame.points:
        sums = 2 * columns + 1
        words += (found.points or 0) * ((columns + 2) + (5 + columns + 2 * columns)) + (capacity + sites) * sums
    else:
        words += sites * ((3 + 2) + (4 + columns))
    return words * WORD_BYTES + sites * pitch_of(columns) * element_bytes


def _merged_bytes(backbone: Backbone, frame: FrameStatistics, element_bytes: int) -> int:
    """Rows of the merged stages that are read once, and their sums that are written."""
    ends = [layer for layer in backbone.layers if layer.name in backbone.merged]
    rows = sum(frame.counts[layer.stage_out] for layer in ends) + (frame.counts[MERGED] if ends else 0)
    return rows * pitch_of(len(ends[0].bias)) * element_bytes if ends else 0


def _given_bytes(backbone: Backbone, frame: FrameStatistics, capacities: Mapping[str, int], element_bytes: int) -> int:
    """Rows that leave the plan: those of the frame are read, those of the capacity written: fp32, and 64-bit cells."""
    total = 0
    for layer in (layer for name in backbone.given.values() for layer in backbone.layers if layer.name == name):
        channels = len(layer.bias)
        total += frame.counts[layer.stage_out] * (WORD_BYTES + channels * element_bytes)
        total += capacities[layer.stage_out] * (channels + 3 * 2) * WORD_BYTES
    return total


def _index_bytes(backbone: Backbone, frame: FrameStatistics) -> int:
    """Clearing and scanning bitmaps, finding output sites, writing rulebooks."""
    total = 0
    for stage in backbone.stages:
        words, sites = -(-prod(stage.grid) // 32), frame.counts[stage.name]
        total += (3 * words + min(words, sites)) * WORD_BYTES
        if stage.merges:
            total += sum(frame.counts[name] for name in stage.merges) * (2 + 4) * WORD_BYTES
        elif stage.name != ENTRY:
            reach = prod(-(-size // step) for size, step in zip(stage.kernel, stage.stride, strict=True))
            total += frame.counts[stage.source] * (2 + 4 * reach) * WORD_BYTES
    for book in {layer.book: layer for layer in backbone.layers}.values():
        sites = frame.counts[book.stage_out]
        total += (sites * (1 + 2 * prod(book.kernel)) + int(frame.pairs[book.book].sum())) * WORD_BYTES
    return total
