"""What calibration frames will ask of a plan: active sites per stage, and the blocks of rows that need each tap.

Plain numpy over sorted keys, which shares nothing with the kernels; a key is the raster index of a cell in its grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod

import numpy as np
from jaxtyping import Int, Int64

from dm3d_deploy.errors import EngineError
from engines.sparse3d.onnx_reader import ENTRY, Backbone, Convolution, Stage, Triple
from engines.sparse3d.packing import TiledWeights

ROOM_STEP = 64
Keys = Int64[np.ndarray, " sites"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameStatistics:
    """One frame: sites per stage, and for each rulebook the pairs of rows and the blocks of rows at each tap.

    `points` is how many the frame came of, where a plan starts at points.
    """

    counts: Mapping[str, int]
    pairs: Mapping[str, Int64[np.ndarray, " taps"]]
    blocks: Mapping[str, Int64[np.ndarray, " taps"]]
    points: int | None = None


def stage_sites(backbone: Backbone, coords: Int[np.ndarray, "voxels 4"]) -> dict[str, Keys]:
    """Sorted keys of every stage; `coords` are (batch, z, y, x), cells outside the grid are left out."""
    found: dict[str, Keys] = {}
    for stage in backbone.stages:
        if stage.name == ENTRY:
            cells = np.asarray(coords[:, 1:], np.int64)
            inside = ((cells >= 0) & (cells < stage.grid)).all(axis=1)
            found[stage.name] = np.unique(_keys(cells[inside].T, stage.grid))
        elif stage.merges:
            above = [_cells(found[name], backbone.stage(name).grid) for name in stage.merges]
            flat = [_keys(cells * [[0], [1 << shift], [1 << shift]], stage.grid) for shift, cells in enumerate(above)]
            found[stage.name] = np.unique(np.concatenate(flat))
        else:
            source = backbone.stage(stage.source)
            found[stage.name] = _strided(found[stage.source], source.grid, stage)
    return found


def frame_statistics(
    backbone: Backbone, coords: Int[np.ndarray, "voxels 4"], *, conv_rows: int, points: int | None = None
) -> FrameStatistics:
    """Sites, pairs and blocks of one frame of `points`, where `conv_rows` neighbouring rows make a block."""
    sites = stage_sites(backbone, coords)
    pairs: dict[str, Int64[np.ndarray, " taps"]] = {}
    blocks: dict[str, Int64[np.ndarray, " taps"]] = {}
    for layer in backbone.layers:
        if layer.book in pairs:
            continue
        met = _met(backbone, layer, sites)
        pairs[layer.book] = met.sum(axis=1)
        padded = np.zeros((len(met), ceil(met.shape[1] / conv_rows) * conv_rows), np.bool_)
        padded[:, : met.shape[1]] = met
        blocks[layer.book] = padded.reshape(len(met), -1, conv_rows).any(axis=2).sum(axis=1)
    counts = {name: len(keys) for name, keys in sites.items()}
    return FrameStatistics(counts=counts, pairs=pairs, blocks=blocks, points=points)


def capacities_from(frames: Sequence[FrameStatistics], *, margin: float, max_voxels: int) -> dict[str, int]:
    """Rows per stage: the most that any frame had, times `margin`, in steps of 64; the first stage holds a full frame.

    EngineError without a frame: nothing can be said of capacities.
    """
    if not frames or margin < 1:
        raise EngineError(
            f"capacities from {len(frames)} frames with a margin of {margin:g} cannot be told.",
            fix="give at least one calibration frame and a margin of 1 or more",
        )
    rooms = {}
    for name in frames[0].counts:
        most = max(frame.counts[name] for frame in frames)
        rooms[name] = max(ROOM_STEP, ceil(most * margin / ROOM_STEP) * ROOM_STEP)
    return {**rooms, ENTRY: max_voxels}


def predicted_tiles(
    backbone: Backbone, tiled: Mapping[str, TiledWeights], frame: FrameStatistics
) -> Int64[np.ndarray, " layers"]:
    """Tile products that each layer executes: every stored tile once per block of rows that needs its tap."""
    return np.array(
        [
            sum(int(frame.blocks[layer.book][entry & 31]) for column in tiled[layer.name].columns for entry in column)
            for layer in backbone.layers
        ],
        np.int64,
    )


def _keys(cells: Int64[np.ndarray, "3 sites"], grid: Triple) -> Keys:
    z, y, x = cells
    keys: np.ndarray = (z * grid[1] + y) * grid[2] + x
    return keys


def _cells(keys: Keys, grid: Triple) -> Int64[np.ndarray, "3 sites"]:
    return np.stack([keys // (grid[1] * grid[2]), keys // grid[2] % grid[1], keys % grid[2]])


def _strided(keys: Keys, grid: Triple, stage: Stage) -> Keys:
    """Outputs that any input reaches: input = output * stride - padding + offset."""
    cells = _cells(keys, grid) + np.array(stage.padding)[:, None]
    step, size = np.array(stage.stride)[:, None], np.array(stage.grid)[:, None]
    reached = []
    for offset in itertools.product(*map(range, stage.kernel)):
        shifted = cells - np.array(offset)[:, None]
        output = shifted // step
        valid = ((output * step == shifted) & (output >= 0) & (output < size)).all(axis=0)
        reached.append(_keys(output[:, valid], stage.grid))
    return np.unique(np.concatenate(reached))


def _met(backbone: Backbone, layer: Convolution, sites: Mapping[str, Keys]) -> np.ndarray:
    """Whether each output row [taps, rows] has an input at each tap."""
    stage, source = backbone.stage(layer.stage_out), backbone.stage(layer.stage_in)
    centred = tuple(size // 2 for size in layer.kernel)
    stride, padding = ((1, 1, 1), centred) if layer.submanifold else (stage.stride, stage.padding)
    known = sites[layer.stage_in]
    corner = _cells(sites[layer.stage_out], stage.grid) * np.array(stride)[:, None] - np.array(padding)[:, None]
    met = np.zeros((prod(layer.kernel), corner.shape[1]), np.bool_)
    if not len(known):
        return met
    for tap, offset in enumerate(itertools.product(*map(range, layer.kernel))):
        cells = corner + np.array(offset)[:, None]
        inside = ((cells >= 0) & (cells < np.array(source.grid)[:, None])).all(axis=0)
        wanted = _keys(cells, source.grid)
        met[tap] = inside & (known[np.minimum(np.searchsorted(known, wanted), len(known) - 1)] == wanted)
    return met
