"""Three stages added up in the bird's-eye view: their cells are 1, 2 and 4 of the flat grid's wide, and z goes away."""

import triton
import triton.language as tl

from engines.sparse3d.kernels_index import cell_bit, rank_lookup, rows_of


@triton.jit
def flat_cells(site_ptr, row, mine, height, width, flat_width, SHIFT: tl.constexpr):
    """The flat cell below each row of a stage."""
    key = tl.load(site_ptr + row, mask=mine, other=0)
    return (((key // width) % height) << SHIFT) * flat_width + ((key % width) << SHIFT)


@triton.jit
def bitmap_set_flat(
    site_ptr, count_ptr, bits_ptr, capacity, height, width, flat_width, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):
    """Set the bits of the flat cells of one stage."""
    n = rows_of(count_ptr, capacity)
    if tl.program_id(0) * BLOCK < n:
        row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        cell = flat_cells(site_ptr, row, row < n, height, width, flat_width, SHIFT)
        tl.atomic_or(bits_ptr + (cell >> 5), cell_bit(cell), mask=row < n, sem="relaxed")


@triton.jit
def emit_flat_sites(
    site_ptr, count_ptr, bits_ptr, prefix_ptr, out_site_ptr, capacity, out_capacity, height, width, flat_width,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out_site[rank] = the flat cell of each row; rows above each other store the same value."""
    n = rows_of(count_ptr, capacity)
    if tl.program_id(0) * BLOCK < n:
        row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        cell = flat_cells(site_ptr, row, row < n, height, width, flat_width, SHIFT)
        rank = rank_lookup(bits_ptr, prefix_ptr, cell, row < n, out_capacity)
        tl.store(out_site_ptr + rank, cell, mask=rank >= 0)


@triton.jit
def add_column(
    total, features_ptr, bits_ptr, prefix_ptr, x, y, channel, mine, capacity, depth, height, width,
    PITCH: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Total plus the features of all sites of one stage above each flat cell, from the lowest up."""
    met = mine & (x % (1 << SHIFT) == 0) & (y % (1 << SHIFT) == 0)
    for z in range(depth):
        key = (z * height + (y >> SHIFT)) * width + (x >> SHIFT)
        row = rank_lookup(bits_ptr, prefix_ptr, key, met, capacity)
        address = features_ptr + row[:, None] * PITCH + channel[None, :]
        there = (row >= 0)[:, None] & (channel < PITCH)[None, :]
        total += tl.load(address, mask=there, other=0.0).to(tl.float32)
    return total


@triton.jit
def sum_flat(
    site_ptr, count_ptr, out_ptr, features_0_ptr, bits_0_ptr, prefix_0_ptr, features_1_ptr, bits_1_ptr, prefix_1_ptr,
    features_2_ptr, bits_2_ptr, prefix_2_ptr, out_capacity, flat_width, capacity_0, depth_0, height_0, width_0,
    capacity_1, depth_1, height_1, width_1, capacity_2, depth_2, height_2, width_2,
    PITCH: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[row] = the sum of all sites above a flat cell, in fp32 and in the order of stages and heights."""
    n = rows_of(count_ptr, out_capacity)
    if tl.program_id(0) * BLOCK < n:
        row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        mine = row < n
        key = tl.load(site_ptr + row, mask=mine, other=0)
        x, y = key % flat_width, key // flat_width
        total = tl.zeros([BLOCK, CHANNELS], tl.float32)
        total = add_column(
            total, features_0_ptr, bits_0_ptr, prefix_0_ptr, x, y, channel, mine, capacity_0, depth_0, height_0,
            width_0, PITCH, 0,
        )  # fmt: skip
        total = add_column(
            total, features_1_ptr, bits_1_ptr, prefix_1_ptr, x, y, channel, mine, capacity_1, depth_1, height_1,
            width_1, PITCH, 1,
        )  # fmt: skip
        total = add_column(
            total, features_2_ptr, bits_2_ptr, prefix_2_ptr, x, y, channel, mine, capacity_2, depth_2, height_2,
            width_2, PITCH, 2,
        )  # fmt: skip
        target = out_ptr + row[:, None] * PITCH + channel[None, :]
        tl.store(target, total.to(out_ptr.dtype.element_ty), mask=mine[:, None] & (channel < PITCH)[None, :])
