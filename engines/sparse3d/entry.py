"""The first steps of a plan: a frame's voxels, or its points, into the canonical rows of the first stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dm3d_deploy.config import VoxelConfig
from dm3d_deploy.errors import UsageError
from engines.sparse3d.assembly import Array, Assembly
from engines.sparse3d.onnx_reader import ENTRY, Backbone
from engines.sparse3d.packing import pitch_of
from engines.sparse3d.shapes import KernelShapes, power_of_two, programs

RINGS = 4096
MOST_POINTS = (1 << 19) - 1  # more could overflow the fixed-point sums of one cell
Six = tuple[float, float, float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What a frame brings, and where the sensor stands in its grid.

    `rows` of voxels (features, coords) or, with `points`, of points; `point_range_m` and `voxel_size_m` as in the
    detector's config, `grid_zyx` its voxel grid: the sensor is at 0, 0 of the range.
    """

    rows: int
    points: bool
    point_range_m: Six
    voxel_size_m: tuple[float, float, float]
    grid_zyx: tuple[int, int, int]

    @property
    def sensor_yx(self) -> tuple[int, int]:
        """The sensor's position in half cells."""
        y, x = (round(-2 * self.point_range_m[axis] / self.voxel_size_m[axis]) for axis in (1, 0))
        return y, x

    def ring_shift(self) -> int:
        """Half cells squared per ring, as a shift: the farthest cell lies in the last of the rings."""
        sizes = zip(self.sensor_yx, self.grid_zyx[1:], strict=True)
        farthest = sum(max(abs(1 - start), abs(2 * cells - 1 - start)) ** 2 for start, cells in sizes)
        return max(0, farthest.bit_length() - (RINGS - 1).bit_length())

    def rings(self, capacity: int) -> int:
        """Rings in which cells are counted: none where the rows cannot be more cells than the first stage holds."""
        return RINGS if self.points or self.rows > capacity else 0


def frame_from_config(config: VoxelConfig, *, rows: int, points: bool = False) -> Frame:
    """The frame of a detector: `rows` of voxels, or of points."""
    return Frame(
        rows=rows,
        points=points,
        point_range_m=config.point_range_m,
        voxel_size_m=config.voxel_size_m,
        grid_zyx=config.grid_zyx,
    )


def enter(
    make: Assembly, frame: Frame, backbone: Backbone, capacity: int, precision: str, shapes: KernelShapes,
    report: Array, status: Array, counts_from: int, scan: Callable[..., None],
) -> Array:  # fmt: skip
    """Write the entry; returns the features of the first stage, canonical rows."""
    _check(frame, backbone)
    array = make.array
    depth, height, width = backbone.stage(ENTRY).grid
    bits, rows = array(f"{ENTRY}.bits"), frame.rows
    rings = frame.rings(capacity)
    histogram = make.cleared("entry.rings", "i32", RINGS) if rings else report
    place = (height, width, *frame.sensor_yx, frame.ring_shift())
    key, grid = make.work("entry.keys", "i32", rows), [programs(rows, shapes.entry_rows)]
    values = make.binding("input", "points" if frame.points else "features", "fp32", rows, backbone.columns)
    coords = None if frame.points else make.binding("input", "coords", "i32", rows, 4)
    count = make.binding("input", "count", "i32", 1)
    if coords is None:
        low_and_size = np.array([*frame.point_range_m[:3], *frame.voxel_size_m], np.float32)
        make.launch(
            "kernels_points.enter_points", grid, values, count, make.constant("entry.grid", low_and_size), key, bits,
            histogram, report, rows, backbone.columns, frame.grid_zyx[0], *place,
            RINGS=rings, PITCH=power_of_two(backbone.columns), BLOCK=shapes.entry_rows,
        )  # fmt: skip
    else:
        make.launch(
            "kernels_index.enter_voxels", grid, coords, count, key, bits, histogram, report, rows, depth, *place,
            RINGS=rings, BLOCK=shapes.entry_rows,
        )  # fmt: skip
    if rings:
        limit = make.work("entry.limit", "i32", 1)
        make.launch(
            "kernels_index.ring_cutoff", [1], histogram, limit, report, status, counts_from, capacity, place[-1],
            float(frame.voxel_size_m[0]), RINGS=rings,
        )  # fmt: skip
        make.launch(
            "kernels_index.drop_far", grid, key, count, bits, limit, rows, *place, RINGS=rings,
            BLOCK=shapes.entry_rows,
        )  # fmt: skip
    scan(ENTRY, report=not rings)
    return _gather(make, frame, backbone, capacity, precision, shapes, values, key, count)


def _gather(
    make: Assembly, frame: Frame, backbone: Backbone, capacity: int, precision: str, shapes: KernelShapes,
    values: Array, key: Array, count: Array,
) -> Array:  # fmt: skip
    """The features of the first stage, from canonical rows."""
    array, rows, columns = make.array, frame.rows, backbone.columns
    pitch = pitch_of(columns)
    out = make.work("entry.features", precision, capacity, pitch)
    index = array(f"{ENTRY}.bits"), array(f"{ENTRY}.prefix"), array(f"{ENTRY}.sites")
    grid = [programs(rows, shapes.strided_rows)]
    if not frame.points:
        make.launch(
            "kernels_index.canonicalise", grid, key, values, count, *index, out, rows, capacity, columns,
            PITCH=pitch, BLOCK=shapes.strided_rows,
        )  # fmt: skip
        return out
    sums = make.cleared("entry.sums", "i64", capacity, columns)
    members = make.cleared("entry.members", "i32", capacity)
    make.launch(
        "kernels_points.sum_points", grid, values, count, key, *index, sums, members, rows, capacity, columns,
        PITCH=power_of_two(columns), BLOCK=shapes.strided_rows,
    )  # fmt: skip
    make.launch(
        "kernels_points.mean_features", [programs(capacity, shapes.strided_rows)], sums, members,
        array(f"{ENTRY}.count"), out, capacity, columns, PITCH=pitch, BLOCK=shapes.strided_rows,
    )  # fmt: skip
    return out


def _check(frame: Frame, backbone: Backbone) -> None:
    depth, height, width = backbone.stage(ENTRY).grid
    sizes = frame.grid_zyx
    if frame.rows < 1 or sizes[1:] != (height, width) or not 1 <= sizes[0] <= depth:
        raise UsageError(
            f"a frame of {frame.rows} rows on {sizes} cells does not fit the backbone's grid {(depth, height, width)}.",
            fix="use the config of the detector that was exported",
        )
    if frame.points and frame.rows > MOST_POINTS:
        raise UsageError(
            f"a frame of {frame.rows} points may overflow the sums of a cell.", fix=f"take {MOST_POINTS} at most"
        )
    if frame.voxel_size_m[0] != frame.voxel_size_m[1]:
        raise UsageError(
            f"cells of {frame.voxel_size_m[0]} x {frame.voxel_size_m[1]} m have no rings around the sensor.",
            fix="use square cells",
        )
