"""The last stage: every number of the run in one document, then the page that shows it."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from dm3d_deploy import __version__
from dm3d_deploy.artifacts import read_manifest, write_bytes, write_json
from dm3d_deploy.build import tool_versions
from dm3d_deploy.config import load_config
from dm3d_deploy.geometry.matching import match_detections
from dm3d_deploy.measurements import read_measurements
from dm3d_deploy.plan_facts import plan_refusal, plan_section
from dm3d_deploy.recipe import Recipe
from dm3d_deploy.reporting.bev_picture import bev_png
from dm3d_deploy.reporting.detection_files import read_detections
from dm3d_deploy.reporting.facts import (
    PART_TITLES,
    machine_from_stamp,
    percent,
    removed_from,
    significant,
    verdict_sentence,
)
from dm3d_deploy.reporting.render import render_html
from dm3d_deploy.reporting.schema import SCHEMA_VERSION, validate_report
from dm3d_deploy.stages import FILES, STAGES, RunContext
from dm3d_deploy.steps.baseline import PAPER
from dm3d_deploy.steps.deploy import shown_cloud
from dm3d_deploy.steps.layers import PARTS_OF_SCOPE, narrowing_of
from dm3d_deploy.steps.report_layers import layer_rows

SAME_OBJECT_M = 1.0
OPTIONS = {
    "checkpoint", "frames", "scope", "patterns", "device", "precision", "calibration_frames", "seed", "cost", "profile",
    "method", "recover", "recover_steps", "recover_data", "score_frames", "voxel_keep", "voxel_stages",
    "capacity_margin", "capacities",
}  # fmt: skip
COUNTED = {"macs": "MACs", "executed": "executed MACs"}
PICTURE_MARGIN = 1.05
NO_TIME = (
    "ONNX Runtime multiplies zeros like any other number. It saves time only where {where}a kernel offset of the 3D "
    "backbone was pruned as a whole, because the graph leaves it out. 2:4 needs a GPU with sparse tensor cores and a "
    "builder that chooses them; tiles need the sparse 3D engine. Neither ran here."
)
ON_THE_HOST = (
    " Proposals, and which rows their keypoints and RoIs read, are computed in numpy on the host, whatever executes "
    "the rest: a row of their own says how long that took here. Voxels and NMS are numpy's, too."
)


def report(run: RunContext) -> None:
    """Gather, check and render."""
    data = gather(run)
    data["verdict"]["sentence"] = verdict_sentence(data)
    validate_report(data)
    write_json(run.path("report"), data)
    write_bytes(run.path("report_page"), render_html(data).encode())


def command_of(recipe: Recipe) -> str:
    """The command line that means this recipe, or the call in Python where there are no options for it.

    How often a latency was sampled is no part of either: it stands beside the latency.
    """
    goal = _goal(recipe)
    usual = Recipe(model=recipe.model, bench_repeats=recipe.bench_repeats, **goal).as_json()
    changed = {name: value for name, value in recipe.as_json().items() if value != usual[name]}
    if recipe.method == PAPER and recipe.sketches == 0:
        del changed["sketches"]
    if not changed.keys() <= OPTIONS:
        named = {"model": recipe.model, **goal, **changed}
        return f"build(Recipe({', '.join(f'{name}={value!r}' for name, value in named.items())}))"
    option = "--target" if recipe.max_distortion is None else "--max-distortion"
    words = ["dm3d-deploy", "build", "--model", recipe.model, option, recipe.goal.removeprefix("distortion")]
    for name, value in changed.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _goal(recipe: Recipe) -> dict[str, Any]:
    """The recipe's fields that say its goal; a time implies its cost."""
    if recipe.target_ms is not None:
        return {"target_ms": recipe.target_ms, "cost": "latency"}
    return {"target": recipe.target} if recipe.target is not None else {"max_distortion": recipe.max_distortion}


