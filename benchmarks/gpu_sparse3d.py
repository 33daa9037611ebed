"""The sparse 3D engine on a CUDA machine: correctness first, then latency, then the bars. One command:

    python -m benchmarks.gpu_sparse3d [--frame CLOUD] [--repeats 1000] [--out docs/measurements] [--allow-missing]

It needs an NVIDIA GPU, torch and Triton; cmake and a C++ compiler for the parity of the C++ runtime, compute-sanitizer
for the memory and race checks, CUDA torch and spconv for the comparison. What is absent is a finding of its own, and
the exit code is 1, unless --allow-missing; 1 too where a check or a bar fails, 2 without a GPU that kernels are made
for. OUT gets gpu-sparse3d-<GPU>.md and .json, written anew after each part. No result of it is known yet.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.sparse3d_gpu.cases import Case, Precision, nearest, shuffled, stages_in_torch
from benchmarks.sparse3d_gpu.findings import Finding, bars_of, exit_code, judged, page
from benchmarks.sparse3d_gpu.kernels import Evidence, check_kernels, every_array
from benchmarks.sparse3d_gpu.latency import measure_ours, measure_spconv
from benchmarks.sparse3d_gpu.stages import check_repeats, check_stages
from benchmarks.sparse3d_gpu.tools import SANITIZERS, build_runtime, check_memory, check_runtime, write_case
from calib.readers import read_points
from calib.simulator import simulate_frame
from dm3d_deploy.artifacts import write_bytes
from dm3d_deploy.build import source_digest
from dm3d_deploy.errors import Dm3dError
from dm3d_deploy.pointcloud import PointCloud
from engines.sparse3d.aot import TARGETS, compile_plans
from engines.sparse3d.cuda_executor import CudaPlan
from engines.sparse3d.plan import Plan

DENSE, HALF = 1.0, 0.5
KEPT_TILES = (DENSE, 0.7, HALF, 0.3)
PRECISIONS: tuple[Precision, ...] = ("fp16", "fp32")
KERNEL_POINTS, SANITIZER_POINTS = 60_000, 15_000
QUERY = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version,clocks.max.sm,clocks.max.memory"]
# What a part may die of without taking the findings of others with it: ours, a child's, the GPU's or the disk's.
FAILURES = (Dm3dError, subprocess.SubprocessError, RuntimeError, OSError)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The GPU as nvidia-smi tells it."""

    name: str
    sm: int
    driver: str
    clocks: str


@dataclass(kw_only=True)
class Session:
    """Options, machine and cases of one run, and what it found so far."""

    options: argparse.Namespace
    machine: Machine
    cloud: PointCloud
    findings: list[Finding] = field(default_factory=list)
    cases: dict[tuple[float, int], Case] = field(default_factory=dict)

    def case(self, kept: float, most: int = 0) -> Case:
        """The detector with these tiles on the frame, or on its nearest points; each is made once."""
        if (kept, most) not in self.cases:
            cloud = nearest(self.cloud, most) if most else self.cloud
            self.cases[kept, most] = Case(model=self.options.model, kept=kept, cloud=cloud)
        return self.cases[kept, most]

    def compiled(self, plans: Iterable[Plan]) -> list[Plan]:
        """The plans with kernels for this GPU; what they share is compiled once."""
        return compile_plans(list(plans), [self.machine.sm])[0]


