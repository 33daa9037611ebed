"""Who lies near a place: ball queries over points and voxel queries over cells, in OpenPCDet's order.

A place without a neighbour gets the row behind the last one, which holds zeros wherever it is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from dm3d_deploy.config import Grouping

CHUNK_PLACES = 512  # of which all candidates are held at once
SLACK = 1.0001  # cells of the search are this much wider than the radius: float32 may round a distance down to it

Cells = Int64[np.ndarray, "sites 3"]
Places = Float32[np.ndarray, "places 3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbours:
    """Of each place `samples` rows of what was searched, the first one again where fewer were found, and how far (m).

    `offsets` are x, y, z of the neighbour less those of the place; 0 where there is none.
    """

    rows: Int64[np.ndarray, "places samples"]
    offsets: Float32[np.ndarray, "places samples 3"]


def ball_neighbours(points: Places, places: Places, groupings: Sequence[Grouping]) -> list[Neighbours]:
    """The first `samples` points closer than `radius_m`, by rising index, for every grouping; distances in float32."""
    most = max(grouping.radius_m for grouping in groupings)
    found: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in groupings]
    for place, point in _candidates(points, places, most * SLACK):
        squared = _squared(points[point] - places[place])
        near = np.flatnonzero(squared < np.float32(most) * np.float32(most))
        place, point, squared = place[near], point[near], squared[near]
        order = np.argsort(place * len(points) + point)
        place, point, squared = place[order], point[order], squared[order]
        for grouping, parts in zip(groupings, found, strict=True):
            radius = np.float32(grouping.radius_m)
            inside = squared < radius * radius
            parts.append(_first(place[inside], point[inside], grouping.samples))
    return [_packed(points, places, parts, grouping.samples) for grouping, parts in zip(groupings, found, strict=True)]


def voxel_neighbours(
    cells: Cells,
    shape_zyx: tuple[int, int, int],
    centres: Float32[np.ndarray, "sites 3"],
    places: Places,
    place_cells: Cells,
    grouping: Grouping,
) -> Neighbours:
    """The first `samples` sites within `reach_zyx` cells and `radius_m` of each place; z runs slowest, x fastest.

    `cells` and `place_cells` are (z, y, x); a place may lie outside the grid. `centres` are those of the sites (m).
    """
    limit = np.float32(grouping.radius_m) * np.float32(grouping.radius_m)
    reach = np.array(grouping.reach_zyx or (0, 0, 0))
    margin = 2 * reach  # so that no step from a place within reach of the grid leaves the table or its row
    padded = np.array(shape_zyx) + 2 * margin
    steps = np.array([padded[1] * padded[2], padded[2], 1])
    table = np.full(padded.prod(), -1, dtype=np.int32)
    table[(cells + margin) @ steps] = np.arange(len(cells), dtype=np.int32)
    inside = np.flatnonzero(((place_cells >= -reach) & (place_cells < np.array(shape_zyx) + reach)).all(axis=1))
    at = (place_cells[inside] + margin) @ steps
    parts = []
    for step in itertools.product(*(range(-span, span + 1) for span in reach)):
        beside = at + np.array(step) @ steps
        site = table[beside]
        found = np.flatnonzero(site >= 0)
        place, site = inside[found], site[found].astype(np.int64)
        near = _squared(centres[site] - places[place]) <= limit
        parts.append((place[near], site[near]))
    place, site = (np.concatenate(side) for side in zip(*parts, strict=True))
    order = np.argsort(place, kind="stable")
    return _packed(centres, places, [_first(place[order], site[order], grouping.samples)], grouping.samples)


def _squared(offsets: np.ndarray) -> np.ndarray:
    x, y, z = offsets.T
    total: np.ndarray = x * x + y * y + z * z
    return total


def _candidates(points: Places, places: Places, size_m: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (place, point) that hold all closer than `size_m`: the points of a place's cell and of those around it."""
    if not len(points):
        return
    low = points.min(axis=0).astype(np.float64)
    cells = np.floor((points.astype(np.float64) - low) / size_m).astype(np.int64) + 1
    counts = cells.max(axis=0) + 2  # one empty cell on either side, so that a run along x never leaves its row
    keys = (cells[:, 2] * counts[1] + cells[:, 1]) * counts[0] + cells[:, 0]
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    at = np.floor((places.astype(np.float64) - low) / size_m) + 1
    reachable = np.flatnonzero(((at >= 0) & (at < counts)).all(axis=1))
    for start in range(0, len(reachable), CHUNK_PLACES):
        chunk = reachable[start : start + CHUNK_PLACES]
        x, y, z = at[chunk].astype(np.int64).T
        runs = []
        for dz, dy in itertools.product((-1, 0, 1), repeat=2):
            row = ((z + dz) * counts[1] + y + dy) * counts[0]
            first = np.searchsorted(keys, row + np.maximum(x - 1, 0), side="left")
            last = np.searchsorted(keys, row + np.minimum(x + 1, counts[0] - 1), side="right")
            outside = (y + dy < 0) | (y + dy >= counts[1]) | (z + dz < 0) | (z + dz >= counts[2])
            runs.append((first, np.where(outside, first, last)))
        first, last = (np.concatenate(side) for side in zip(*runs, strict=True))
        length = last - first
        place = np.repeat(np.tile(chunk, len(runs)), length)
        within = np.arange(len(place)) - np.repeat(np.cumsum(length) - length, length)
        yield place, order[np.repeat(first, length) + within]


def _first(place: np.ndarray, row: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `samples` pairs of each place; `place` rises."""
    starts = np.flatnonzero(np.r_[True, place[1:] != place[:-1]]) if len(place) else np.zeros(0, np.int64)
    rank = np.arange(len(place)) - np.repeat(starts, np.diff(np.r_[starts, len(place)]))
    return place[rank < samples], row[rank < samples]


def _packed(points: Places, places: Places, parts: Sequence[tuple[np.ndarray, np.ndarray]], samples: int) -> Neighbours:
    place = np.concatenate([part[0] for part in parts]) if parts else np.zeros(0, np.int64)
    row = np.concatenate([part[1] for part in parts]) if parts else np.zeros(0, np.int64)
    counts = np.bincount(place, minlength=len(places))
    starts = np.cumsum(counts) - counts
    padded = np.append(row, len(points))  # what a place without a neighbour reads
    column = np.arange(samples)
    taken = np.where(column < counts[:, None], starts[:, None] + column, starts[:, None])
    rows = padded[np.where(counts[:, None] > 0, taken, len(row))]
    beside = np.concatenate([points, np.zeros((1, 3), np.float32)])
    offsets = beside[rows] - places[:, None]
    offsets[counts == 0] = 0
    return Neighbours(rows=rows, offsets=offsets)
