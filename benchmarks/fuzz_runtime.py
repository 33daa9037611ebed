"""Mutated plans against the C++ runtime: `python -m benchmarks.fuzz_runtime [--mutants N] [--seed S]`.

The runtime is built with the address and undefined-behaviour sanitizers and meets a stand-in libcuda. Each mutant must
end in a result; half of them carry the digest that they should have, so that the checks behind it are met as well.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from pathlib import Path

import engines
from engines.sparse3d.plan import (
    F32,
    I32,
    I64,
    Binding,
    Buffer,
    Cubin,
    Kernel,
    Launch,
    Memset,
    Plan,
    Pointer,
    Status,
    StatusWord,
)
from engines.sparse3d.plan_file import write_plan

RUNTIME = Path(str(engines.__file__)).parent / "sparse3d" / "runtime"


def small_plan() -> Plan:
    """Every kind of buffer, step, argument and status word, in few bytes: most mutations hit something that counts."""
    kernel = Kernel(
        name="all", function="kernels.all_kinds", signature=("*fp16", "*i32", "i32", "i64", "fp32"), constexprs={}
    )
    image = Cubin(symbol="all_kinds", image=b"\x7fELF" + bytes(60), shared_bytes=65536, threads=128, hidden_params=2)
    return Plan(
        kernels=(kernel,),
        buffers=(
            Buffer(name="weights", offset=0, bytes=96, kind="constant"),
            Buffer(name="counts", offset=256, bytes=64, kind="workspace"),
            Buffer(name="features", offset=0, bytes=128, kind="input"),
            Buffer(name="bev", offset=0, bytes=64, kind="output"),
        ),
        constants=bytes(range(96)),
        steps=(
            Memset(buffer=1, offset=16, bytes=32, value=2**32 - 1),
            Launch(kernel=0, grid=(5, 2, 1), args=(Pointer(0, 16), Pointer(1), I32(-1), I64(2**40), F32(0.5))),
            Launch(kernel=0, grid=(1, 1, 1), args=(Pointer(2), Pointer(3, 32), I32(7), I64(-1), F32(-2.0))),
        ),
        capacities={"input": 8},
        workspace_bytes=512,
        inputs=(Binding(name="features", dtype="fp32", shape=(8, 4), buffer=2),),
        outputs=(Binding(name="bev", dtype="fp16", shape=(1, 2, 4, 4), buffer=3),),
        status=Status(
            buffer=1,
            words=(
                StatusWord(name="input", kind="count"),
                StatusWord(name="outside", kind="dropped"),
                StatusWord(name="range", kind="cutoff_m"),
            ),
        ),
        cubins={87: (image,), 120: (image,)},
    )


def main() -> None:
    """Build, mutate, print how many ended how."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_plan(folder / "plan", small_plan())
        configure = ["cmake", "-S", str(RUNTIME), "-B", name, "-DDM3D_TESTS=ON", "-DDM3D_SANITIZE=ON"]
        for command in (configure, ["cmake", "--build", name, "--target", "dm3d_fuzz_plan", "stand_in_cuda"]):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        started = time.perf_counter()
        subprocess.run(
            [str(folder / "dm3d_fuzz_plan"), str(folder / "plan"), str(options.mutants), str(options.seed)],
            env={**os.environ, "LD_LIBRARY_PATH": name, "DM3D_CUDA_QUIET": "1"},
            check=True,
        )
        seconds = time.perf_counter() - started
        print(
            f"{(folder / 'plan').stat().st_size} bytes of plan, seed {options.seed}, {seconds:.0f} s, sanitizers silent"
        )


if __name__ == "__main__":
    main()