def machine_here() -> Machine:
    """The first GPU; OSError without nvidia-smi."""
    done = subprocess.run([*QUERY, "--format=csv,noheader"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"nvidia-smi answers: {(done.stdout + done.stderr).strip()}")
    return machine_of(done.stdout)


def machine_of(text: str) -> Machine:
    """The first line of the query."""
    name, capability, driver, *clocks = (word.strip() for word in text.splitlines()[0].split(","))
    return Machine(name=name, sm=int(capability.replace(".", "")), driver=driver, clocks=", ".join(clocks))


def start_of(points: bool) -> str:
    """Where a plan starts, in a word."""
    return "points" if points else "voxels"


def kernels(session: Session) -> Iterator[Finding]:
    """Every kernel, of dense and pruned layers, from voxels and points, and above the first stage's capacity."""
    few = session.case(HALF, KERNEL_POINTS)
    room = len(few.voxels(points=False).coords) // 2
    wanted: list[tuple[float, Precision, bool, int | None]] = [(HALF, "fp16", False, room)]
    for kept, precision, points in itertools.product((DENSE, HALF), PRECISIONS, (False, True)):
        wanted.append((kept, precision, points, None))
    cases = [session.case(kept, KERNEL_POINTS) for kept, *_ in wanted]
    plans = session.compiled(
        case.plan(precision, points=points, keep=every_array, room=most)
        for case, (_, precision, points, most) in zip(cases, wanted, strict=True)
    )
    for case, plan, (kept, precision, points, most) in zip(cases, plans, wanted, strict=True):
        feed = case.feed(points=points)
        with CudaPlan(plan) as cuda:
            run = cuda.run(feed)
        evidence = Evidence(backbone=case.backbone, plan=plan, feed=feed, run=run)
        part = f"kernels, {precision}, {kept:g} of the tiles, {start_of(points)}{', over capacity' if most else ''}"
        yield from check_kernels(evidence, part=part, precision=precision)


def stages(session: Session) -> Iterator[Finding]:
    """The whole frame at every stage against torch, and its bytes against themselves."""
    case, sides = session.case(HALF), list(itertools.product((False, True), PRECISIONS))
    plans = session.compiled(case.plan(precision, points=points, keep=every_array) for points, precision in sides)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wholes = (case.voxels(points=False), case.voxels(points=True))
    references = [stages_in_torch(case.detector, voxels, device) for voxels in wholes]
    for plan, (points, precision) in zip(plans, sides, strict=True):
        feed = case.feed(points=points)
        with CudaPlan(plan) as cuda:
            runs = [cuda.run(given) for given in (feed, feed, shuffled(feed, 1))]
        part = f"stages, {precision}, {start_of(points)}"
        yield from check_stages(case, plan, runs[0], references[points], part=part, precision=precision)
        yield check_repeats(runs, part=part)


def runtime(session: Session) -> Iterator[Finding]:
    """The C++ runtime on the whole frame, from voxels and from points."""
    with tempfile.TemporaryDirectory() as name:
        built = build_runtime(Path(name) / "build")
        yield built
        if built.standing == "passed":
            for start, written in _written(session, session.case(HALF), Path(name)):
                yield check_runtime(Path(name) / "build" / "dm3d_run_plan", written, f"plan from {start}")


def sanitizer(session: Session) -> Iterator[Finding]:
    """compute-sanitizer on a small frame, from voxels and from points."""
    with tempfile.TemporaryDirectory() as name:
        for start, written in _written(session, session.case(HALF, SANITIZER_POINTS), Path(name)):
            for kind in SANITIZERS:
                yield check_memory(kind, written, f"plan from {start}")


def _written(session: Session, case: Case, folder: Path) -> Iterator[tuple[str, Path]]:
    """Both plans of a case in files, with what the GPU made of its frame."""
    plans = session.compiled(case.plan("fp16", points=points) for points in (False, True))
    for points, plan in zip((False, True), plans, strict=True):
        feed = case.feed(points=points)
        with CudaPlan(plan) as cuda:
            outputs = cuda.run(feed).outputs
        yield start_of(points), write_case(folder / start_of(points), plan, feed, outputs)


def latencies(session: Session) -> Iterator[Finding]:
    """Dense and pruned, from voxels and from points, then spconv."""
    sides = [*((kept, False) for kept in KEPT_TILES), (HALF, True)]
    plans = session.compiled(session.case(kept).plan("fp16", points=points) for kept, points in sides)
    for plan, (kept, points) in zip(plans, sides, strict=True):
        yield measure_ours(session.case(kept), plan, session.machine.name, session.options.repeats, points=points)
    yield from measure_spconv(session.case(DENSE), session.options.repeats)


def bars(session: Session) -> Iterable[Finding]:
    """What was measured, against the bars."""
    return bars_of([row for finding in session.findings for row in finding.rows])


PARTS: Mapping[str, Callable[[Session], Iterable[Finding]]] = {
    "kernels": kernels, "stages": stages, "runtime": runtime, "sanitizer": sanitizer, "latency": latencies, "bars": bars
}  # fmt: skip


def run(
    session: Session, parts: Mapping[str, Callable[[Session], Iterable[Finding]]], save: Callable[[], None]
) -> None:
    """Part by part; one that dies is a failure of its own, and the others go on."""
    for name, part in parts.items():
        try:
            for finding in part(session):
                print(f"{finding.standing:8}  {finding.part}: {finding.name}: {finding.words}", flush=True)
                session.findings.append(finding)
        except FAILURES as error:
            died = judged(name, "the whole part", False, f"{type(error).__name__}: {error}")
            print(f"{died.standing:8}  {name}: {died.words}", flush=True)
            session.findings.append(died)
        save()


def stamp(session: Session) -> dict[str, Any]:
    """Everything that the numbers depend on."""
    machine, options = session.machine, session.options
    voxels = session.case(DENSE).voxels(points=False)
    return {
        "gpu": machine.name,
        "command": shlex.join(["python", "-m", "benchmarks.gpu_sparse3d", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "GPU": f"{machine.name}, sm_{machine.sm}, driver {machine.driver}, clocks at most {machine.clocks}",
        "versions": ", ".join(f"{name} {version_of(name)}" for name in ("torch", "triton", "spconv", "numpy")),
        "host": f"{platform.machine()}, Python {platform.python_version()}",
        "code": source_digest()[:12],
        "model": f"{options.model}, seeded weights, tiles drawn at random",
        "frame": f"{options.frame or 'simulated nuscenes32, seed 0'}: {len(session.cloud.points):,} points, "
        f"{len(voxels.coords):,} voxels",
    }


def version_of(name: str) -> str:
    """The version of an installed package (spconv's is named after its CUDA release), or that it is absent."""
    found = [item for item in importlib.metadata.distributions() if re.match(rf"{name}(-cu\d+)?$", str(item.name))]
    return found[0].version if found else "absent"


def save(session: Session, told: Mapping[str, Any]) -> None:
    """The page and its data."""
    slug = re.sub(r"[^a-z0-9]+", "-", session.machine.name.lower()).strip("-")
    code = exit_code(session.findings, allow_missing=session.options.allow_missing)
    session.options.out.mkdir(parents=True, exist_ok=True)
    path = session.options.out / f"gpu-sparse3d-{slug}"
    data = {**told, "exit_code": code, "findings": [finding.as_json() for finding in session.findings]}
    write_bytes(path.with_suffix(".json"), (json.dumps(data, indent=1) + "\n").encode())
    write_bytes(path.with_suffix(".md"), page(told, session.findings, code).encode())


def options_of(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", default="centerpoint")
    parser.add_argument("--frame", help="a point cloud that the readers know; a simulated one otherwise")
    parser.add_argument("--repeats", type=int, default=1000, help="runs per time; fewer than 1000 judge no bar")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--allow-missing", action="store_true", help="what cannot be looked at is no failure")
    parser.add_argument("--out", type=Path, default=Path("docs/measurements"), help="folder of the page and its data")
    return parser.parse_args(words)


def main(words: Sequence[str]) -> int:
    """Run the parts and say how it ended."""
    options = options_of(words)
    try:
        machine = machine_here()
    except OSError as error:
        print(f"no NVIDIA GPU can be asked here: {error}", file=sys.stderr)
        return 2
    if machine.sm not in TARGETS:
        print(f"no kernels are compiled for the {machine.name}, sm_{machine.sm}", file=sys.stderr)
        return 2
    cloud = read_points(options.frame) if options.frame else simulate_frame(0, sensor="nuscenes32").cloud
    session = Session(options=options, machine=machine, cloud=cloud)
    told = stamp(session)
    run(session, {name: PARTS[name] for name in options.parts}, lambda: save(session, told))
    code = exit_code(session.findings, allow_missing=options.allow_missing)
    print(f"exit code {code}; written to {options.out}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