def gather(run: RunContext) -> dict[str, Any]:
    """The report's document, its sentence still empty."""
    found = {
        kind: json.loads(run.path(kind).read_text(encoding="utf-8"))
        for kind in (
            "model_info", "frames_info", "layers", "allocation", "masks_info", "recovery", "export_info", "plan_info",
            "engines_info", "verification", "score", "latency", "output_scale",
        )
    }  # fmt: skip
    config, layers = load_config(run.path("model_config")), layer_rows(run.recipe.patterns, found, narrowing_of(run))
    parts, two_stages = _macs_by_part(found), config.second_stage is not None
    total = {column: sum(part[column] for part in parts.values()) for column in ("dense", "kept", "executed")}
    passed = bool(found["verification"]["parity"]) and all(row["passed"] for row in found["verification"]["parity"])
    return {
        "schema": SCHEMA_VERSION,
        "command": command_of(run.recipe),
        "verdict": {"sentence": "", "passed": passed},
        "model": {k: found["model_info"][k] for k in ("name", "trained", "weights_source", "classes", "parameters")},
        "frames": _frames(found["frames_info"]),
        "budget": _budget(run.recipe, found["allocation"], parts),
        "macs": {**total, "by_part": parts},
        "distortion": _distortion(found),
        "recovery": _recovery(run, found["recovery"]),
        "ap": found["score"],
        "layers": layers,
        "skipped": [
            *out_of_scope(run.recipe, found["layers"], two_stages),
            *(row for kind in ("allocation", "plan_info", "engines_info") for row in found[kind]["skipped"]),
        ],
        "parity": found["verification"]["parity"],
        "planned_time": found["allocation"]["time"],
        "latency": found["latency"]["latency"],
        "latency_note": _time_note(run.recipe, layers) + (ON_THE_HOST if two_stages else ""),
        "plan": plan_section(run.root, found["plan_info"]),
        "engines": _engines(found),
        "detections": _detections(run),
        "stages": _stages(run),
        "provenance": _provenance(run, found["latency"]["machine"]),
        "warnings": _warnings(run.recipe, found, pillars=config.pillars is not None),
    }


def _time_note(recipe: Recipe, layers: Sequence[Mapping[str, Any]]) -> str:
    """What saves time in ONNX Runtime, of what this build did."""
    removed = removed_from({"layers": layers}, tuple(PART_TITLES))
    where = "channels or blocks are no longer in the files, where " if removed else ""
    where += "voxels pass a block by, where " if recipe.voxel_keep < 1 else ""
    return NO_TIME.format(where=where.removesuffix("where ") + "and where " if where else "")


