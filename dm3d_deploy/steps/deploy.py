"""The stages that leave something deployable and time it: export, engine, bench."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from safetensors import safe_open

from dm3d_deploy.artifacts import Engine, Graph, write_json
from dm3d_deploy.config import load_config
from dm3d_deploy.device import devices_from, rtx_targets, stamp_here
from dm3d_deploy.errors import InternalError
from dm3d_deploy.plan_facts import PLANS, plan_refusal
from dm3d_deploy.pointcloud import PointCloud
from dm3d_deploy.stages import FILES, RunContext
from dm3d_deploy.steps.layers import narrowing_of

if TYPE_CHECKING:
    from dm3d_deploy.models.detector import Detector
    from engines.tensorrt_rtx import OpenRows

WARMUP_ROUNDS = 1


def export(run: RunContext) -> None:
    """Write the pruned and the dense detector as ONNX, check what was written, and judge its 2:4 weights."""
    from dm3d_deploy.models.checkpoints import load_checkpoint
    from dm3d_deploy.models.detector import build_detector
    from exporters.backbone3d import export_backbone3d
    from exporters.bev_head import export_bev_head
    from exporters.graph_checks import check_graph, sparsity_of
    from exporters.pillars import export_pillars
    from exporters.second_stage import export_second_stage

    config = load_config(run.path("model_config"))
    precision = cast(Literal["fp16", "fp32"], run.recipe.precision)
    graphs: list[dict[str, Any]] = []
    kinds = {
        "pruned_weights": ("bev_head", "backbone3d", "second_stage"),
        "dense_weights": ("dense_bev_head", "dense_backbone3d", "dense_second_stage"),
    }
    total = len(kinds) * (2 if config.second_stage is None else 3)
    for weights, (head, backbone, second) in kinds.items():
        detector = build_detector(config)
        load_checkpoint(detector, run.path(weights))
        if weights == "pruned_weights":
            detector = without_channels(run, detector)
        graphs.append(_row(head, export_bev_head(detector, run.path(head), precision=precision)))
        run.watch.advanced(len(graphs), total)
        cap, plan = config.voxels.max_voxels, FILES["plan"] if backbone == "backbone3d" else ""
        if detector.over_pillars:
            to_bev = export_pillars(detector, run.path(backbone))
        else:
            to_bev = export_backbone3d(detector, run.path(backbone), max_voxels=cap, plan_file=plan)
        graphs.append(_row(backbone, to_bev))
        run.watch.advanced(len(graphs), total)
        if config.second_stage is not None:
            graphs.append(_row(second, export_second_stage(detector, run.path(second))))
        for kind in (head, backbone) if config.second_stage is None else (head, backbone, second):
            check_graph(run.path(kind))
    verdicts = [asdict(verdict) for verdict in sparsity_of(run.path("bev_head"))]
    write_json(run.path("export_info"), {"graphs": graphs, "sparsity": verdicts})


def without_channels(run: RunContext, detector: Detector) -> Detector:
    """The detector without what the allocation took whole, its weights saved; the same one if that is nothing."""
    from dm3d_deploy.models.checkpoints import save_weights
    from dm3d_deploy.models.surgery import smaller_detector

    narrow = narrowing_of(run)
    if not narrow.sides and not narrow.dropped:
        return detector
    small = smaller_detector(detector, narrow.sides, narrow.dropped)
    save_weights(small, run.path("small_weights"))
    return small


def _row(kind: str, graph: Graph) -> dict[str, Any]:
    return {
        "path": FILES[kind],
        "inputs": {name: [kind, list(shape)] for name, (kind, shape) in graph.inputs.items()},
        "outputs": {name: [kind, list(shape)] for name, (kind, shape) in graph.outputs.items()},
        "opset": graph.opset,
        "rounded_to_zero": graph.rounded_to_zero,
    }


def engine(run: RunContext) -> None:
    """Build an engine of each dense graph for all targets that can be built for here; say what was left out and why."""
    from engines.tensorrt_rtx import build_rtx_engine, rtx_missing

    devices = devices_from(run.recipe.device)
    targets = rtx_targets(devices)
    built: list[dict[str, Any]] = []
    skipped = [
        {"layer": f"engine for {device.name}", "reason": f"cannot be built here: {device.builds_here}"}
        for device in devices
        if device.sm is None or device.sm not in targets
    ]
    missing = rtx_missing()
    if missing is not None and targets:
        skipped.append({"layer": f"engine for {', '.join(targets)}", "reason": f"{missing.what} Fix: {missing.fix}"})
        run.watch.noted(f"no TensorRT-RTX engine: {missing.what} Fix: {missing.fix}")
    elif targets:
        found = build_rtx_engine(
            run.path("bev_head"), FILES["bev_head_engine"], root=run.root, targets=targets,
            precision=run.recipe.precision, log_path=FILES["engine_log"],
        )  # fmt: skip
        built.append(_engine_row(found, {}))
        if load_config(run.path("model_config")).second_stage is not None:
            _second_stage_engine(run, targets, built, skipped)
    write_json(run.path("engines_info"), {"engines": built, "skipped": skipped})


def _second_stage_engine(
    run: RunContext, targets: tuple[str, ...], built: list[dict[str, Any]], skipped: list[dict[str, str]]
) -> None:
    """Build the engine of the second stage, if the 3D plans can say how many rows it reads."""
    from dm3d_deploy.steps.open_rows import plans_needed, second_stage_rows
    from engines.sparse3d.plan_file import read_plan
    from engines.tensorrt_rtx import build_rtx_engine

    config, info = load_config(run.path("model_config")), json.loads(run.path("plan_info").read_text(encoding="utf-8"))
    for kind in plans_needed(config):
        if plan_refusal(info, kind):
            reason = f"a {PLANS[kind]} would say how many rows it reads, and there is none; ONNX Runtime runs the graph"
            skipped.append({"layer": "engine of the second stage", "reason": reason})
            run.watch.noted(f"no engine of the second stage: {reason}")
            return
    rows = second_stage_rows(config, {kind: read_plan(run.path(kind)) for kind in plans_needed(config)})
    found = build_rtx_engine(
        run.path("second_stage"), FILES["second_stage_engine"], root=run.root, targets=targets, precision="fp32",
        log_path=FILES["second_stage_engine_log"], rows=rows,
    )  # fmt: skip
    built.append(_engine_row(found, rows))


def _engine_row(found: Engine, rows: Mapping[str, OpenRows]) -> dict[str, Any]:
    return {
        "path": found.artifact.path,
        "backend": found.backend,
        "version": found.version,
        "built_for": list(found.built_for),
        "precision": found.precision,
        "layers": found.layers,
        "sha256": found.artifact.digest,
        "bytes": found.artifact.bytes,
        "standing": found.standing,
        "rows": [{"dimension": name, **asdict(bound)} for name, bound in rows.items()],
    }


def shown_cloud(run: RunContext) -> tuple[PointCloud, str, int]:
    """The frame that is compared, timed and drawn: its points, its name and its number."""
    info = json.loads(run.path("frames_info").read_text(encoding="utf-8"))
    with safe_open(run.path("frames"), framework="np") as file:
        points: np.ndarray = file.get_tensor("shown.points")
    shown = int(info["shown"])
    label = str(info["frames"][shown]["label"])
    return PointCloud(points=points, columns=tuple(info["shown_columns"]), source=label), label, shown


def bench(run: RunContext) -> None:
    """Time every stage of the dense and the pruned pipeline in turns, on the shown frame, on this machine's CPU."""
    from dm3d_deploy.detect import VARIANTS, load_run
    from engines.latency import latency_warnings, sample

    cloud, label, _ = shown_cloud(run)
    detectors = {variant: load_run(run.root, variant=variant) for variant in reversed(VARIANTS)}
    voxels = next(iter(detectors.values())).voxels_of(cloud).cells
    rounds = WARMUP_ROUNDS + run.recipe.bench_repeats
    done = 0

    def counted(cloud: PointCloud) -> PointCloud:
        nonlocal done
        run.watch.advanced(done, rounds * len(detectors))
        done += 1
        return cloud

    version = next(iter(detectors.values())).backbone.version
    latencies = sample(
        {name: _announced(detector.stages(), counted) for name, detector in detectors.items()},
        [cloud], warmup=WARMUP_ROUNDS, repeats=run.recipe.bench_repeats, voxels=[voxels],
        backend=f"ONNX Runtime {version} CPU, BEV and head {run.recipe.precision}",
    )  # fmt: skip
    if not latencies:
        raise InternalError("the bench timed nothing")
    write_json(
        run.path("latency"),
        {
            "frame": label,
            "machine": stamp_here().as_json(),
            "latency": [latency.as_json() for latency in latencies],
            "warnings": _unsteady(latencies, latency_warnings),
        },
    )


def _announced(stages: Any, before: Any) -> dict[str, Any]:
    """The stages with a progress step in front of the first one."""
    names = list(stages)
    first = stages[names[0]]
    return {**stages, names[0]: lambda cloud: first(before(cloud))}


def _unsteady(latencies: list[Any], judge: Any) -> list[str]:
    """Warnings about the totals; every stage's own would bury them."""
    return [warning for latency in latencies if latency.stage == "total" for warning in judge(latency)]
