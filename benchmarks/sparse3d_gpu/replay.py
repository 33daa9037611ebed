"""Runs a case that tools.py wrote once on the GPU, without torch: `python -m benchmarks.sparse3d_gpu.replay CASE`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from engines.sparse3d.cuda_executor import CudaPlan
from engines.sparse3d.interpreter import NUMPY_OF
from engines.sparse3d.plan_file import read_plan


def replay(case: Path, library: str = "libcuda.so.1") -> bool:
    """Whether the outputs are those that are expected."""
    plan = read_plan(case / "plan")
    feed = {
        item.name: np.fromfile(case / "frame" / f"{item.name}.bin", NUMPY_OF[item.dtype]).reshape(item.shape)
        for item in plan.inputs
    }
    with CudaPlan(plan, library=library) as cuda:
        outputs = cuda.run(feed).outputs
    return all(array.tobytes() == (case / "expected" / f"{name}.bin").read_bytes() for name, array in outputs.items())


if __name__ == "__main__":
    sys.exit(not replay(Path(sys.argv[1])))
