"""Runs side by side: what each kept, and what that changed on the same held-out frames."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dm3d_deploy.artifacts import disk_errors, read_manifest, write_bytes, write_json
from dm3d_deploy.errors import StaleArtifact, UsageError
from dm3d_deploy.evaluate import RESULT_NAME
from dm3d_deploy.reporting.pareto import render_comparison
from dm3d_deploy.stages import FILES, STAGES
from dm3d_deploy.steps.layers import PARTS_OF_SCOPE
from dm3d_deploy.sweep import HELD_OUT_NAME

JSON_NAME, TEXT_NAME, PAGE_NAME = "comparison.json", "comparison.txt", "comparison.html"
SETTINGS_OF_FRAMES = next(stage.recipe for stage in STAGES if stage.name == "frames")
# What of them a command has an option for.
OPTIONS = {"build": ("frames", "calibration_frames", "seed"), "sweep": ("frames", "held_out_frames", "seed")}
COLUMNS = (
    "run", "method", "recover", "target", "kept", "of model", "predicted", "pruned", "recovered", "x best other", "AP",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedRun:
    """One run: shares of the backbones' and the model's MACs, and mean distortions of the held-out frames.

    `recovered` is None where no recovery was accepted, `ap` where RUN/ap holds no evaluation. `to_best_other` is the
    distortion of the weights that ship over the least of any other method at the same target; None without another.
    """

    run: str
    method: str
    target: float | None
    recover: str
    kept_of_backbone: float
    kept_of_model: float
    predicted: float
    pruned: float
    recovered: float | None
    ap: float | None
    ap_name: str | None
    to_best_other: float | None = None

    @property
    def distortion(self) -> float:
        """Of the weights that ship."""
        return self.pruned if self.recovered is None else self.recovered


@dataclass(frozen=True, slots=True, kw_only=True)
class RunComparison:
    """Runs of one model, held against the same frames."""

    model: str
    trained: bool
    simulated: bool
    frames: tuple[str, ...]
    runs: tuple[ComparedRun, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def as_text(self) -> str:
        """What was compared, and a line a run."""
        rows = [COLUMNS, *(_cells(row) for row in self.runs)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([self.headline, *lines]) + "\n"

    @property
    def headline(self) -> str:
        """The words that must stand beside the numbers."""
        kind = "simulated held-out frames" if self.simulated else "held-out frames"
        untrained = "" if self.trained else "UNTRAINED, "
        return f"{self.model}: {untrained}distortion of {len(self.frames)} {kind} that chose nothing"


def compare(runs: Sequence[Path], *, out: Path | None = None) -> RunComparison:
    """Gather runs, and write comparison.json, .txt and .html below `out` where one is given.

    Raises UsageError for no run, for runs of several models or weights, and for runs held against different frames.
    """
    if not runs:
        raise UsageError("There is nothing to compare.", fix="name the folders of one run or more")
    found = [_read(Path(run)) for run in runs]
    first = found[0]
    for run, row in zip(runs, found, strict=True):
        if row["dense"] != first["dense"]:
            raise UsageError(
                f"{runs[0]} and {run} prune other weights.", fix="compare runs of the same model and the same weights"
            )
        if row["frames"] != first["frames"]:
            raise _other_frames(first, row)
    comparison = RunComparison(
        model=first["model"], trained=first["trained"], simulated=first["simulated"], frames=tuple(first["frames"]),
        runs=_ranked([row["run"] for row in found]),
    )  # fmt: skip
    if out is not None:
        with disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        write_json(out / JSON_NAME, comparison.as_json())
        write_bytes(out / TEXT_NAME, comparison.as_text().encode())
        write_bytes(out / PAGE_NAME, render_comparison(comparison.as_json(), comparison.headline).encode())
    return comparison


def _other_frames(first: dict[str, Any], other: dict[str, Any]) -> UsageError:
    """What makes the held-out frames of two runs differ, and the options that make them the same."""
    ours, theirs = first["recipe"], other["recipe"]
    names = [name for name in SETTINGS_OF_FRAMES if ours[name] != theirs[name]]
    why = "".join(f"; {name} is {ours[name]} and {theirs[name]}" for name in names)
    return UsageError(
        f"{first['run'].run} and {other['run'].run} were held against other frames{why}.",
        fix=", ".join(_same(name, first, other) for name in names) or "make them anew: the files of --frames changed",
    )


def _same(name: str, first: dict[str, Any], other: dict[str, Any]) -> str:
    for again, kept in ((other, first), (first, other)):
        if name in OPTIONS[again["command"]]:
            value = shlex.quote(str(kept["recipe"][name]))
            return f"repeat the {again['command']} of {again['run'].run} with --{name.replace('_', '-')} {value}"
    return f"build both with the same {name}"


def _read(root: Path) -> dict[str, Any]:
    manifest = read_manifest(root)
    recipe = manifest.recipe
    held_out = _held_out(root)
    allocation = _json(root, FILES["allocation"])
    recovered = held_out["recovered"]
    ap_name, ap = _average_precision(root)
    run = ComparedRun(
        run=str(root), method=str(recipe["method"]), target=recipe["target"], recover=str(recipe["recover"]),
        predicted=allocation["distortion"], pruned=_mean(held_out["masked"]),
        recovered=None if recovered is None else _mean(recovered), ap=ap, ap_name=ap_name,
        kept_of_backbone=_kept(root, "backbone"), kept_of_model=_kept(root, "model"),
    )  # fmt: skip
    return {
        "run": run,
        "recipe": recipe,
        "command": "sweep" if (root / HELD_OUT_NAME).is_file() else "build",
        "model": Path(str(recipe["model"])).stem,
        "trained": manifest.trained,
        "dense": manifest.artifact("dense_weights").digest,
        "frames": held_out["frames"],
        "simulated": held_out["simulated"],
    }


def _held_out(root: Path) -> dict[str, Any]:
    """What a sweep wrote, or what the stage `verify` of a whole build did."""
    if (root / HELD_OUT_NAME).is_file():
        swept: dict[str, Any] = _json(root, HELD_OUT_NAME)
        return swept
    rows = _json(root, FILES["verification"])["held_out"]
    recovered = [row["recovered"] for row in rows]
    info = _json(root, FILES["frames_info"])["frames"]
    return {
        "frames": [row["frame"] for row in rows],
        "simulated": all(row["path"] is None for row in info if row["role"] == "held_out"),
        "masked": [row["masked"] for row in rows],
        "recovered": None if None in recovered else recovered,
    }


def _json(root: Path, name: str) -> Any:
    path = root / name
    if not path.is_file():
        raise StaleArtifact(f"{root} holds no {name}: its build was not finished.", fix="run the build to its end")
    return json.loads(path.read_text(encoding="utf-8"))


def _kept(root: Path, scope: str) -> float:
    part_of = {row["name"]: row["part"] for row in _json(root, FILES["layers"])}
    rows = [row for row in _json(root, FILES["masks_info"]) if part_of[row["layer"]] in PARTS_OF_SCOPE[scope]]
    return math.fsum(row["kept_macs"] for row in rows) / math.fsum(row["dense_macs"] for row in rows)


def _average_precision(root: Path) -> tuple[str | None, float | None]:
    """The first figure of the summary that `evaluate RUN --out RUN/ap` left."""
    path = root / "ap" / RESULT_NAME
    if not path.is_file():
        return None, None
    summary = json.loads(path.read_text(encoding="utf-8"))["summary"]
    name = next(iter(summary))
    return name, summary[name]


def _ranked(runs: Sequence[ComparedRun]) -> tuple[ComparedRun, ...]:
    ranked = []
    for row in runs:
        others = [
            other.distortion
            for other in runs
            if other.target == row.target and other.recover == row.recover and other.method != row.method
        ]
        ratio = row.distortion / min(others) if others and min(others) > 0 else None
        ranked.append(ComparedRun(**{**asdict(row), "to_best_other": ratio}))
    return tuple(ranked)


def _mean(values: Sequence[float]) -> float:
    if not values:
        raise UsageError("A run was held against no frame.", fix="build it with at least one held-out frame")
    return math.fsum(values) / len(values)


def _cells(row: ComparedRun) -> tuple[str, ...]:
    def number(value: float | None, digits: str) -> str:
        return "-" if value is None else format(value, digits)

    return (
        Path(row.run).name, row.method, row.recover, number(row.target, "g"), f"{row.kept_of_backbone:.4f}",
        f"{row.kept_of_model:.4f}", f"{row.predicted:.4g}", f"{row.pruned:.4g}", number(row.recovered, ".4g"),
        number(row.to_best_other, ".2f"), number(row.ap, ".2f"),
    )  # fmt: skip
