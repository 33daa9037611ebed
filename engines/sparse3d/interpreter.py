"""Runs a plan on the CPU through Triton's interpreter, in a child process: the vehicle's launches, step by step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dm3d_deploy.errors import EngineError, UsageError
from engines.sparse3d.plan import ELEMENT_BYTES, Plan
from engines.sparse3d.plan_file import encode_plan

NUMPY_OF = {"fp32": "float32", "fp16": "float16", "i64": "int64", "i32": "int32", "i8": "int8", "u8": "uint8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRun:
    """What one frame left: outputs, kept work arrays, and the status words by name (counts by stage)."""

    outputs: Mapping[str, np.ndarray]
    kept: Mapping[str, np.ndarray]
    status: Mapping[str, int | float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpretation:
    """The runs, frame by frame, and what was launched for the first: kernel, grid and arguments of each step.

    An argument is a number, or [space, byte] with the space workspace, constants, or an input's or output's name.
    """

    runs: tuple[PlanRun, ...]
    trace: tuple[dict[str, Any], ...]


def interpret(
    plan: Plan, frames: Sequence[Mapping[str, np.ndarray]], *, timeout_s: float = 1800, backwards: bool = False
) -> Interpretation:
    """Run frames one after the other on one workspace, which is filled with ones (NaN, -1) before each.

    `backwards` runs the programs of each launch in the opposite order: a result must not depend on it. Reads and
    writes outside the arrays that a launch was given end the run. MissingDependency without Triton, UsageError for
    inputs that are not the plan's, EngineError for a run that failed.
    """
    for frame in frames:
        check_inputs(plan, frame)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "plan").write_bytes(encode_plan(plan))
        for number, frame in enumerate(frames):
            arrays: dict[str, Any] = {key: np.ascontiguousarray(array) for key, array in frame.items()}
            np.savez(folder / f"frame_{number}.npz", **arrays)
        _child({"folder": name, "frames": len(frames), "backwards": backwards}, timeout_s)
        trace = json.loads((folder / "trace.json").read_text(encoding="utf-8"))
        runs = []
        for number in range(len(frames)):
            with np.load(folder / f"run_{number}.npz") as file:
                runs.append(run_of({key: file[key] for key in file.files}, plan))
    return Interpretation(runs=tuple(runs), trace=tuple(trace))


def check_inputs(plan: Plan, frame: Mapping[str, np.ndarray]) -> None:
    """UsageError unless the frame holds the plan's inputs, of their types and shapes."""
    wanted = {binding.name: (NUMPY_OF[binding.dtype], binding.shape) for binding in plan.inputs}
    found = {name: (array.dtype.name, array.shape) for name, array in frame.items()}
    if found != wanted:
        raise UsageError(f"the plan takes {wanted}, not {found}.", fix="give a frame for this plan")


def run_of(arrays: Mapping[str, np.ndarray], plan: Plan) -> PlanRun:
    """Sort arrays named output:NAME, kept:NAME and status into a run."""
    parts: dict[str, dict[str, np.ndarray]] = {"output": {}, "kept": {}}
    for key, array in arrays.items():
        kind, _, name = key.partition(":")
        if kind in parts:
            parts[kind][name] = array
    words = plan.status.words if plan.status else ()
    values = arrays["status"].view(np.int32) if words else np.zeros(0, np.int32)
    status: dict[str, int | float] = {}
    for word, value in zip(words, values, strict=True):
        status[word.name] = float(value.view(np.float32)) if word.kind == "cutoff_m" else int(value)
    return PlanRun(outputs=parts["output"], kept=parts["kept"], status=status)


def read_kept(plan: Plan, workspace: np.ndarray) -> dict[str, np.ndarray]:
    """Copies of the kept arrays out of the bytes of a workspace."""
    kept = {}
    for name, told in plan.meta.get("kept", {}).items():
        start = plan.buffers[told["buffer"]].offset + told["offset"]
        size = int(np.prod(told["shape"])) * ELEMENT_BYTES[told["dtype"]]
        kept[name] = workspace[start : start + size].view(NUMPY_OF[told["dtype"]]).reshape(told["shape"]).copy()
    return kept


def _child(request: dict[str, Any], timeout_s: float) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    try:
        child = subprocess.run(
            [sys.executable, "-m", "engines.sparse3d.interpreter_worker"],
            input=json.dumps(request),
            cwd=Path(__file__).resolve().parents[2],  # -m looks there first: another package named engines loses
            env={**environment, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": request["folder"]},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(
            f"the interpreter did not finish within {timeout_s:g} s and was stopped.",
            fix="give it more time, a smaller frame or wider blocks",
        ) from None
    if child.returncode == 0:
        return
    _refuse_missing(child.stderr)
    last = child.stderr.strip().splitlines()[-1:] or ["no message"]
    ended = f"code {child.returncode}" if child.returncode > 0 else signal.Signals(-child.returncode).name
    raise EngineError(f"the interpreter ended with {ended}: {last[0]}.", fix="report it with the plan")


def _refuse_missing(stderr: str) -> None:
    from dm3d_deploy.errors import require

    if "No module named 'triton'" in stderr or "MissingDependency" in stderr:
        require("triton", extra="sparse3d")
