"""What other programs must find: the C++ runtime on the same cubins, and compute-sanitizer on the launches."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

import engines
from benchmarks.sparse3d_gpu.cases import Feed
from benchmarks.sparse3d_gpu.findings import Finding, judged, missing
from engines.sparse3d.plan import Plan
from engines.sparse3d.plan_file import write_plan

RUNTIME = Path(str(engines.__file__)).parent / "sparse3d" / "runtime"
SANITIZERS = ("memcheck", "racecheck")
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")
LAST = 300


def build_runtime(folder: Path) -> Finding:
    """Build dm3d_run_plan by cmake in `folder`."""
    tools = [name for name in ("cmake", "c++") if shutil.which(name) is None]
    if tools:
        return missing("C++ runtime", "build", f"not built: {' and '.join(tools)} cannot be found")
    for command in (["cmake", "-S", str(RUNTIME), "-B", str(folder)], ["cmake", "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return judged("C++ runtime", "build", False, (done.stdout + done.stderr)[-LAST:])
    return judged("C++ runtime", "build", True, "built by cmake")


def write_case(folder: Path, plan: Plan, feed: Feed, outputs: Mapping[str, np.ndarray]) -> Path:
    """A folder with a plan, a frame as raw files, and the outputs that are expected."""
    for name, arrays in (("frame", feed), ("expected", outputs)):
        (folder / name).mkdir(parents=True)
        for key, array in arrays.items():
            (folder / name / f"{key}.bin").write_bytes(np.ascontiguousarray(array).tobytes())
    write_plan(folder / "plan", plan)
    return folder


def check_runtime(program: Path, case: Path, name: str) -> Finding:
    """The program's outputs of a case are the expected bytes."""
    command = [str(program), str(case / "plan"), str(case / "out"), str(case / "frame")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return judged("C++ runtime", name, False, f"exit code {done.returncode}: {done.stderr[-LAST:].strip()}")
    return judged("C++ runtime", name, *same_files(case / "expected", case / "out" / "frame"))


def same_files(expected: Path, found: Path) -> tuple[bool, str]:
    """Whether every expected file was found with the same bytes."""
    names = sorted(path.name for path in expected.iterdir())
    other = [
        name
        for name in names
        if not (found / name).is_file() or (found / name).read_bytes() != (expected / name).read_bytes()
    ]
    if other or not names:
        return False, f"other bytes: {', '.join(other) or 'nothing was expected'}"
    return True, f"equal bytes: {', '.join(names)}"


def check_memory(kind: str, case: Path, name: str) -> Finding:
    """One replay of a case under one of compute-sanitizer's tools."""
    part, tool = "compute-sanitizer", shutil.which("compute-sanitizer")
    if tool is None:
        return missing(part, f"{kind}, {name}", "not run: compute-sanitizer cannot be found")
    command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.sparse3d_gpu.replay"]
    done = subprocess.run([*command, str(case)], capture_output=True, text=True, check=False)
    return judged(part, f"{kind}, {name}", *clean(done.returncode, done.stdout + done.stderr))


def clean(code: int, output: str) -> tuple[bool, str]:
    """Whether the tool ran to its summary and found nothing."""
    found = [int(errors or hazards) for errors, hazards in SUMMARY.findall(output)]
    if not found:
        return False, f"no summary, exit code {code}: {output[-LAST:].strip()}"
    if code or any(found):
        return False, f"{sum(found)} errors or hazards, exit code {code}: {output[-LAST:].strip()}"
    return True, "no error, no hazard"
