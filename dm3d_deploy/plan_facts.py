"""What a run's 3D plan says of itself: whole for `plan inspect`, in short for the report."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dm3d_deploy.artifacts import Artifact, digest_of_file, read_manifest
from dm3d_deploy.errors import EngineError, StaleArtifact
from dm3d_deploy.recipe import Recipe, recipe_from_mapping
from engines.sparse3d.describe import describe
from engines.sparse3d.plan_file import read_plan

PLANS = {"plan": "3D plan", "points_plan": "3D plan from points"}
STANDING = "compiled, not run on a device"
NOT_COMPILED = "not compiled"


def describe_plan_of_run(root: Path, kind: str = "plan") -> dict[str, Any]:
    """A plan of a run in plain data (`describe`), with its file and digest; `kind` is one of PLANS.

    StaleArtifact with the command that makes it for a run without its plan, and for a changed file; EngineError with
    the reason where the backbone could not be planned.
    """
    manifest = read_manifest(root)
    how = _command(root, recipe_from_mapping(manifest.recipe))
    if not any(file.kind == "plan_info" for step in manifest.steps for file in step.outputs):
        raise StaleArtifact(f"{root} has no plan: its build stopped before the stage 'plan'.", fix=how)
    info = json.loads(manifest.artifact("plan_info").checked(root).read_text(encoding="utf-8"))
    refusal = plan_refusal(info, kind)
    if refusal:
        raise EngineError(f"{root} holds no {PLANS[kind]}. {refusal}", fix="run backbone3d.onnx in ONNX Runtime")
    file = manifest.artifact(kind)
    if not (root / file.path).is_file():
        raise StaleArtifact(f"{root / file.path} is missing.", fix=how)
    return _described(file.checked(root), PLANS[kind])


def describe_plan_file(path: Path) -> dict[str, Any]:
    """The same of a plan file alone; StaleArtifact for one that is damaged or newer."""
    return _described(path, "plan file")


def _described(path: Path, what: str) -> dict[str, Any]:
    told = {"what": what, "path": str(path), "bytes": path.stat().st_size, "sha256": digest_of_file(path)}
    return {**told, **describe(read_plan(path))}


def _command(root: Path, recipe: Recipe) -> str:
    """What makes a run's plan, and nothing before it."""
    from dm3d_deploy.steps.report import command_of

    command = command_of(recipe)
    if command.startswith("build("):
        return f"{command.removesuffix(')')}, {str(root)!r}, first='plan')"
    return f"{command} --out {shlex.quote(str(root))} --from plan"


def plan_refusal(info: Mapping[str, Any], kind: str) -> str:
    """Why the backbone was not planned, or nothing."""
    return next((str(row["reason"]) for row in info["skipped"] if row["layer"] == PLANS[kind]), "")


def plan_section(root: Path, info: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report's `plan`, or None where the backbone was not planned; `info` is resources.json."""
    if plan_refusal(info, "plan"):
        return None
    file: Artifact = read_manifest(root).artifact("plan")
    told = describe(read_plan(file.checked(root)))
    cost, layers = told["cost"], told["layers"]
    return {
        "path": file.path,
        "bytes": file.bytes,
        "sha256": file.digest,
        "precision": told["meta"]["precision"],
        "workspace_bytes": told["workspace_bytes"],
        "launches": told["launches"],
        "memsets": told["memsets"],
        "capacities": told["capacities"],
        "tiles_kept": sum(layer["tiles_kept"] for layer in layers),
        "tiles_skipped": sum(layer["tiles_skipped"] for layer in layers),
        "moved_bytes": cost["moved_bytes"],
        "multiplications": cost["multiplications"],
        "dense_multiplications": cost["dense_multiplications"],
        "devices": [_device(row, info["kernels"]) for row in told["images"]],
        "standing": STANDING if told["images"] else NOT_COMPILED,
        "compiler": f"Triton {info['triton']}" if info["triton"] else "none",
    }


def _device(images: Mapping[str, Any], kernels: list[Mapping[str, Any]]) -> dict[str, Any]:
    rows = [row for row in kernels if row["sm"] == images["sm"]]
    return {
        **images,
        "most_registers": max(row["registers"] for row in rows),
        "most_shared_bytes": max(row["shared_bytes"] for row in rows),
        "spilled_bytes": sum(row["spilled_bytes"] for row in rows),
    }
