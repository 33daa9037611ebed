"""The stage that prices what a refit will make good: the best allocation behind it is not the best for the mask."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from dm3d_deploy.artifacts import write_json, write_tensors
from dm3d_deploy.device import devices_from
from dm3d_deploy.errors import InternalError
from dm3d_deploy.pruning.contracts import Curve, Layer, Pattern
from dm3d_deploy.pruning.patterns import eligible_patterns, prune_step, ratio_grid, usable_ratios
from dm3d_deploy.pruning.recovery import STEPS_OF
from dm3d_deploy.recipe import Recipe
from dm3d_deploy.stages import RunContext
from dm3d_deploy.steps.frame_work import frame_job, frames_of
from dm3d_deploy.steps.layers import read_curves, read_layers
from dm3d_deploy.steps.recover import refit_settings

ROWS_PER_INPUT = 4  # shares move less by twice as many rows than by other output columns
COLUMNS = 8


def foresee(run: RunContext) -> None:
    """Write the shares of each curve that a refit leaves, by "PATTERN LAYER"; none where no refit is to be foreseen."""
    shares = _shares(run) if _foresees(run) else {}
    write_json(run.path("refit_shares"), {name: found.tolist() for name, found in sorted(shares.items())})


def foreseen_curves(run: RunContext) -> tuple[list[Curve], bool]:
    """The run's curves, at every ratio times the share that a refit leaves if one is foreseen, and whether it is."""
    shares: dict[str, list[float]] = json.loads(run.path("refit_shares").read_text(encoding="utf-8"))
    curves = read_curves(run.path("curves"))
    strange = set(shares) - {_name(curve.pattern, curve.layer) for curve in curves}
    if strange:
        raise InternalError(f"shares of no curve: {', '.join(sorted(strange))}")
    return [_behind(curve, shares.get(_name(curve.pattern, curve.layer))) for curve in curves], bool(shares)


def _behind(curve: Curve, shares: Sequence[float] | None) -> Curve:
    if shares is None:
        return curve
    return replace(curve, distortion=np.maximum.accumulate(curve.distortion * np.asarray(shares)))


def _foresees(run: RunContext) -> bool:
    """For a budget of MACs that DM3D spends on patterns alone, with a refit behind and frames that may accept it.

    A largest distortion is kept before the recovery, and channels and blocks are priced by their masks alone.
    """
    recipe = run.recipe
    by_patterns = recipe.method == "dm3d" and recipe.cost == "macs" and recipe.max_distortion is None
    return by_patterns and "reconstruct" in STEPS_OF[recipe.recover] and bool(frames_of(run, "selection"))


def _shares(run: RunContext) -> Mapping[str, np.ndarray]:
    steps: dict[str, np.ndarray] = {}
    points: dict[str, dict[str, int]] = {}
    grid = ratio_grid(run.recipe.ratios)
    with safe_open(run.path("scores"), framework="np") as scores:
        for layer, patterns in _to_price(run.recipe, read_layers(run.path("layers")), read_curves(run.path("curves"))):
            score = scores.get_tensor(layer.name)
            for pattern in patterns:
                ratios = usable_ratios(pattern, grid)
                steps[_name(pattern, layer.name)] = prune_step(layer, score, pattern, ratios)
                points.setdefault(layer.name, {})[_name(pattern, layer.name)] = len(ratios)
    file = run.root / "work" / ".steps.safetensors"
    write_tensors(file, steps)
    settings: dict[str, Any] = {
        "steps": str(file.resolve()),
        "curves": points,
        "columns": COLUMNS,
        **refit_settings(run, ROWS_PER_INPUT),
    }
    first = frames_of(run, "calibration")[:1]  # the job reads all frames of the refit at once
    job = frame_job(run, "refit_shares", first, weights=run.start, folder=".shares", settings=settings)
    (result,) = run.pool.run(job, advanced=lambda *_: None, walked=run.watch.advanced)
    found = load_file(result)
    shutil.rmtree(job.out_dir)
    file.unlink()
    return found


def _to_price(
    recipe: Recipe, layers: Iterable[Layer], curves: Iterable[Curve]
) -> Iterable[tuple[Layer, tuple[Pattern, ...]]]:
    """Each layer with those of its curves that the allocation chooses from."""
    offered = {cast(Pattern, pattern) for device in devices_from(recipe.device) for pattern in device.patterns}
    priced = {(curve.layer, curve.pattern) for curve in curves}
    for layer in layers:
        usable = eligible_patterns(layer, offered)[0] if recipe.patterns == "auto" else ("unstructured",)
        chosen: tuple[Pattern, ...] = ("tile",) if "tile" in usable else usable
        found = tuple(pattern for pattern in chosen if (layer.name, pattern) in priced)
        if found:
            yield layer, found


def _name(pattern: str, layer: str) -> str:
    return f"{pattern} {layer}"
