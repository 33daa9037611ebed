"""What a plan moves and multiplies for calibration frames: useful bytes, not the sectors that a cache fetches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from engines.sparse3d.onnx_reader import ENTRY, Backbone, Convolution
from engines.sparse3d.packing import TiledWeights, pitch_of
from engines.sparse3d.sites import FrameStatistics, predicted_tiles

WORD_BYTES = 4


def cost_of(
    backbone: Backbone, tiled: Mapping[str, TiledWeights], frames: Sequence[FrameStatistics], *, element_bytes: int,
    conv_rows: int,
) -> dict[str, Any]:  # fmt: skip
    """Mean over the frames, per part of the plan, and per layer the tile products that are predicted.

    `multiplications` are those of the tiles that run, padding included; `useful_multiplications` those of pairs of
    rows with the channels of stored tiles.
    """
    rows = [_frame(backbone, tiled, frame, element_bytes, conv_rows) for frame in frames]
    products = np.stack([predicted_tiles(backbone, tiled, frame) for frame in frames])
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
    convolution, multiplications, useful = 0, 0, 0
    for layer, count in zip(backbone.layers, products.tolist(), strict=True):
        tile_in, tile_out = tiled[layer.name].tile_shape
        gathered = _gathered_rows(layer, tiled[layer.name], frame)
        written = frame.counts[layer.stage_out] * pitch_of(len(layer.bias)) * (2 if layer.adds else 1)
        convolution += (gathered * tile_in + count * tile_in * tile_out + written) * element_bytes
        convolution += count * conv_rows * WORD_BYTES
        multiplications += count * conv_rows * tile_in * tile_out
        useful += gathered * tile_in * tile_out
    last = backbone.layers[-1]
    dense = prod(backbone.bev_shape) + frame.counts[last.stage_out] * pitch_of(len(last.bias))
    return {
        "index_bytes": _index_bytes(backbone, frame, element_bytes),
        "convolution_bytes": convolution,
        "map_bytes": dense * element_bytes,
        "multiplications": multiplications,
        "useful_multiplications": useful,
    }


def _gathered_rows(layer: Convolution, tiled: TiledWeights, frame: FrameStatistics) -> int:
    """Rows that the tiles of a layer read, each tile on its own."""
    pairs = frame.pairs[layer.book]
    return sum(int(pairs[entry & 31]) for column in tiled.columns for entry in column)


def _index_bytes(backbone: Backbone, frame: FrameStatistics, element_bytes: int) -> int:
    """Clearing and scanning bitmaps, entering the frame, finding output sites, writing rulebooks."""
    total = 0
    for stage in backbone.stages:
        words, sites = -(-prod(stage.grid) // 32), frame.counts[stage.name]
        total += (3 * words + min(words, sites)) * WORD_BYTES
        if stage.name == ENTRY:
            total += sites * (9 * WORD_BYTES + backbone.columns * 4 + pitch_of(backbone.columns) * element_bytes)
        else:
            reach = prod(-(-size // step) for size, step in zip(stage.kernel, stage.stride, strict=True))
            total += frame.counts[stage.source] * (2 + 4 * reach) * WORD_BYTES
    for book in {layer.book: layer for layer in backbone.layers}.values():
        sites = frame.counts[book.stage_out]
        total += (sites * (1 + 2 * prod(book.kernel)) + int(frame.pairs[book.book].sum())) * WORD_BYTES
    return total
