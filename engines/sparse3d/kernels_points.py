"""Points to cells to mean features, in fixed point: integer sums do not depend on the order of the points."""

import triton
import triton.language as tl

from engines.sparse3d.kernels_index import mark_cells, rank_lookup, rows_of, tell_surplus

SCALE: tl.constexpr = tl.constexpr(16777216.0)  # 2 ** 24: the last bit is 6e-8
LARGEST: tl.constexpr = tl.constexpr(1048576.0)  # 2 ** 20 leaves room for fewer than 2 ** 19 points


@triton.jit
def axis_cell(points_ptr, row, mine, axis, columns, grid_ptr):
    """floor((value - low) / size) in IEEE single precision, as a float; grid holds low x, y, z, then size x, y, z."""
    value = tl.load(points_ptr + row * columns + axis, mask=mine, other=0.0)
    size = tl.load(grid_ptr + 3 + axis) + tl.zeros_like(value)
    return tl.floor(tl.div_rn(value - tl.load(grid_ptr + axis), size))


@triton.jit
def enter_points(
    points_ptr, count_ptr, grid_ptr, key_ptr, bits_ptr, rings_ptr, report_ptr,
    rows, columns, depth, height, width, sensor_y, sensor_x, ring_shift,
    RINGS: tl.constexpr, PITCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Points f32[rows, columns] (x, y, z first) -> key i32[rows] of each point's cell, -1 for points without one.

    report[0] += points outside the grid, report[2] += points with a value that is not finite or beyond LARGEST.
    """
    tell_surplus(count_ptr, rows, report_ptr)
    n = rows_of(count_ptr, rows)
    if tl.program_id(0) * BLOCK < n:
        row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mine = row < n
        column = tl.arange(0, PITCH)
        here = mine[:, None] & (column < columns)[None, :]
        values = tl.load(points_ptr + row[:, None] * columns + column[None, :], mask=here, other=0.0)
        strange = mine & (tl.max((tl.abs(values) <= LARGEST).to(tl.int32) ^ 1, 1) > 0)
        x = axis_cell(points_ptr, row, mine & (strange == 0), 0, columns, grid_ptr)
        y = axis_cell(points_ptr, row, mine & (strange == 0), 1, columns, grid_ptr)
        z = axis_cell(points_ptr, row, mine & (strange == 0), 2, columns, grid_ptr)
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height) & (z >= 0) & (z < depth)
        valid = mine & inside & (strange == 0)
        zi = tl.where(valid, z, 0.0).to(tl.int32)
        yi = tl.where(valid, y, 0.0).to(tl.int32)
        xi = tl.where(valid, x, 0.0).to(tl.int32)
        key = tl.where(valid, (zi * height + yi) * width + xi, -1)
        tl.store(key_ptr + row, key, mask=mine)
        mark_cells(key, valid, bits_ptr, rings_ptr, height, width, sensor_y, sensor_x, ring_shift, RINGS)
        outside = mine & (strange == 0) & (inside == 0)
        tl.atomic_add(report_ptr, tl.sum(outside.to(tl.int32), 0), sem="relaxed")
        tl.atomic_add(report_ptr + 2, tl.sum(strange.to(tl.int32), 0), sem="relaxed")


@triton.jit
def sum_points(
    points_ptr, count_ptr, key_ptr, bits_ptr, prefix_ptr, site_ptr, sums_ptr, members_ptr, rows, capacity, columns,
    PITCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the points of each cell: sums i64[capacity, columns], members i32[capacity], site[rank] = key."""
    n = rows_of(count_ptr, rows)
    if tl.program_id(0) * BLOCK < n:
        row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        key = tl.load(key_ptr + row, mask=row < n, other=-1)
        rank = rank_lookup(bits_ptr, prefix_ptr, key, key >= 0, capacity)
        found = rank >= 0
        tl.store(site_ptr + rank, key, mask=found)
        tl.atomic_add(members_ptr + rank, 1, mask=found, sem="relaxed")
        column = tl.arange(0, PITCH)
        here = found[:, None] & (column < columns)[None, :]
        values = tl.load(points_ptr + row[:, None] * columns + column[None, :], mask=here, other=0.0)
        fixed = (values * SCALE).to(tl.int64)
        tl.atomic_add(sums_ptr + rank[:, None] * columns + column[None, :], fixed, mask=here, sem="relaxed")


@triton.jit
def mean_features(
    sums_ptr, members_ptr, count_ptr, out_ptr, capacity, columns, PITCH: tl.constexpr, BLOCK: tl.constexpr
):
    """out[rank] = sums / members, zero in the channels behind the columns."""
    n = rows_of(count_ptr, capacity)
    if tl.program_id(0) * BLOCK < n:
        row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mine = row < n
        column = tl.arange(0, PITCH)
        here = mine[:, None] & (column < columns)[None, :]
        sums = tl.load(sums_ptr + row[:, None] * columns + column[None, :], mask=here, other=0)
        members = tl.load(members_ptr + row, mask=mine, other=1).to(tl.float32)
        divisor = members[:, None] + tl.zeros([BLOCK, PITCH], tl.float32)
        mean = tl.div_rn(sums.to(tl.float32) * (1.0 / SCALE), divisor).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row[:, None] * PITCH + column[None, :], mean, mask=mine[:, None])
