"""Weights into non-zero tiles, and buffers into one workspace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from jaxtyping import Bool, Float32

from dm3d_deploy.errors import EngineError
from dm3d_deploy.pruning.patterns import LARGE_TILE, SMALL_TILE, tile_size
from engines.sparse3d.onnx_reader import Convolution
from engines.sparse3d.plan import BUFFER_ALIGNMENT_BYTES

DENSE_TILE = 64
MAX_INPUT_TILES = 64  # six bits of a list entry
MAX_STORED_TILES = 1 << 20  # the bits above them


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledWeights:
    """The stored tiles of one layer and, for each column of output tiles, the entries of its list.

    An entry is tap | input tile << 5 | stored tile << 11. `kept` and `total` count tiles of the pruning pattern,
    which are smaller than the stored ones where nothing is pruned.
    """

    tiles: Float32[np.ndarray, "stored tile_in tile_out"]
    columns: tuple[tuple[int, ...], ...]
    kept: int
    total: int

    @property
    def tile_shape(self) -> tuple[int, int]:
        """Input and output channels of a stored tile."""
        _, tile_in, tile_out = self.tiles.shape
        return tile_in, tile_out


def pitch_of(channels: int) -> int:
    """Channels of one stored row of features: whole tiles, zero behind the real ones."""
    step = SMALL_TILE if channels <= SMALL_TILE else LARGE_TILE
    return -(-channels // step) * step


def tiled_weights(layer: Convolution) -> TiledWeights:
    """Cut a layer into tiles and keep those with a weight other than zero.

    Tiles are those of the pruning pattern (`tile_size`), filled up to 16 or 32 channels for the matrix units; where
    nothing is pruned they grow to 64 channels, which gathers each row fewer times.
    """
    taps, inputs, outputs = prod(layer.kernel), layer.weight.shape[1], len(layer.bias)
    full = np.zeros((taps, pitch_of(inputs), pitch_of(outputs)), np.float32)
    full[list(layer.taps), :inputs, :outputs] = layer.weight
    small = tuple(SMALL_TILE if side <= SMALL_TILE else LARGE_TILE for side in tile_size(inputs, outputs))
    alive = _alive(full, *small)
    # the pattern's tiles: those made of padding alone do not count
    real = alive[:, : -(-inputs // small[0]), : -(-outputs // small[1])]
    tile_in, tile_out = small
    if real.all():
        tile_in, tile_out = (_dense_side(pitch_of(channels)) for channels in (inputs, outputs))
        alive = _alive(full, tile_in, tile_out)
    grid = _tile_grid(full, tile_in, tile_out)
    columns: list[tuple[int, ...]] = []
    stored: list[np.ndarray] = []
    for column in range(alive.shape[2]):
        entries = []
        for tap, tile in np.argwhere(alive[:, :, column]).tolist():
            entries.append(tap | tile << 5 | len(stored) << 11)
            stored.append(grid[tap, tile, column])
        columns.append(tuple(entries))
    if alive.shape[1] > MAX_INPUT_TILES or len(stored) >= MAX_STORED_TILES:
        raise EngineError(
            f"the layer {layer.name} has {alive.shape[1]} tiles of input channels and {len(stored)} tiles in all.",
            fix=f"a plan holds at most {MAX_INPUT_TILES} and {MAX_STORED_TILES - 1}",
        )
    tiles = np.stack(stored) if stored else np.zeros((1, tile_in, tile_out), np.float32)
    return TiledWeights(tiles=tiles, columns=tuple(columns), kept=int(real.sum()), total=real.size)


def _dense_side(pitch: int) -> int:
    return DENSE_TILE if pitch % DENSE_TILE == 0 else min(pitch, LARGE_TILE)


def _tile_grid(
    full: np.ndarray, tile_in: int, tile_out: int
) -> Float32[np.ndarray, "taps tiles_in tiles_out tile_in tile_out"]:
    taps, inputs, outputs = full.shape
    return full.reshape(taps, inputs // tile_in, tile_in, outputs // tile_out, tile_out).swapaxes(2, 3)


def _alive(full: np.ndarray, tile_in: int, tile_out: int) -> Bool[np.ndarray, "taps tiles_in tiles_out"]:
    return np.asarray(_tile_grid(full, tile_in, tile_out).any(axis=(3, 4)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetime:
    """A buffer of `bytes` that is in use from step `first` to step `last`, both included."""

    name: str
    bytes: int
    first: int
    last: int


def place(lifetimes: Sequence[Lifetime]) -> tuple[dict[str, int], int]:
    """Offsets such that buffers in use at the same step do not overlap, and the bytes of the whole.

    Largest first, each at the lowest offset that is free while it lives; ties by name, so equal plans are equal bytes.
    """
    offsets: dict[str, int] = {}
    placed: list[tuple[int, int, Lifetime]] = []
    for buffer in sorted(lifetimes, key=lambda item: (-item.bytes, item.name)):
        offset = 0
        for start, end, other in sorted(placed, key=lambda item: item[0]):
            together = buffer.first <= other.last and other.first <= buffer.last
            if together and offset + buffer.bytes > start and offset < end:
                offset = end
        end = offset + aligned(buffer.bytes)
        placed.append((offset, end, buffer))
        offsets[buffer.name] = offset
    return offsets, max((end for _, end, _ in placed), default=0)


def aligned(size: int) -> int:
    """Rounded up to the alignment of buffers."""
    return -(-size // BUFFER_ALIGNMENT_BYTES) * BUFFER_ALIGNMENT_BYTES
