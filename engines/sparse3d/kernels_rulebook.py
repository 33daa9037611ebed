"""Which rows meet at which tap: output sites of strided layers, rulebooks, and the tile lists of each block of rows.

Index relation: input = output * stride - padding + offset, tap = (kz * KY + ky) * KX + kx.
"""

import triton
import triton.language as tl

from engines.sparse3d.kernels_index import cell_bit, rank_lookup, rows_of


@triton.jit
def output_cells(
    key, mine, height, width, out_depth, out_height, out_width, pad_z, pad_y, pad_x,
    SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, REACH: tl.constexpr,
):  # fmt: skip
    """The output cells [REACH, rows] that each input reaches: at most ceil(kernel / stride) along each axis."""
    RY: tl.constexpr = (KY + SY - 1) // SY
    RX: tl.constexpr = (KX + SX - 1) // SX
    RZ: tl.constexpr = (KZ + SZ - 1) // SZ
    j = tl.arange(0, REACH)
    x = key % width + pad_x
    y = (key // width) % height + pad_y
    z = key // (width * height) + pad_z
    oz = (z // SZ)[None, :] - (j // (RY * RX))[:, None]
    oy = (y // SY)[None, :] - ((j // RX) % RY)[:, None]
    ox = (x // SX)[None, :] - (j % RX)[:, None]
    valid = mine[None, :] & (j < RZ * RY * RX)[:, None]
    valid = valid & (oz >= 0) & (oy >= 0) & (ox >= 0) & (oz < out_depth) & (oy < out_height) & (ox < out_width)
    valid = valid & (z[None, :] - oz * SZ < KZ) & (y[None, :] - oy * SY < KY) & (x[None, :] - ox * SX < KX)
    return (oz * out_height + oy) * out_width + ox, valid


@triton.jit
def bitmap_set_strided(
    site_ptr, count_ptr, bits_ptr,
    capacity, height, width, out_depth, out_height, out_width, pad_z, pad_y, pad_x,
    SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, REACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set the bits of all outputs of a strided layer; the weights play no part."""
    n = rows_of(count_ptr, capacity)
    if tl.program_id(0) * BLOCK < n:
        row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        key = tl.load(site_ptr + row, mask=row < n, other=0)
        cell, valid = output_cells(
            key, row < n, height, width, out_depth, out_height, out_width, pad_z, pad_y, pad_x,
            SZ, SY, SX, KZ, KY, KX, REACH,
        )  # fmt: skip
        tl.atomic_or(bits_ptr + (cell >> 5), cell_bit(cell), mask=valid, sem="relaxed")


@triton.jit
def emit_strided_sites(
    site_ptr, count_ptr, bits_ptr, prefix_ptr, out_site_ptr,
    capacity, out_capacity, height, width, out_depth, out_height, out_width, pad_z, pad_y, pad_x,
    SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, REACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out_site[rank] = key of each output; several inputs store the same value."""
    n = rows_of(count_ptr, capacity)
    if tl.program_id(0) * BLOCK < n:
        row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        key = tl.load(site_ptr + row, mask=row < n, other=0)
        cell, valid = output_cells(
            key, row < n, height, width, out_depth, out_height, out_width, pad_z, pad_y, pad_x,
            SZ, SY, SX, KZ, KY, KX, REACH,
        )  # fmt: skip
        rank = rank_lookup(bits_ptr, prefix_ptr, cell, valid, out_capacity)
        tl.store(out_site_ptr + rank, cell, mask=rank >= 0)


@triton.jit
def rulebook(
    site_ptr, count_ptr, bits_ptr, prefix_ptr, book_ptr, taps_ptr,
    out_capacity, capacity, out_height, out_width, depth, height, width,
    stride_z, stride_y, stride_x, pad_z, pad_y, pad_x,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """book[tap, row] = input row or -1, taps[block] = bit mask of the taps that a block of ROWS rows needs.

    Sub-manifold and strided layers alike; sites are the output's, bits and prefix the input's.
    """
    n = rows_of(count_ptr, out_capacity)
    if tl.program_id(0) * (ROWS * BLOCKS) < n:
        row = tl.program_id(0) * (ROWS * BLOCKS) + tl.arange(0, ROWS * BLOCKS)
        tap = tl.arange(0, TAPS)
        key = tl.load(site_ptr + row, mask=row < n, other=0)
        x = (key % out_width) * stride_x - pad_x
        y = ((key // out_width) % out_height) * stride_y - pad_y
        z = (key // (out_width * out_height)) * stride_z - pad_z
        iz = z[None, :] + (tap // (KY * KX))[:, None]
        iy = y[None, :] + ((tap // KX) % KY)[:, None]
        ix = x[None, :] + (tap % KX)[:, None]
        real = (tap < KZ * KY * KX)[:, None]
        valid = (row < n)[None, :] & real
        valid = valid & (iz >= 0) & (iz < depth) & (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
        found = rank_lookup(bits_ptr, prefix_ptr, (iz * height + iy) * width + ix, valid, capacity)
        target = book_ptr + tap[:, None] * out_capacity + row[None, :]
        tl.store(target, found, mask=real & (row < out_capacity)[None, :])
        needed = tl.max(tl.reshape((found >= 0).to(tl.int32), [TAPS, BLOCKS, ROWS]), 2)
        block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
        tl.store(taps_ptr + block, tl.sum(needed << tap[:, None], 0), mask=block * ROWS < n)


@triton.jit
def tile_lists(
    taps_ptr, count_ptr, tiles_ptr, starts_ptr, list_ptr, length_ptr, out_capacity, columns,
    ROWS: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    """The weight tiles that a block of ROWS rows executes in each column of tiles.

    A column is one output tile of one layer that shares the rulebook; tiles[starts[c]:starts[c + 1]] are its stored
    tiles, the tap in the low five bits. list[block, column, :length[block, column]] keeps their order.
    """
    n = rows_of(count_ptr, out_capacity)
    block, column = tl.program_id(0), tl.program_id(1)
    if block * ROWS < n:
        needed = tl.load(taps_ptr + block)
        first = tl.load(starts_ptr + column)
        end = tl.load(starts_ptr + column + 1)
        j = first + tl.arange(0, LONGEST)
        tile = tl.load(tiles_ptr + j, mask=j < end, other=0)
        used = ((j < end) & (((needed >> (tile & 31)) & 1) != 0)).to(tl.int32)
        place = (block * columns + column) * LONGEST + tl.cumsum(used, 0) - used
        tl.store(list_ptr + place, tile, mask=used > 0)
        tl.store(length_ptr + block * columns + column, tl.sum(used, 0))
