"""Kernels that the tests of the ahead-of-time compiler compile: one that is right, others that are not."""

import os

import triton
import triton.language as tl


@triton.jit
def scale(x_ptr, out_ptr, count, factor, BLOCK: tl.constexpr, SHIFT: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x_ptr + row, mask=row < count, other=0.0)
    tl.store(out_ptr + row, value * factor + SHIFT, mask=row < count)


@triton.jit
def crowded(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Every value is needed again after their sum: far more than one warp's registers hold."""
    row = tl.arange(0, BLOCK)
    value = tl.load(x_ptr + row)
    tl.store(out_ptr + row, value - tl.sum(value, 0))


@triton.jit
def product(x_ptr, weight_ptr, out_ptr, steps, SIZE: tl.constexpr):
    row = tl.arange(0, SIZE)
    place = row[:, None] * SIZE + row[None, :]
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for step in range(steps):
        offset = place + step * SIZE * SIZE
        total = tl.dot(tl.load(x_ptr + offset), tl.load(weight_ptr + offset), total)
    tl.store(out_ptr + place, total.to(tl.float16))


@triton.jit
def wrong(x_ptr, out_ptr):
    tl.store(out_ptr, tl.load(x_ptr) + no_such_name)  # noqa: F821


def __getattr__(name: str) -> None:
    """Stands for a compiler that aborts."""
    if name == "aborting":
        os.abort()
    raise AttributeError(name)
