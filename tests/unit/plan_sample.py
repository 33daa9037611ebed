"""A small plan that uses every part of the format, and images that no GPU reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engines.sparse3d.plan import (
    ELEMENT_BYTES,
    F32,
    I32,
    I64,
    Arg,
    Binding,
    Buffer,
    Cubin,
    Kernel,
    Launch,
    Memset,
    Plan,
    PlanLayer,
    Pointer,
    Status,
    StatusWord,
    add_cubins,
    packed_constants,
)

SIGNATURE = ("*fp16", "*i32", "*fp32", "i32", "i64", "fp32")


KERNELS = (
    Kernel(name="scale/64", function="kernels.scale", signature=SIGNATURE, constexprs={"BLOCK": 64, "RELU": True}),
    Kernel(name="count", function="kernels_index.count", signature=("*i32",), constexprs={}, num_warps=1, num_stages=1),
)
STEPS = (
    Memset(buffer=2, offset=16, bytes=64, value=0xFFFFFFFF),
    Launch(
        kernel=0,
        grid=(7, 3, 2),
        args=(Pointer(0), Pointer(1, 16), Pointer(3), I32(-5), I64(-(2**40)), F32(0.1)),
    ),
    Launch(kernel=1, grid=(1, 1, 1), args=(Pointer(5),)),
    Memset(buffer=4, offset=0, bytes=48),
    Launch(
        kernel=0,
        grid=(2**31 - 1, 65535, 65535),
        args=(Pointer(4, 32), Pointer(2, 992), Pointer(3, 16), I32(2**31 - 1), I64(2**63 - 1), F32(-3.0)),
    ),
)
STATUS = Status(
    buffer=5,
    words=(
        StatusWord(name="input", kind="count"),
        StatusWord(name="conv2", kind="count"),
        StatusWord(name="outside the grid", kind="dropped"),
        StatusWord(name="range", kind="cutoff_m"),
    ),
)


def sample_plan() -> Plan:
    constants, buffers = packed_constants(
        {"weights": np.arange(40, dtype=np.float16), "starts": np.arange(7, dtype=np.int32)}
    )
    return Plan(
        kernels=KERNELS,
        buffers=(
            *buffers,
            Buffer(name="bits", offset=256, bytes=1000, kind="workspace"),
            Buffer(name="features", offset=0, bytes=4 * 12, kind="input"),
            Buffer(name="bev", offset=0, bytes=2 * 24, kind="output"),
            Buffer(name="status", offset=0, bytes=4 * 4, kind="output"),
        ),
        constants=constants,
        steps=STEPS,
        capacities={"input": 100, "conv2": 60},
        workspace_bytes=1500,
        inputs=(Binding(name="features", dtype="fp32", shape=(4, 3), buffer=3),),
        outputs=(
            Binding(name="bev", dtype="fp16", shape=(1, 2, 3, 4), buffer=4),
            Binding(name="status", dtype="i32", shape=(4,), buffer=5),
        ),
        layers=(PlanLayer(name="conv1", tiles_kept=20, tiles_total=27, taps=27, in_channels=16, out_channels=32),),
        status=STATUS,
        meta={"grid_zyx": [41, 8, 8], "bytes_moved": 12345},
    )


def sample_with_cubins(*sms: int) -> Plan:
    """Images in the form that the stand-in libcuda reads: the parameters' kinds, `_` for one of Triton's own."""
    plan = sample_plan()
    for sm in sms:
        images = (
            Cubin(
                symbol="scale",
                image=b"\x7fELFdm3dpppilf__\0" + bytes([sm]) * 300,
                shared_bytes=50000,
                threads=128,
                hidden_params=2,
            ),
            Cubin(symbol="count", image=b"\x7fELFdm3dp\0", shared_bytes=0, threads=32, hidden_params=0),
        )
        plan = add_cubins(plan, sm, images)
    return plan


def sample_images(plan: Plan, sm: int) -> Plan:
    """The plan with an image for each kernel in the form that the stand-in reads, as it were compiled."""
    letters = {"i32": "i", "i64": "l", "fp32": "f"}
    cubins = []
    for kernel in plan.kernels:
        kinds = "".join(letters.get(name, "p") for name in kernel.signature)
        image = f"\x7fELFdm3d{kinds}__\0".encode()
        symbol = kernel.function.rpartition(".")[2]
        cubins.append(Cubin(symbol=symbol, image=image, shared_bytes=0, threads=32 * kernel.num_warps, hidden_params=2))
    return add_cubins(plan, sm, cubins)


def random_plan(rng: np.random.Generator) -> Plan:
    """Anything that Python takes for a plan."""
    buffers, inputs, outputs = [], [], []
    sizes = rng.integers(1, 4096, 3)
    for number, size in enumerate(sizes):
        buffers.append(Buffer(name=f"работа {number}", offset=256 * number, bytes=int(size), kind="workspace"))
    for kind, bound in (("input", inputs), ("output", outputs)):
        for number in range(rng.integers(0, 4)):
            dtype = str(rng.choice(list(ELEMENT_BYTES)))
            shape = tuple(int(size) for size in rng.integers(1, 5, rng.integers(0, 7)))
            size = int(np.prod(shape, dtype=np.int64)) * ELEMENT_BYTES[dtype]
            bound.append(Binding(name=f"{kind}{number}", dtype=dtype, shape=shape, buffer=len(buffers)))
            buffers.append(Buffer(name=f"{kind}{number}", offset=0, bytes=size, kind=kind))
    kernels, steps = [], []
    for number in range(rng.integers(1, 5)):
        types = ["*fp16", "*u8", "i32", "i64", "fp32"]
        signature = tuple(str(name) for name in rng.choice(types, rng.integers(0, 65)))
        kernels.append(Kernel(name=f"k{number}", function="kernels.k", signature=signature, constexprs={"A": number}))
        for _ in range(rng.integers(0, 3)):
            args = tuple(_random_arg(rng, name, buffers) for name in signature)
            grid = tuple(int(size) for size in rng.integers(1, 65536, 3))
            steps.append(Launch(kernel=number, grid=grid, args=args))
    plan = Plan(
        kernels=tuple(kernels),
        buffers=tuple(buffers),
        constants=b"",
        steps=tuple(steps),
        capacities={},
        workspace_bytes=512 + 4096,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
    )
    return sample_images(plan, 87)


def _random_arg(rng: np.random.Generator, name: str, buffers: Sequence[Buffer]) -> Arg:
    if name.startswith("*"):
        buffer = int(rng.integers(len(buffers)))
        return Pointer(buffer, int(rng.integers(-(-buffers[buffer].bytes // 16))) * 16)
    if name == "fp32":
        return F32(float(rng.normal()))
    bits = 32 if name == "i32" else 64
    value = int(rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    return I32(value) if bits == 32 else I64(value)
