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
from dm3d_deploy.plan_facts import plan_section
from dm3d_deploy.recipe import Recipe
from dm3d_deploy.reporting.bev_picture import bev_png
from dm3d_deploy.reporting.detection_files import read_detections
from dm3d_deploy.reporting.facts import machine_from_stamp, verdict_sentence
from dm3d_deploy.reporting.render import render_html
from dm3d_deploy.reporting.schema import SCHEMA_VERSION, validate_report
from dm3d_deploy.stages import FILES, STAGES, RunContext
from dm3d_deploy.steps.deploy import shown_cloud
from dm3d_deploy.steps.layers import PARTS_OF_SCOPE

SAME_OBJECT_M = 1.0
OPTIONS = {
    "checkpoint", "frames", "scope", "patterns", "device", "precision", "calibration_frames", "seed", "cost", "profile",
    "method", "recover", "recover_steps", "recover_data", "score_frames",
    "capacity_margin", "capacities",
}  # fmt: skip
COUNTED = {"macs": "MACs", "executed": "executed MACs"}
PICTURE_MARGIN = 1.05
NO_TIME = (
    "ONNX Runtime multiplies zeros like any other number. It saves time only where a kernel offset of the 3D backbone "
    "was pruned as a whole, because the graph leaves it out. 2:4 needs a GPU with sparse tensor cores and a builder "
    "that chooses them; tiles need the sparse 3D engine. Neither ran here."
)
ON_THE_HOST = (
    " Proposals, and which rows their keypoints and RoIs read, are computed in numpy on the host, whatever executes "
    "the rest: a row of their own says how long that took here. Voxels and NMS are numpy's, too."
)
WHY = {
    "dense": "kept whole: its multiplications are worth more than others'",
    "unstructured": "pruned freely below one half, where no hardware form would save time",
    "2:4": "two of four along the input channels, the form of sparse tensor cores",
    "tile": "whole tiles of (offset, input channels, output channels), which a sparse 3D engine can skip",
    "channel": "whole channels, removed from the files: nothing multiplies them any more",
    "depth": "in a residual block of which the identity is left",
}
WHY_UNSTRUCTURED_MODE = "pruned freely, as the paper does: saves nominal multiplications, no time on hardware"


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
    parts, two_stages = _macs_by_part(found), load_config(run.path("model_config")).second_stage is not None
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
        "layers": _layers(run.recipe, found),
        "skipped": [
            *out_of_scope(run.recipe, found["layers"], two_stages),
            *(row for kind in ("allocation", "plan_info", "engines_info") for row in found[kind]["skipped"]),
        ],
        "parity": found["verification"]["parity"],
        "planned_time": found["allocation"]["time"],
        "latency": found["latency"]["latency"],
        "latency_note": NO_TIME + (ON_THE_HOST if two_stages else ""),
        "plan": plan_section(run.root, found["plan_info"]),
        "engines": _engines(found),
        "detections": _detections(run),
        "stages": _stages(run),
        "provenance": _provenance(run, found["latency"]["machine"]),
        "warnings": _warnings(found),
    }


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
        "lower_bound_gap": allocation["gap"],
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


def _layers(recipe: Recipe, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    layers = {row["name"]: row for row in found["layers"]}
    masks = {row["layer"]: row for row in found["masks_info"]}
    verdicts = _verdicts_by_layer(found["export_info"]["sparsity"])
    rows = []
    for choice in found["allocation"]["choices"]:
        name = choice["layer"]
        layer, mask = layers[name], masks[name]
        weights = 1
        for size in layer["shape"]:
            weights *= size
        free = recipe.patterns == "unstructured" and mask["pattern"] == "unstructured"
        rows.append(
            {
                "name": name,
                "part": layer["part"],
                "kind": layer["kind"],
                "weights": weights,
                "dense_macs": mask["dense_macs"],
                "kept_macs": mask["kept_macs"],
                "executed_macs": mask["executed_macs"],
                "ratio": 1 - mask["kept_weights"] / weights,
                "pattern": mask["pattern"],
                "distortion": choice["distortion"],
                "why": WHY_UNSTRUCTURED_MODE if free else WHY[mask["pattern"]],
                "legal_2_4": mask["legal_2_4"],
                "gain": _gain(mask["pattern"], verdicts.get(name)),
            }
        )
    return rows


def _verdicts_by_layer(verdicts: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """By the layer that holds the weight; packed head branches (exporters.head_merge) share one verdict."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in verdicts:
        name = row["weight"].removesuffix(".weight")
        if not name.endswith(".hidden"):
            found[name] = row
            continue
        for output in name.removesuffix(".hidden").split("+"):
            branch, task = output.rsplit("_", 1)
            found[f"dense_head.heads_list.{task}.{branch}.0.0"] = row
    return found


def _gain(pattern: str, verdict: Mapping[str, Any] | None) -> str:
    if pattern == "2:4" and verdict is not None:
        if verdict["expected_gain"]:
            return "a device may gain: wide enough for sparse tensor cores; not measured"
        return str(verdict["reason"])
    if pattern == "tile":
        return "skipped tiles are not computed by a sparse 3D engine; not measured"
    if pattern in ("channel", "depth"):
        return "not in the exported files any more, on any device"
    return "none" if pattern == "dense" else "none: zeros among weights that are all multiplied"


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


def _warnings(found: Mapping[str, Any]) -> list[str]:
    lost = sum(graph["rounded_to_zero"] for graph in found["export_info"]["graphs"] if "/dense/" not in graph["path"])
    pooled = found["output_scale"]["pooled"]
    warnings = list(found["frames_info"]["overflow"])
    if not found["model_info"]["trained"]:
        warnings.append("UNTRAINED: the weights are seeded noise; distortions and boxes say nothing about a detector")
    if found["recovery"]["method"] == "none" and not found["recovery"]["reason"].startswith("none was asked"):
        warnings.append(f"no recovery was run: {found['recovery']['reason']}")
    if lost:
        warnings.append(f"{lost} weights or biases that are not zero became zero in the exported precision")
    if pooled:
        tasks = ", ".join(str(task) for task in pooled)
        warnings.append(
            f"the head's tasks {tasks} (of an anchor head: anchors of a cell) had too few confident cells to scale "
            "their boxes; all tasks' cells were taken"
        )
    return [*warnings, *found["latency"]["warnings"]]
