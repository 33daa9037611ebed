"""Which weights go, and in which order: unstructured, 2:4 along input channels, tiles of a sparse convolution.

Every order is nested: what is pruned at one ratio stays pruned at all higher ones. So one array per layer and pattern
says everything, the first step at which each weight is pruned; curves are counts of it, masks are comparisons.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Float64, Int16, Int64

from dm3d_deploy.errors import InternalError
from dm3d_deploy.pruning.contracts import Layer, Pattern, Skipped

RATIO_CAP = 0.98
SMALL_TILE, LARGE_TILE = 16, 32


def ratio_grid(steps: int = 100) -> Float64[np.ndarray, " points"]:
    """Pruning ratios k / steps for k = 0, 1, ... up to the cap of .98 (DM3D's alpha, with the dense layer included)."""
    grid = np.arange(steps + 1) / steps
    return grid[grid <= RATIO_CAP]


def tile_size(inputs: int, outputs: int) -> tuple[int, int]:
    """Input and output channels of one tile of a sparse layer: the one place that says it.

    16 when a side has at most 16 channels, else 32; never more than the layer has.
    """
    side = SMALL_TILE if min(inputs, outputs) <= SMALL_TILE else LARGE_TILE
    return min(side, inputs), min(side, outputs)


def taps_from_native(layer: Layer, array: np.ndarray) -> np.ndarray:
    """An array of the weight's native shape as [taps, Cin, Cout], a view where strides allow."""
    if array.shape != layer.shape:
        raise InternalError(f"{layer.name}: an array of shape {array.shape} does not fit the weight {layer.shape}")
    if layer.kind == "linear":
        return array.reshape(1, layer.outputs, layer.inputs).swapaxes(1, 2)
    if layer.kind == "sparse" and layer.taps == 1:  # spconv reads it so: models.voxelnext.PointConv2d
        return array.reshape(1, layer.inputs, layer.outputs)
    axes = {"sparse": (*range(1, array.ndim), 0), "conv2d": (2, 3, 1, 0), "deconv2d": (2, 3, 0, 1)}[layer.kind]
    return array.transpose(axes).reshape(layer.taps, layer.inputs, layer.outputs)


def native_from_taps(layer: Layer, taps: np.ndarray) -> np.ndarray:
    """The inverse of `taps_from_native`, contiguous."""
    if taps.shape != (layer.taps, layer.inputs, layer.outputs):
        raise InternalError(f"{layer.name}: an array of shape {taps.shape} holds no taps of {layer.shape}")
    if layer.kind == "linear":
        return np.ascontiguousarray(taps[0].T).reshape(layer.shape)
    if layer.kind == "sparse" and layer.taps == 1:
        return np.ascontiguousarray(taps[0]).reshape(layer.shape)
    dims = len(layer.shape)
    axes = {"sparse": (dims - 1, *range(dims - 1)), "conv2d": (3, 2, 0, 1), "deconv2d": (2, 3, 0, 1)}[layer.kind]
    return np.ascontiguousarray(taps.reshape(*layer.kernel, layer.inputs, layer.outputs).transpose(axes))


def eligible_patterns(layer: Layer, device_patterns: Iterable[Pattern]) -> tuple[tuple[Pattern, ...], Skipped | None]:
    """The patterns that this layer can take, and why it takes less than the device could use.

    Unstructured always (it saves nominal MACs, never time); of the device's patterns 2:4 for 2D layers whose input
    channels come in fours, tiles for sparse layers. Final head convolutions stay dense.
    """
    if layer.final:
        reason = f"a final head convolution with {layer.outputs} output channels stays dense"
        return ("dense",), Skipped(layer=layer.name, reason=reason)
    offered = set(device_patterns)
    if layer.kind == "sparse":
        return (("unstructured", "tile") if "tile" in offered else ("unstructured",)), None
    if "2:4" not in offered or layer.kind == "linear":
        return ("unstructured",), None
    if layer.inputs % 4:
        reason = f"2:4 needs input channels in fours, the layer has {layer.inputs}"
        return ("unstructured",), Skipped(layer=layer.name, reason=reason)
    return ("unstructured", "2:4"), None


def usable_ratios(pattern: Pattern, ratios: Float64[np.ndarray, " steps"]) -> Float64[np.ndarray, " points"]:
    """The ratios that a pattern can take: 2:4 begins at one half."""
    return ratios[ratios >= 0.5] if pattern == "2:4" else ratios


def prune_step(
    layer: Layer,
    scores: Float[np.ndarray, "*shape"],
    pattern: Pattern,
    ratios: Sequence[float] | Float64[np.ndarray, " points"],
) -> Int16[np.ndarray, "*shape"]:
    """The index of the first ratio at which each weight is pruned, or len(ratios) for one that is never pruned.

    Native shape. Ties go by position: in the native array, for tiles by (tap, input, output).

    - unstructured: ascending score; at each ratio exactly round(ratio * weights) are pruned.
    - 2:4: first the two lowest of every four neighbours along the input channels, all of them gone at ratio .5, then
      the rest by ascending score; every mask is 2:4 legal and keeps the best weights among those 2:4 allows.
    - tile: ascending sum of squared scores per weight; at each ratio as many whole tiles as fit in ratio * weights.
    """
    grid = np.asarray(ratios, dtype=np.float64)
    _check_grid(layer, pattern, grid)
    if scores.shape != layer.shape or not np.isfinite(scores).all():
        raise InternalError(f"{layer.name}: scores of shape {scores.shape} must be finite and fit {layer.shape}")
    if pattern == "unstructured":
        counts = np.rint(grid * layer.weights).astype(np.int64)
        return _steps_of_order(np.argsort(scores, axis=None, kind="stable"), counts).reshape(layer.shape)
    if pattern == "2:4":
        return _two_four_steps(layer, scores, grid)
    return _tile_steps(layer, scores, grid)


def is_2_4(keep: Bool[np.ndarray, "taps inputs outputs"]) -> bool:
    """Whether at most two of every four neighbours along the input channels are kept."""
    taps, inputs, outputs = keep.shape
    if inputs % 4:
        return False
    return bool((keep.reshape(taps, inputs // 4, 4, outputs).sum(axis=2) <= 2).all())


def tiles_kept(
    keep: Bool[np.ndarray, "taps inputs outputs"], tile_in: int, tile_out: int
) -> Bool[np.ndarray, "taps tiles_in tiles_out"]:
    """Which tiles hold at least one kept weight; the last tile of a side may be smaller."""
    rows = np.logical_or.reduceat(keep, np.arange(0, keep.shape[1], tile_in), axis=1)
    kept: np.ndarray = np.logical_or.reduceat(rows, np.arange(0, keep.shape[2], tile_out), axis=2)
    return kept


def tile_weights(inputs: int, outputs: int) -> Int64[np.ndarray, "tiles_in tiles_out"]:
    """Weights of each tile at its real extent: nothing is counted for channels that do not exist."""
    tile_in, tile_out = tile_size(inputs, outputs)
    rows = np.minimum(tile_in, inputs - np.arange(0, inputs, tile_in))
    columns = np.minimum(tile_out, outputs - np.arange(0, outputs, tile_out))
    return np.multiply.outer(rows, columns).astype(np.int64)


def _check_grid(layer: Layer, pattern: Pattern, grid: Float64[np.ndarray, " points"]) -> None:
    if pattern not in ("unstructured", "2:4", "tile"):
        raise InternalError(f"{layer.name}: the pattern '{pattern}' prunes nothing")
    if grid.ndim != 1 or not len(grid) or (np.diff(grid) < 0).any() or grid[0] < 0 or grid[-1] > 1:
        raise InternalError(f"{layer.name}: pruning ratios must rise within 0..1")
    if len(grid) > np.iinfo(np.int16).max:
        raise InternalError(f"{layer.name}: {len(grid)} pruning ratios are too many")
    if pattern == "2:4" and (layer.inputs % 4 or grid[0] < 0.5):
        raise InternalError(
            f"{layer.name}: 2:4 needs input channels in fours and ratios of one half or more, "
            f"not {layer.inputs} channels from ratio {grid[0]:g}"
        )


def _steps_of_order(order: Int64[np.ndarray, " items"], counts: Int64[np.ndarray, " points"]) -> np.ndarray:
    """Step at which each item goes when step p prunes the first counts[p] items of `order`."""
    steps = np.empty(len(order), dtype=np.int16)
    repeats = np.diff(np.concatenate([[0], counts, [len(order)]]))
    steps[order] = np.repeat(np.arange(len(counts) + 1, dtype=np.int16), repeats)
    return steps


def _two_four_steps(layer: Layer, scores: np.ndarray, grid: np.ndarray) -> np.ndarray:
    taps = taps_from_native(layer, scores)
    fours = taps.reshape(layer.taps, layer.inputs // 4, 4, layer.outputs).swapaxes(2, 3)
    lowest = np.argsort(fours, axis=3, kind="stable")[..., :2]
    first = np.zeros(fours.shape, dtype=np.bool_)
    np.put_along_axis(first, lowest, True, axis=3)
    goes_first = native_from_taps(layer, first.swapaxes(2, 3).reshape(taps.shape)).ravel()

    rest = np.flatnonzero(~goes_first)
    order = np.argsort(scores.ravel()[rest], kind="stable")
    counts = np.rint(grid * layer.weights).astype(np.int64) - (layer.weights - len(rest))
    steps = np.zeros(layer.weights, dtype=np.int16)
    steps[rest] = _steps_of_order(order, counts)
    return steps.reshape(layer.shape)


def _tile_steps(layer: Layer, scores: np.ndarray, grid: np.ndarray) -> np.ndarray:
    tile_in, tile_out = tile_size(layer.inputs, layer.outputs)
    squares = np.square(taps_from_native(layer, scores), dtype=np.float64)
    sums = np.add.reduceat(squares, np.arange(0, layer.inputs, tile_in), axis=1)
    sums = np.add.reduceat(sums, np.arange(0, layer.outputs, tile_out), axis=2)
    weights = np.broadcast_to(tile_weights(layer.inputs, layer.outputs), sums.shape)

    order = np.argsort(sums / weights, axis=None, kind="stable")
    pruned = np.cumsum(weights.ravel()[order])
    # the tolerance: ratio * weights is not exact where it should be whole
    counts = np.searchsorted(pruned, grid * layer.weights + 1e-6, side="right")
    steps = _steps_of_order(order, counts).reshape(sums.shape)
    wide = np.repeat(steps, tile_in, axis=1)[:, : layer.inputs]
    return native_from_taps(layer, np.repeat(wide, tile_out, axis=2)[..., : layer.outputs])
