"""Ahead-of-time compilation of CenterPoint's whole 3D backbone: `python -m benchmarks.aot_sparse3d [--precision fp16]`.

Every kernel of the plan, from points to the map, for each in-vehicle architecture, twice: seconds, equal bytes, and
the most that any kernel takes. Built, not run: no GPU is needed, and nothing is said about speed.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

from dm3d_deploy.config import load_config
from dm3d_deploy.device import usable_cores
from dm3d_deploy.models.detector import build_detector
from dm3d_deploy.models.seeded import seed_weights
from engines.sparse3d.aot import compile_plan, sms_of
from engines.sparse3d.entry import Frame
from engines.sparse3d.onnx_reader import read_backbone
from engines.sparse3d.plan import Plan
from engines.sparse3d.plan_file import encode_plan
from engines.sparse3d.planner import plan_backbone
from exporters.backbone3d import export_backbone3d

TARGETS = "sm_80,sm_86,sm_87,sm_89,sm_90,sm_110,sm_120"
POINTS = 300_000


def whole_plan(precision: str) -> Plan:
    """CenterPoint with seeded weights, none pruned."""
    detector = build_detector(load_config("centerpoint"))
    seed_weights(detector, 0)
    voxels = detector.config.voxels
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "backbone3d.onnx"
        export_backbone3d(detector.eval(), path, max_voxels=voxels.max_voxels)
        backbone = read_backbone(path)
    frame = Frame(
        rows=POINTS,
        points=True,
        point_range_m=voxels.point_range_m,
        voxel_size_m=voxels.voxel_size_m,
        grid_zyx=voxels.grid_zyx,
    )
    capacities = {stage.name: voxels.max_voxels for stage in backbone.stages}
    fp16 = precision == "fp16"
    return plan_backbone(backbone, frame=frame, capacities=capacities, precision="fp16" if fp16 else "fp32")


def processor_s() -> float:
    """Seconds that finished child processes have computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Compile twice and compare."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--precision", choices=("fp16", "fp32"), default="fp16")
    parser.add_argument("--targets", default=TARGETS)
    options = parser.parse_args()
    plan, sms = whole_plan(options.precision), sms_of(options.targets.split(","))
    files = []
    for run in range(2):
        started, busy_s = time.perf_counter(), processor_s()
        built, table = compile_plan(plan, sms)
        files.append(encode_plan(built))
        print(
            f"run {run}: {len(plan.kernels)} kernels for {len(sms)} architectures in "
            f"{time.perf_counter() - started:.1f} s on {usable_cores()} cores ({processor_s() - busy_s:.1f} s of "
            f"processor time), {len(files[run])} bytes"
        )
    rows = table["kernels"]
    print(f"Triton {table['triton']}, {options.precision}, equal bytes: {files[0] == files[1]}")
    print(f"spilled bytes: {sum(row['stack_bytes'] + row['local_bytes'] for row in rows)}")
    for name in ("registers", "shared_bytes"):
        most = max(rows, key=lambda row: int(row[name]))
        print(f"most {name}: {most[name]} ({most['kernel']}, {most['sm']})")


if __name__ == "__main__":
    main()
