"""The coordinate index: one bit per cell of the grid, and the number of set bits before each word of 32.

The row of a cell is the rank of its bit, so rows lie in raster order whatever the order of the input, and a neighbour
is found by two loads. Imported by children that run or compile kernels, never by the rest of the package.
Counts of rows are read on the device; grids are launched for the capacity, and programs behind the count return.
"""

import triton
import triton.language as tl


@triton.jit
def popcount(word):
    """Set bits of each uint32, in plain integer steps that every executor has."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    word = word + (word >> 16)
    return (word & 0x3F).to(tl.int32)


@triton.jit
def cell_bit(key):
    """The bit of a cell within its word, as int32."""
    return (1 << (key & 31).to(tl.uint32)).to(tl.int32, bitcast=True)


@triton.jit
def rows_of(count_ptr, capacity):
    """The count on the device, at least 0 and at most the capacity."""
    return tl.maximum(tl.minimum(tl.load(count_ptr), capacity), 0)


@triton.jit
def tell_surplus(count_ptr, rows, report_ptr):
    """Leave in report[4] how many rows the frame claims beyond those that there are."""
    if tl.program_id(0) == 0:
        tl.store(report_ptr + 4, tl.maximum(tl.load(count_ptr) - rows, 0))


@triton.jit
def rank_lookup(bits_ptr, prefix_ptr, key, valid, capacity):
    """The row of each cell, or -1: an empty cell, one that is not valid, or a row beyond the capacity."""
    word = tl.load(bits_ptr + (key >> 5), mask=valid, other=0).to(tl.uint32, bitcast=True)
    shift = (key & 31).to(tl.uint32)
    hit = valid & (((word >> shift) & 1) != 0)
    before = tl.load(prefix_ptr + (key >> 5), mask=hit, other=0)
    below = word & ((1 << shift).to(tl.uint32) - 1)
    row = before + popcount(below)
    return tl.where(hit & (row < capacity), row, -1)


@triton.jit
def ring_of(key, height, width, sensor_y, sensor_x, ring_shift):
    """Ring of equal area around the sensor: the squared distance in half cells, coarsened."""
    dx = (key % width) * 2 + 1 - sensor_x
    dy = ((key // width) % height) * 2 + 1 - sensor_y
    return (dx * dx + dy * dy) >> ring_shift


@triton.jit
def mark_cells(key, valid, bits_ptr, rings_ptr, height, width, sensor_y, sensor_x, ring_shift, RINGS: tl.constexpr):
    """Set the bits of cells and count each new one in its ring; returns which rows met a cell that was set before."""
    bit = cell_bit(key)
    old = tl.atomic_or(bits_ptr + (key >> 5), bit, mask=valid, sem="relaxed")
    new = valid & ((old & bit) == 0)
    if RINGS > 0:
        ring = ring_of(key, height, width, sensor_y, sensor_x, ring_shift)
        tl.atomic_add(rings_ptr + ring, 1, mask=new, sem="relaxed")
    return valid & ((old & bit) != 0)


@triton.jit
def enter_voxels(
    coords_ptr, count_ptr, key_ptr, bits_ptr, rings_ptr, report_ptr,
    rows, depth, height, width, sensor_y, sensor_x, ring_shift,
    RINGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Cells of coords i32[rows, 4] (batch, z, y, x) -> key i32[rows], -1 outside the grid; sets bits, counts rings.

    report[0] += rows outside the grid, report[1] += rows whose cell another row holds already.
    """
    tell_surplus(count_ptr, rows, report_ptr)
    n = rows_of(count_ptr, rows)
    if tl.program_id(0) * BLOCK < n:
        row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mine = row < n
        z = tl.load(coords_ptr + row * 4 + 1, mask=mine, other=-1)
        y = tl.load(coords_ptr + row * 4 + 2, mask=mine, other=-1)
        x = tl.load(coords_ptr + row * 4 + 3, mask=mine, other=-1)
        valid = mine & (z >= 0) & (z < depth) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        key = tl.where(valid, (z * height + y) * width + x, -1)
        tl.store(key_ptr + row, key, mask=mine)
        again = mark_cells(key, valid, bits_ptr, rings_ptr, height, width, sensor_y, sensor_x, ring_shift, RINGS)
        tl.atomic_add(report_ptr, tl.sum((mine & (valid == 0)).to(tl.int32), 0), sem="relaxed")
        tl.atomic_add(report_ptr + 1, tl.sum(again.to(tl.int32), 0), sem="relaxed")


