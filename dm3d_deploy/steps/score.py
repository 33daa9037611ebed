"""The stage that asks what pruning costs in detections: AP on simulated scenes that nothing else of the build saw."""

from __future__ import annotations

import json
from typing import Any

from dm3d_deploy.artifacts import write_json, write_tensors
from dm3d_deploy.config import DetectorConfig, load_config
from dm3d_deploy.errors import UsageError
from dm3d_deploy.evaluation.benchmarks import MIN_POINTS, scored_classes
from dm3d_deploy.evaluation.rows import VULNERABLE
from dm3d_deploy.evaluation.variants import MEASURE, METRIC, VariantRow, variant_rows
from dm3d_deploy.held_out_score import detect_scenes, simulate_scenes
from dm3d_deploy.stages import RunContext
from dm3d_deploy.steps.frame_work import Pieces
from dm3d_deploy.steps.recover import masked_weights

DENSE, MASKED, RECOVERED = "dense", "masked", "recovered"
NOTES = (
    f"an object counts from {MIN_POINTS} points on, within the model's range and 50, 40 or 30 m by its class",
    "a mean is over the classes that the scenes hold",
    "intervals: 95 % by resampling whole frames; with few frames they are rather too narrow than too wide",
)


def score(run: RunContext) -> None:
    """Score the dense, the masked and the recovered weights in torch, or say why there is nothing to score."""
    config = load_config(run.path("model_config"))
    reason = _why_not(run, config)
    found: dict[str, Any] = {"data": None, "measure": None, "means": [], "classes": [], "notes": []}
    if reason is None:
        try:
            found = _scored(run, config)
        except UsageError as error:  # scenes without a single object of the model's classes
            reason = error.what
    write_json(run.path("score"), {"none_because": reason, **found})


def _why_not(run: RunContext, config: DetectorConfig) -> str | None:
    if run.recipe.score_frames == 0:
        return "it was not asked for (--score-frames 0)."
    if not json.loads(run.path("model_info").read_text(encoding="utf-8"))["trained"]:
        return "the weights are UNTRAINED and find nothing that could be counted."
    try:
        scored_classes(METRIC, config.class_names)
    except UsageError as error:
        return error.what
    return None


def _scored(run: RunContext, config: DetectorConfig) -> dict[str, Any]:
    recovered = bool(json.loads(run.path("recovery").read_text(encoding="utf-8"))["accepted"])
    work, count = run.root / "work", run.recipe.score_frames
    weights = {DENSE: run.path("dense_weights"), MASKED: run.path("pruned_weights")}
    if recovered:
        weights = {**weights, MASKED: work / ".masked.safetensors", RECOVERED: run.path("pruned_weights")}
        write_tensors(weights[MASKED], masked_weights(run))
    pieces = Pieces(run, count * (1 + len(weights)))
    scenes = simulate_scenes(work / ".scenes.safetensors", config, frames=count, advanced=pieces.done)
    pieces.next_job(count)
    found = {}
    for variant, path in weights.items():
        found[variant] = detect_scenes(
            scenes, path, config, run.pool, folder=work / ".detections", advanced=pieces.done
        )
        pieces.next_job(count)
    for scratch in (scenes.file, work / ".masked.safetensors"):
        scratch.unlink(missing_ok=True)
    shipped = RECOVERED if recovered else MASKED
    rows = variant_rows(found, scenes.labels, config.voxels.point_range_m, compared=(shipped,))
    names = {name for row in rows for name in row.classes}
    return {
        "data": scenes.words,
        "measure": MEASURE,
        "means": [_as_json(row, shipped, classes=list(row.classes)) for row in rows if row.name not in names],
        "classes": [
            _as_json(row, shipped, subset=row.subset, vulnerable=row.name in VULNERABLE)
            for row in rows
            if row.name in names
        ],
        "notes": list(NOTES),
    }


def _as_json(row: VariantRow, shipped: str, **more: Any) -> dict[str, Any]:
    change = row.changes.get(shipped)
    low, high = (change.interval_points if change else None) or (None, None)
    return {
        "name": row.name,
        **more,
        "objects": row.objects,
        **{f"{variant}_percent": row.ap_percent.get(variant) for variant in (DENSE, MASKED, RECOVERED)},
        "change_points": change.points if change else None,
        "change_low_points": low,
        "change_high_points": high,
    }
