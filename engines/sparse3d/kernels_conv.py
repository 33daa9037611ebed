"""Convolution over tile lists, and what leaves a plan: the dense bird's-eye view, and rows of stages."""

import triton
import triton.language as tl

from engines.sparse3d.kernels_index import rank_lookup, rows_of


@triton.jit
def conv_tile_list(
    features_ptr, book_ptr, count_ptr, list_ptr, length_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, executed_ptr,
    out_capacity, columns, longest, first_column, layer,
    CIN: tl.constexpr, COUT: tl.constexpr, ROWS: tl.constexpr, TILE_IN: tl.constexpr, TILE_OUT: tl.constexpr,
    RESIDUAL: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """One layer: out = relu(sum over tiles of rows @ weight tile, + bias, + residual), one loop without a branch.

    An entry of the list is tap | input tile << 5 | stored tile << 11; weights are [tiles, TILE_IN, TILE_OUT].
    Sums are fp32 whatever the features are. executed[layer] += tiles of this program, where counted.
    """
    n = rows_of(count_ptr, out_capacity)
    block, column = tl.program_id(0), tl.program_id(1)
    if block * ROWS < n:
        row = block * ROWS + tl.arange(0, ROWS)
        mine = row < n
        channel_in = tl.arange(0, TILE_IN)
        channel_out = tl.arange(0, TILE_OUT)
        place = block * columns + first_column + column
        length = tl.load(length_ptr + place)
        total = tl.zeros([ROWS, TILE_OUT], tl.float32)
        sources = book_ptr + row
        inputs = features_ptr + channel_in[None, :]
        tiles = weight_ptr + channel_in[:, None] * TILE_OUT + channel_out[None, :]
        entries = list_ptr + place * longest
        for j in range(length):
            entry = tl.load(entries + j)
            source = tl.load(sources + (entry & 31) * out_capacity, mask=mine, other=-1)
            start = source * CIN + ((entry >> 5) & 63) * TILE_IN
            values = tl.load(inputs + start[:, None], mask=(source >= 0)[:, None], other=0.0)
            weights = tl.load(tiles + (entry >> 11) * (TILE_IN * TILE_OUT))
            total = tl.dot(values, weights, total, input_precision="ieee")
        channel = column * TILE_OUT + channel_out
        total += tl.load(bias_ptr + channel)[None, :]
        place_out = row[:, None] * COUT + channel[None, :]
        if RESIDUAL:
            total += tl.load(residual_ptr + place_out, mask=mine[:, None], other=0.0).to(tl.float32)
        total = tl.maximum(total, 0.0)
        tl.store(out_ptr + place_out, total.to(out_ptr.dtype.element_ty), mask=mine[:, None])
        if COUNTED:
            tl.atomic_add(executed_ptr + layer, length, sem="relaxed")


@triton.jit
def to_bev(
    features_ptr, bits_ptr, prefix_ptr, bev_ptr, capacity, depth, plane, channels,
    PITCH: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ACTIVE: tl.constexpr,
):  # fmt: skip
    """bev[c * depth + z, cell] = features of the site, zero without one: every value is written once, none cleared.

    With ACTIVE (0 or 1) a channel behind the others is one at each site.
    """
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    z = tl.program_id(1)
    inside = cell < plane
    row = rank_lookup(bits_ptr, prefix_ptr, z * plane + cell, inside, capacity)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    real = (channel < channels)[:, None]
    address = features_ptr + row[None, :] * PITCH + channel[:, None]
    values = tl.load(address, mask=real & (row >= 0)[None, :], other=0.0)
    if ACTIVE:
        site = (row >= 0)[None, :] & (channel == channels)[:, None]
        values = tl.where(site, 1.0, values.to(tl.float32)).to(bev_ptr.dtype.element_ty)
        real = (channel <= channels)[:, None]
    tl.store(bev_ptr + (channel[:, None] * depth + z) * plane + cell[None, :], values, mask=real & inside[None, :])


@triton.jit
def give_rows(
    features_ptr, site_ptr, count_ptr, out_ptr, cell_ptr, capacity, channels, height, width,
    PITCH: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[row, channel] = features in fp32 without padding, cell[axis, row] = z, y, x; behind the count 0 and -1."""
    n = rows_of(count_ptr, capacity)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine, real = row < n, row < capacity
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    there = (channel < channels)[None, :]
    address = features_ptr + row[:, None] * PITCH + channel[None, :]
    values = tl.load(address, mask=mine[:, None] & there, other=0.0).to(tl.float32)
    tl.store(out_ptr + row[:, None] * channels + channel[None, :], values, mask=real[:, None] & there)
    if tl.program_id(1) == 0:
        key = tl.load(site_ptr + row, mask=mine, other=0)
        tl.store(cell_ptr + row, tl.where(mine, key // (width * height), -1), mask=real)
        tl.store(cell_ptr + capacity + row, tl.where(mine, (key // width) % height, -1), mask=real)
        tl.store(cell_ptr + 2 * capacity + row, tl.where(mine, key % width, -1), mask=real)
