"""Points to occupied cells, or to decorated points of pillars: OpenPCDet's, whatever the order of the points."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32, Float64, Int64

from dm3d_deploy.config import DetectorConfig, PillarConfig, VoxelConfig
from dm3d_deploy.errors import FrameError
from dm3d_deploy.pointcloud import PointCloud, Voxels


def voxelize(cloud: PointCloud, config: VoxelConfig | DetectorConfig) -> Voxels:
    """The mean of the points (first `max_points_per_voxel` of them) in each occupied cell, in raster order.

    A detector over pillars gets the points themselves, see `pillar_points`; one with keypoints gets both.

    A point lies in cell floor((point - low) / size), computed in float32 as spconv's Point2Voxel does for OpenPCDet:
    float64 puts points at cell borders elsewhere. Cells below 0 or beyond the grid are dropped.

    Departures from OpenPCDet, whose result depends on a shuffle: within a cell points are kept in lexicographic order
    of their columns, and above `max_voxels` the cells farthest from the sensor are dropped (horizontal range of the
    cell centre, ties by raster order; `cutoff_m` is the range of the nearest dropped cell).
    Means are summed in float64 and rounded once: neither point order nor thread count changes a bit.
    A cloud without `timestamp` is a single sweep: its time lag is 0. Raises `FrameError` for any other missing
    column, for a non-finite value and for a frame without points in the range.
    """
    if isinstance(config, DetectorConfig):
        if config.pillars is not None:
            return pillar_points(cloud, config.voxels, config.pillars)
        voxels = voxelize(cloud, config.voxels)
        if config.second_stage is None or not config.second_stage.reads_points:
            return voxels
        return replace(voxels, points=points_in_range(_used_points(cloud, config.voxels.columns), config.voxels))
    binned = _binned(cloud, config, any_height=False)
    features = _means(binned).astype(np.float32)
    z, y, x = np.unravel_index(binned.occupied, config.grid_zyx)
    return Voxels(
        features=features,
        coords=np.stack([np.zeros_like(z), z, y, x], axis=1).astype(np.int32),
        num_points=binned.counts.astype(np.int32),
        found=binned.found,
        cutoff_m=binned.cutoff_m,
    )


def points_in_range(
    points: Float32[np.ndarray, "points columns"], config: VoxelConfig
) -> Float32[np.ndarray, "inside columns"]:
    """The points within the range along x and y, borders included and any height, in the frame's own order.

    OpenPCDet's keypoints are drawn from these. Which neighbours they gather depends on the order: nothing is sorted.
    """
    low, high = (np.array(config.point_range_m[i : i + 2], np.float32) for i in (0, 3))
    inside = ((points[:, :2] >= low) & (points[:, :2] <= high)).all(axis=1)
    kept: np.ndarray = points[inside]
    return kept


def pillar_points(cloud: PointCloud, config: VoxelConfig, pillars: PillarConfig) -> Voxels:
    """The kept points of each pillar in raster order, decorated as PillarVFE and DynPillarVFE do it.

    Columns: the point's own (without x, y, z if the config says so), offsets from the mean of the pillar's kept points,
    offsets from the pillar's centre, distance from the sensor (m) if asked for. Which points are kept, and in which
    order, is said at `voxelize`; dynamic pillars keep all, those above and below the range too, as OpenPCDet's do.
    """
    binned = _binned(cloud, config, any_height=pillars.dynamic)
    _, y, x = np.unravel_index(binned.occupied, config.grid_zyx)
    owner = np.repeat(np.arange(len(y)), binned.counts)
    features = decorated(binned.points, owner, _means(binned)[:, :3], np.stack([x, y], axis=1), config, pillars)
    coords = np.stack([np.zeros_like(y), np.zeros_like(y), y, x], axis=1).astype(np.int32)
    return Voxels(
        features=features,
        coords=coords[owner],
        num_points=binned.counts[owner].astype(np.int32),
        found=binned.found,
        cutoff_m=binned.cutoff_m,
    )


def decorated(
    points: Float32[np.ndarray, "points columns"],
    owner: Int64[np.ndarray, " points"],
    means: Float64[np.ndarray, "pillars 3"],
    cells_xy: Int64[np.ndarray, "pillars 2"],
    config: VoxelConfig,
    pillars: PillarConfig,
) -> Float32[np.ndarray, "points features"]:
    """What the point network sees of each point; `owner` is the row of its pillar."""
    size, low = np.array(config.voxel_size_m), np.array(config.point_range_m[:3])
    cells = np.concatenate([cells_xy, np.zeros((len(cells_xy), 1), dtype=np.int64)], axis=1)
    xyz = points[:, :3].astype(np.float64)
    parts = [points if pillars.absolute_xyz else points[:, 3:], xyz - means[owner]]
    parts.append(xyz - (low + size * (cells + 0.5))[owner])
    if pillars.with_distance:
        parts.append(np.linalg.norm(xyz, axis=1, keepdims=True))
    return np.concatenate(parts, axis=1).astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Binned:
    """Kept points, those of one cell together; `occupied` are the raster indices of the kept cells, rising."""

    points: Float32[np.ndarray, "points columns"]
    occupied: Int64[np.ndarray, " cells"]
    counts: Int64[np.ndarray, " cells"]
    found: int
    cutoff_m: float


def _binned(cloud: PointCloud, config: VoxelConfig, *, any_height: bool) -> _Binned:
    points = _used_points(cloud, config.columns)
    cells = _cells_of(points, config, any_height=any_height)
    inside = np.flatnonzero(cells >= 0)
    if not len(inside):
        raise _nothing_inside(cloud, len(points), config)
    points, cells = points[inside], cells[inside]
    order = _canonical_order(points, cells)
    points, cells = points[order], cells[order]

    starts = np.flatnonzero(np.r_[True, cells[1:] != cells[:-1]])
    lengths = np.diff(np.r_[starts, len(cells)])
    kept, cutoff_m = _nearest_cells(cells[starts], config)
    owner = np.repeat(np.arange(len(starts)), lengths)
    counted = np.arange(len(cells)) - starts[owner] < config.max_points_per_voxel
    if len(kept) < len(starts):
        stays = np.zeros(len(starts), dtype=bool)
        stays[kept] = True
        counted &= stays[owner]
    return _Binned(
        points=points[counted],
        occupied=cells[starts][kept],
        counts=np.minimum(lengths, config.max_points_per_voxel)[kept],
        found=len(starts),
        cutoff_m=cutoff_m,
    )


def _means(binned: _Binned) -> Float64[np.ndarray, "cells columns"]:
    owner = np.repeat(np.arange(len(binned.counts)), binned.counts)
    # bincount adds one point after the other, whatever the machine's vector width.
    sums = [np.bincount(owner, weights=column, minlength=len(binned.counts)) for column in binned.points.T]
    means: np.ndarray = np.stack(sums, axis=1) / binned.counts[:, None]
    return means


def _nothing_inside(cloud: PointCloud, count: int, config: VoxelConfig) -> FrameError:
    low, high = config.point_range_m[:3], config.point_range_m[3:]
    spans = ", ".join(f"{a} {p:g}..{q:g}" for a, p, q in zip("xyz", low, high, strict=True))
    return FrameError(
        f"{cloud.source or 'the frame'} has {count} points and none inside {spans} m.",
        fix="use a frame in the sensor frame (x forward, y left, z up, metres) of the model's data set",
    )


def _used_points(cloud: PointCloud, columns: tuple[str, ...]) -> Float32[np.ndarray, "points columns"]:
    rows = len(cloud.points)
    points = np.zeros((rows, len(columns)), dtype=np.float32)
    for index, name in enumerate(columns):
        if name in cloud.columns or name != "timestamp":
            points[:, index] = cloud.column(name)
    finite = np.isfinite(points)
    if not finite.all():
        row, index = (int(i) for i in np.argwhere(~finite)[0])
        raise FrameError(
            f"{cloud.source or 'the frame'}: point {row} of {rows} has {columns[index]} = {points[row, index]}.",
            fix="remove points without a return before they reach the detector",
        )
    points += np.float32(0)  # -0.0 and 0.0 compare equal: without one spelling of zero, sums depend on the order
    return points


def _cells_of(
    points: Float32[np.ndarray, "points columns"], config: VoxelConfig, *, any_height: bool
) -> Int64[np.ndarray, " points"]:
    """Raster index of each point's cell, -1 outside the grid; with `any_height` the only layer takes every z."""
    low = np.array(config.point_range_m[:3], dtype=np.float32)
    size = np.array(config.voxel_size_m, dtype=np.float32)
    depth, height, width = config.grid_zyx
    with np.errstate(over="ignore"):
        x, y, z = (np.floor((points[:, axis] - low[axis]) / size[axis]) for axis in range(3))
    if any_height:
        z = np.zeros_like(z)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height) & (z >= 0) & (z < depth)
    cells = np.full(len(points), -1, dtype=np.int64)
    xi, yi, zi = (axis[inside].astype(np.int64) for axis in (x, y, z))
    cells[inside] = (zi * height + yi) * width + xi
    return cells


def _canonical_order(
    points: Float32[np.ndarray, "points columns"], cells: Int64[np.ndarray, " points"]
) -> Int64[np.ndarray, " points"]:
    """Sort by cell, then by every column in turn."""
    return np.lexsort((*points.T[::-1], cells))


def _nearest_cells(
    occupied: Int64[np.ndarray, " cells"], config: VoxelConfig
) -> tuple[Int64[np.ndarray, " kept"], float]:
    """Indices of the `max_voxels` cells nearest to the sensor, in raster order, and the range of the first dropped."""
    if len(occupied) <= config.max_voxels:
        return np.arange(len(occupied)), float("inf")
    _, y, x = np.unravel_index(occupied, config.grid_zyx)
    centre_x = config.point_range_m[0] + (x + 0.5) * config.voxel_size_m[0]
    centre_y = config.point_range_m[1] + (y + 0.5) * config.voxel_size_m[1]
    # Rounded to a micrometre, so that mirrored cells are the ties they should be.
    range_m = np.round(np.hypot(centre_x, centre_y), 6)
    order = np.argsort(range_m, kind="stable")
    return np.sort(order[: config.max_voxels]), float(range_m[order[config.max_voxels]])