def _macs_by_part(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    part_of = {row["name"]: row["part"] for row in found["layers"]}
    there = [part for part in ("3d", "2d", "head") if part in part_of.values()]
    parts = {part: {"dense": 0.0, "kept": 0.0, "executed": 0.0} for part in there}
    for row in found["masks_info"]:
        for column in ("dense", "kept", "executed"):
            parts[part_of[row["layer"]]][column] += row[f"{column}_macs"]
    return parts


def out_of_scope(recipe: Recipe, layers: Sequence[Mapping[str, Any]], two_stages: bool) -> list[dict[str, str]]:
    """What the budget does not count, as one row."""
    names = [row["name"] for row in layers if row["part"] not in PARTS_OF_SCOPE[recipe.scope]]
    if not names:
        return []
    reason = f"outside --scope {recipe.scope}: {len(names)} layers, not pruned; --scope model prunes the head, too"
    if two_stages:
        reason += ". The distortion counts what the second stage answers at the dense detector's proposals"
    return [{"layer": ", ".join(dict.fromkeys(name.split(".", 1)[0] for name in names)), "reason": reason}]


def _frames(info: Mapping[str, Any]) -> dict[str, Any]:
    roles = [row["role"] for row in info["frames"]]
    count = {role: roles.count(role) for role in ("calibration", "selection", "held_out")}
    how = (
        f"{count['calibration']} calibrate, {count['selection']} accept or refuse the recovery, "
        f"{count['held_out']} only report; none has two roles"
    )
    return {
        "source": info["source"],
        "simulated": info["simulated"],
        "held_out_simulated": all(row["path"] is None for row in info["frames"] if row["role"] == "held_out"),
        "calibration": count["calibration"],
        "selection": how,
        "held_out": count["held_out"],
        "notes": info["notes"],
    }


def _share(parts: Mapping[str, Mapping[str, float]], names: tuple[str, ...], column: str) -> float:
    found = [parts[name] for name in names if name in parts]
    return sum(part[column] for part in found) / sum(part["dense"] for part in found)


def _budget(recipe: Recipe, allocation: Mapping[str, Any], parts: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    scope = PARTS_OF_SCOPE[recipe.scope]
    return {
        "goal": _goal_words(recipe, allocation),
        "cost": recipe.cost,
        "target": recipe.target,
        "kept": _share(parts, scope, "kept"),
        "executed": _share(parts, scope, "executed"),
        "scope": recipe.scope,
        "unit": allocation["budget"]["unit"],
        # the bound of 0 has a gap of 1, whatever was chosen: it bounds nothing
        "lower_bound_gap": allocation["gap"] if allocation["gap"] < 1 else None,
        "kept_of_backbone": _share(parts, PARTS_OF_SCOPE["backbone"], "kept"),
        "kept_of_model": _share(parts, PARTS_OF_SCOPE["model"], "kept"),
        "candidates": allocation["candidates"],
    }


def _goal_words(recipe: Recipe, allocation: Mapping[str, Any]) -> str:
    """The goal in words, the cost in them, and for a time how it is known."""
    time = allocation["time"]
    whole = f"the {recipe.scope}'s {COUNTED[recipe.cost]}" if time is None else f"the network's time ({time['label']})"
    if recipe.max_distortion is not None:
        return f"the least of {whole} within a distortion of {recipe.max_distortion:g}"
    if recipe.target is not None:
        return f"at most {100 * recipe.target:g} % of {whole}"
    enough = ", which the dense network takes already" if time["dense_ms"] <= recipe.target_ms else ""
    return f"at most {recipe.target_ms:g} ms of {whole}{enough}"


def _distortion(found: Mapping[str, Any]) -> dict[str, Any]:
    rows = found["verification"]["held_out"]
    recovered = bool(rows) and rows[0]["recovered"] is not None

    def mean(column: str) -> float:
        return float(sum(row[column] for row in rows) / len(rows))

    return {
        "predicted": found["allocation"]["distortion"],
        "foresees_refit": found["allocation"]["foreseen"],
        "heldout": mean("masked"),
        "heldout_after_recovery": mean("recovered") if recovered else None,
        "per_frame": [
            {"frame": row["frame"], "heldout": row["masked"], "after_recovery": row["recovered"]} for row in rows
        ],
        "baselines": [],
    }


def _recovery(run: RunContext, recovery: Mapping[str, Any]) -> dict[str, Any] | None:
    if recovery["method"] == "none":
        return None
    took = json.loads(run.path("recovery_seconds").read_text(encoding="utf-8"))
    return {
        **{k: recovery[k] for k in ("method", "accepted", "before", "after", "reason")},
        "seconds": read_measurements(run.root).seconds.get("recover"),
        "steps": [{**step, "seconds": took.get(step["method"])} for step in recovery["steps"]],
    }


def _engines(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    verdicts = found["export_info"]["sparsity"]
    legal = sum(verdict["legal"] for verdict in verdicts)
    note = (
        "TensorRT-RTX accepts the sparse flag and does nothing with it; full TensorRT times both kernels on the device "
        "and reports what it chose"
    )
    sparsity = {
        "legal": legal,
        "eligible": sum(verdict["legal"] and verdict["eligible"] for verdict in verdicts),
        "chosen": None,
        "note": note,
    }
    return [
        # 2:4 is judged of the head's graph; a second stage is float32, which sparse tensor cores do not take
        {**row, "sparsity": sparsity if row["path"] == FILES["bev_head_engine"] else None}
        for row in found["engines_info"]["engines"]
    ]


def _detections(run: RunContext) -> dict[str, Any]:
    config = load_config(run.path("model_config"))
    dense, frame = read_detections(run.path("dense_detections"))
    pruned, _ = read_detections(run.path("pruned_detections"))
    matching = match_detections(dense, pruned, max_centre_m=SAME_OBJECT_M)
    cloud, _, _ = shown_cloud(run)
    reach = max(abs(edge) for edge in (*config.voxels.point_range_m[:2], *config.voxels.point_range_m[3:5]))
    title = f"{frame}: dense and pruned, as deployed"
    picture = bev_png(
        cloud, dense, title=title, range_m=reach * PICTURE_MARGIN, compare=pruned, names=("dense", "pruned")
    )
    matched = [int(dense.labels[index]) for index in matching.pairs[:, 0]]
    return {
        "frame": frame,
        "dense": len(dense),
        "pruned": len(pruned),
        "matched": len(matching.pairs),
        "by_class": [
            {
                "name": name,
                "dense": int((dense.labels == label).sum()),
                "pruned": int((pruned.labels == label).sum()),
                "matched": matched.count(label),
            }
            for label, name in enumerate(config.class_names)
        ],
        "picture": base64.b64encode(picture).decode(),
    }


def _stages(run: RunContext) -> list[dict[str, Any]]:
    seconds = read_measurements(run.root).seconds
    return [
        {"name": stage.name, "seconds": seconds[stage.name], "fresh": False}
        for stage in STAGES
        if stage.name in seconds and stage.name != "report"
    ]


def _provenance(run: RunContext, stamp: Mapping[str, Any]) -> dict[str, Any]:
    steps = (*read_manifest(run.root).steps, *read_measurements(run.root).steps)
    ours = [artifact for step in steps if step.name != "report" for artifact in step.outputs]
    return {
        "version": __version__,
        "recipe": {name: str(value) for name, value in run.recipe.as_json().items()},
        "tools": {**read_manifest(run.root).tools, **tool_versions(("tensorrt-rtx", "triton"))},
        "machine": machine_from_stamp(stamp, ran_on="cpu"),
        "digests": {artifact.path: artifact.digest for artifact in ours},
    }


def _warnings(recipe: Recipe, found: Mapping[str, Any], *, pillars: bool) -> list[str]:
    lost = sum(graph["rounded_to_zero"] for graph in found["export_info"]["graphs"] if "/dense/" not in graph["path"])
    pooled = found["output_scale"]["pooled"]
    warnings = list(found["frames_info"]["overflow"])
    if not found["model_info"]["trained"]:
        warnings.append("UNTRAINED: the weights are seeded noise; distortions and boxes say nothing about a detector")
    if found["recovery"]["method"] == "none" and not found["recovery"]["reason"].startswith("none was asked"):
        warnings.append(f"no recovery was run: {found['recovery']['reason']}")
    warnings += [*_voxel_warnings(recipe, found, pillars), *_recovery_warnings(found)]
    if lost:
        words = "weight or bias that is" if lost == 1 else "weights or biases that are"
        warnings.append(f"{lost} {words} not zero became zero in the exported precision")
    if pooled:
        tasks = ", ".join(str(task) for task in pooled)
        warnings.append(
            f"the head's tasks {tasks} (of an anchor head: anchors of a cell) had too few confident cells to scale "
            "their boxes; all tasks' cells were taken"
        )
    return [*warnings, *found["latency"]["warnings"]]


def _voxel_warnings(recipe: Recipe, found: Mapping[str, Any], pillars: bool) -> list[str]:
    """That blocks run on fewer voxels, and that ONNX Runtime alone runs a sparse 3D backbone."""
    refusal, warnings = plan_refusal(found["plan_info"], "plan"), []
    if recipe.voxel_keep < 1:
        warnings.append(
            f"voxel pruning: the blocks of stages {recipe.voxel_stages} run on {percent(recipe.voxel_keep)} of their "
            "voxels"
        )
    if refusal and not pillars:
        warnings.append(f"there is no 3D plan, so ONNX Runtime alone runs the 3D backbone: {refusal}")
    return warnings


def _recovery_warnings(found: Mapping[str, Any]) -> list[str]:
    """That a recovery which the selection frames accepted is no better on frames that chose nothing."""
    told = _distortion(found)
    before, after = told["heldout"], told["heldout_after_recovery"]
    if after is None or not found["recovery"]["accepted"] or after <= before:
        return []
    return [
        f"the recovery was accepted on the selection frames, but the {len(told['per_frame'])} held-out frames are "
        f"worse with it: distortion {significant(before)} before, {significant(after)} after"
    ]