@triton.jit
def ring_cutoff(
    rings_ptr, limit_ptr, report_ptr, status_ptr, count_word, capacity, ring_shift, cell_m, RINGS: tl.constexpr
):
    """Leave in limit[0] how many rings fit. The first with cells always does; its surplus goes in raster order.

    Leaves the true count, how many cells are dropped (report[3]) and from which radius in metres on (report[5]).
    """
    ring = tl.arange(0, RINGS)
    cells = tl.load(rings_ptr + ring)
    within = tl.cumsum(cells, 0)
    total = tl.sum(cells, 0)
    limit = tl.sum((within <= capacity).to(tl.int32), 0)
    fits = tl.sum(tl.where(ring < limit, cells, 0), 0)
    limit += ((fits == 0) & (total > 0)).to(tl.int32)
    kept = tl.minimum(tl.sum(tl.where(ring < limit, cells, 0), 0), capacity)
    tl.store(limit_ptr, limit)
    tl.store(report_ptr + count_word, total)
    tl.store(status_ptr, total)
    tl.store(report_ptr + 3, total - kept)
    radius = tl.sqrt((limit << ring_shift).to(tl.float32)) * 0.5 * cell_m
    tl.store(report_ptr + 5, tl.where(limit < RINGS, radius, 0.0).to(tl.int32, bitcast=True))


@triton.jit
def drop_far(
    key_ptr, count_ptr, bits_ptr, limit_ptr, rows, height, width, sensor_y, sensor_x, ring_shift,
    RINGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Clear the bits of cells in rings from limit[0] on."""
    n = rows_of(count_ptr, rows)
    limit = tl.load(limit_ptr)
    if (tl.program_id(0) * BLOCK < n) & (limit < RINGS):
        row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        key = tl.load(key_ptr + row, mask=row < n, other=-1)
        far = (key >= 0) & (ring_of(key, height, width, sensor_y, sensor_x, ring_shift) >= limit)
        tl.atomic_and(bits_ptr + (key >> 5), ~cell_bit(key), mask=far, sem="relaxed")


@triton.jit
def rank_block_sums(bits_ptr, sums_ptr, words, BLOCK: tl.constexpr):
    """sums[p] = set bits of the p-th block of words."""
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(bits_ptr + word, mask=word < words, other=0).to(tl.uint32, bitcast=True)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(popcount(bits), 0))


@triton.jit
def rank_prefix(
    bits_ptr, sums_ptr, prefix_ptr, count_ptr, report_ptr, status_ptr, count_word, stage, words, blocks, capacity,
    REPORT: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """prefix[w] = set bits before word w, written where the block has any: no lookup reads the others.

    count[0] = rows, at most the capacity; the true count goes to report[count_word] and status[stage].
    """
    program = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    sums = tl.load(sums_ptr + block, mask=block < blocks, other=0)
    if tl.sum(tl.where(block == program, sums, 0), 0) > 0:
        word = program * BLOCK + tl.arange(0, BLOCK)
        bits = tl.load(bits_ptr + word, mask=word < words, other=0).to(tl.uint32, bitcast=True)
        ones = popcount(bits)
        before = tl.sum(tl.where(block < program, sums, 0), 0)
        tl.store(prefix_ptr + word, before + tl.cumsum(ones, 0) - ones, mask=(word < words) & (ones > 0))
    if program == 0:
        total = tl.sum(sums, 0)
        tl.store(count_ptr, tl.minimum(total, capacity))
        if REPORT:
            tl.store(report_ptr + count_word, total)
            tl.store(status_ptr + stage, total)


@triton.jit
def canonicalise(
    key_ptr, features_ptr, count_ptr, bits_ptr, prefix_ptr, site_ptr, out_ptr, rows, capacity, columns,
    PITCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows into raster order: site[rank] = key, out[rank] = features, zero in the channels behind the columns."""
    n = rows_of(count_ptr, rows)
    if tl.program_id(0) * BLOCK < n:
        row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        key = tl.load(key_ptr + row, mask=row < n, other=-1)
        rank = rank_lookup(bits_ptr, prefix_ptr, key, key >= 0, capacity)
        found = rank >= 0
        tl.store(site_ptr + rank, key, mask=found)
        channel = tl.arange(0, PITCH)
        here = found[:, None] & (channel < columns)[None, :]
        values = tl.load(features_ptr + row[:, None] * columns + channel[None, :], mask=here, other=0.0)
        target = out_ptr + rank[:, None] * PITCH + channel[None, :]
        tl.store(target, values.to(out_ptr.dtype.element_ty), mask=found[:, None])
