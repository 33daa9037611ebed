"""Multiply-accumulates: what a layer costs dense, what a mask keeps, what the hardware then runs."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Float64, Int64

from dm3d_deploy.errors import InternalError
from dm3d_deploy.pruning.contracts import Layer, Part, Pattern
from dm3d_deploy.pruning.patterns import is_2_4, taps_from_native, tile_size, tile_weights, tiles_kept


def dense_macs(layers: Iterable[Layer]) -> dict[Part, float]:
    """Dense MACs per frame of each part."""
    by_part: dict[Part, list[float]] = {"3d": [], "2d": [], "head": []}
    for layer in layers:
        by_part[layer.part].append(layer.macs)
    return {part: math.fsum(macs) for part, macs in by_part.items()}


def macs_of_counts(layer: Layer, counts: Int64[np.ndarray, "*points taps"]) -> Float64[np.ndarray, "*points"]:
    """MACs per frame when `counts` weights of each tap take part: sum over taps of positions * count."""
    total: np.ndarray = (np.ascontiguousarray(counts) * layer.positions).sum(axis=-1)
    return total


def kept_macs(layer: Layer, keep: Bool[np.ndarray, "*shape"]) -> float:
    """Nominal MACs per frame of a mask in native shape: exact, tap by tap, as a sparse layer's taps differ."""
    return float(macs_of_counts(layer, np.count_nonzero(taps_from_native(layer, keep), axis=(1, 2))))


def executed_macs(layer: Layer, keep: Bool[np.ndarray, "*shape"], pattern: Pattern) -> float:
    """MACs per frame that hardware built for `pattern` runs under a mask in native shape.

    Dense, unstructured and what is left between kept channels run everything; 2:4 runs one half; tiles run each tile
    that holds a kept weight, at its real channels (what an engine adds to fill its own blocks is not counted).
    """
    taps = taps_from_native(layer, keep)
    if pattern in ("dense", "unstructured", "channel"):
        return layer.macs
    if pattern == "2:4":
        if not is_2_4(taps):
            raise InternalError(f"{layer.name}: the mask is not 2:4 legal")
        return 0.5 * layer.macs
    if pattern == "tile":
        kept = tiles_kept(taps, *tile_size(layer.inputs, layer.outputs))
        weights = kept * tile_weights(layer.inputs, layer.outputs)
        return float(macs_of_counts(layer, weights.sum(axis=(1, 2))))
    raise InternalError(f"{layer.name}: no such pattern '{pattern}'")
