"""Points to occupied cells: OpenPCDet's voxel generator, made independent of the order of the points."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int64

from dm3d_deploy.config import DetectorConfig, VoxelConfig
from dm3d_deploy.errors import FrameError
from dm3d_deploy.pointcloud import PointCloud, Voxels


def voxelize(cloud: PointCloud, config: VoxelConfig | DetectorConfig) -> Voxels:
    """The mean of the points (first `max_points_per_voxel` of them) in each occupied cell, in raster order.

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
        return voxelize(cloud, config.voxels)
    points = _used_points(cloud, config.columns)
    cells = _cells_of(points, config)
    inside = np.flatnonzero(cells >= 0)
    if not len(inside):
        raise _nothing_inside(cloud, len(points), config)
    points, cells = points[inside], cells[inside]
    order = _canonical_order(points, cells)
    points, cells = points[order], cells[order]

    starts = np.flatnonzero(np.r_[True, cells[1:] != cells[:-1]])
    lengths = np.diff(np.r_[starts, len(cells)])
    occupied = cells[starts]
    kept, cutoff_m = _nearest_cells(occupied, config)

    owner = np.repeat(np.arange(len(starts)), lengths)
    rank = np.arange(len(cells)) - starts[owner]
    counted = rank < config.max_points_per_voxel
    counts = np.minimum(lengths, config.max_points_per_voxel)
    # bincount adds one point after the other, whatever the machine's vector width.
    sums = [np.bincount(owner[counted], weights=column[counted], minlength=len(starts)) for column in points.T]
    features = (np.stack(sums, axis=1) / counts[:, None]).astype(np.float32)

    z, y, x = np.unravel_index(occupied[kept], config.grid_zyx)
    return Voxels(
        features=features[kept],
        coords=np.stack([np.zeros_like(z), z, y, x], axis=1).astype(np.int32),
        num_points=counts[kept].astype(np.int32),
        found=len(starts),
        cutoff_m=cutoff_m,
    )


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


def _cells_of(points: Float32[np.ndarray, "points columns"], config: VoxelConfig) -> Int64[np.ndarray, " points"]:
    """Raster index of each point's cell, -1 outside the grid."""
    low = np.array(config.point_range_m[:3], dtype=np.float32)
    size = np.array(config.voxel_size_m, dtype=np.float32)
    depth, height, width = config.grid_zyx
    with np.errstate(over="ignore"):
        x, y, z = (np.floor((points[:, axis] - low[axis]) / size[axis]) for axis in range(3))
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
