"""The stage that plans the 3D engine: capacities from the calibration frames, kernels compiled without a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import ceil, prod
from typing import Any, Literal, cast

import numpy as np
from jaxtyping import Int16
from safetensors import safe_open

from dm3d_deploy.artifacts import write_json
from dm3d_deploy.config import VOXELNEXT, load_config
from dm3d_deploy.device import Device, devices_from
from dm3d_deploy.errors import Dm3dError, EngineError, MissingDependency, UsageError, nearest
from dm3d_deploy.plan_facts import NOT_COMPILED, PLANS
from dm3d_deploy.recipe import rooms_from_text
from dm3d_deploy.stages import RunContext
from engines.sparse3d.aot import compile_plans, sms_of
from engines.sparse3d.entry import MOST_POINTS, Frame, frame_from_config
from engines.sparse3d.onnx_reader import Backbone, read_backbone
from engines.sparse3d.plan import Plan
from engines.sparse3d.plan_file import write_plan
from engines.sparse3d.planner import calibrated_plan
from engines.sparse3d.shapes import DEVICE
from engines.sparse3d.sites import frame_statistics

POINTS = "points"
PILLARS = "pillars have no 3D backbone; ONNX Runtime runs their point network (onnx/backbone3d.onnx)"
WHOLE_MAP = (
    "onnx/bev_head.onnx runs the pointwise head at every cell of the map and empties what is not active; its "
    "multiplications are counted at active cells"
)
VEHICLES = "orin,rtx4090,thor-jp7,rtx5090"
NOTHING_COMPILED: dict[str, Any] = {
    "triton": None, "standing": NOT_COMPILED, "reproducible": True, "targets": {}, "kernels": [],
}  # fmt: skip


def plan3d(run: RunContext) -> None:
    """Plan the pruned 3D backbone, compile its kernels for the recipe's devices, and say what was left out and why."""
    sms, skipped = sms_and_skipped(plan_devices(run.recipe.device))
    plans, told = _neutral_plans(run, skipped), NOTHING_COMPILED
    try:
        if plans and sms:
            built, told = compile_plans(list(plans.values()), sms)
            plans = dict(zip(plans, built, strict=True))
    except MissingDependency as error:
        names = ", ".join(f"sm_{sm}" for sm in sms)
        skipped.append({"layer": f"3D kernels for {names}", "reason": str(error)})
        run.watch.noted(f"no kernels in the 3D plan, for {names}: {error}")
    for name, plan in plans.items():
        write_plan(run.path(name), plan)
    write_json(run.path("plan_info"), {**told, "skipped": skipped})


def plan_devices(names: str) -> tuple[Device, ...]:
    """The devices of a plan: `auto` means the vehicles' and lab's usual GPUs, as a plan depends on no machine."""
    words = [VEHICLES if word.strip().lower() == "auto" else word for word in names.split(",")]
    return devices_from(",".join(words))


def sms_and_skipped(devices: Iterable[Device]) -> tuple[tuple[int, ...], list[dict[str, str]]]:
    """Architectures to compile for, and each device for which none is, with the reason."""
    sms: dict[int, None] = {}
    skipped = []
    for device in devices:
        if device.sm is None:
            skipped.append({"layer": f"3D kernels for {device.name}", "reason": "a CPU runs backbone3d.onnx instead"})
            continue
        sms.update(dict.fromkeys(sms_of([device.sm])))
    return tuple(sorted(sms)), skipped


def _neutral_plans(run: RunContext, skipped: list[dict[str, str]]) -> dict[str, Plan]:
    """The plans of backbone3d.onnx without kernels, as far as they can be made; the others join `skipped`."""
    plans: dict[str, Plan] = {}

    def left_out(name: str, error: Dm3dError) -> None:
        skipped.append({"layer": PLANS[name], "reason": str(error)})
        run.watch.noted(f"no {PLANS[name]}: {error}")

    rooms = rooms_from_text(run.recipe.capacities)
    config = load_config(run.path("model_config"))
    if config.backbone_3d is not None and config.backbone_3d.name == VOXELNEXT:
        skipped.append({"layer": "the head at active cells alone", "reason": WHOLE_MAP})
    if config.pillars is not None:
        if rooms:
            raise UsageError(f"--capacities are of a 3D plan, and there is none: {PILLARS}.", fix="leave them out")
        skipped += [{"layer": name, "reason": PILLARS} for name in PLANS.values()]
        return plans
    try:
        backbone = read_backbone(run.path("backbone3d"))
    except EngineError as error:  # what the 3D engine cannot run, ONNX Runtime can
        for name in PLANS:
            left_out(name, error)
        return plans
    check_rooms(rooms, backbone)
    statistics = [
        frame_statistics(backbone, cells, conv_rows=DEVICE.conv_rows, points=points)
        for points, cells in _calibration_cells(run)
    ]
    precision = cast(Literal["fp16", "fp32"], run.recipe.precision)
    margin, stages = run.recipe.capacity_margin, {name: rows for name, rows in rooms.items() if name != POINTS}
    for name, frame in _frames(run, rooms).items():
        try:
            plans[name] = calibrated_plan(
                backbone, frame=frame, calibration=statistics, margin=margin, capacities=stages, precision=precision
            )
        except (EngineError, UsageError) as error:
            left_out(name, error)
    return plans


def check_rooms(rooms: Mapping[str, int], backbone: Backbone) -> None:
    """UsageError for a stage that the backbone does not have, and for more rows than it has cells."""
    most = {**{stage.name: prod(stage.grid) for stage in backbone.stages}, POINTS: MOST_POINTS}
    for name, rows in rooms.items():
        if name not in most:
            raise UsageError(f"--capacities names '{name}', no stage of the backbone.", fix=nearest(name, most))
        if rows > most[name]:
            raise UsageError(
                f"--capacities gives '{name}' {rows:,} rows, more than there can be.",
                fix=f"give {most[name]:,} at most",
            )


def _frames(run: RunContext, rooms: Mapping[str, int]) -> dict[str, Frame]:
    """What the plans start at: the inputs of the ONNX node, and points as the sensor gives them."""
    config = load_config(run.path("model_config")).voxels
    info = json.loads(run.path("frames_info").read_text(encoding="utf-8"))
    most = max(row["points"] for row in info["frames"] if row["role"] == "calibration")
    return {
        "plan": frame_from_config(config, rows=config.max_voxels),
        "points_plan": frame_from_config(
            config, rows=rooms.get(POINTS, ceil(most * run.recipe.capacity_margin)), points=True
        ),
    }


def _calibration_cells(run: RunContext) -> list[tuple[int, Int16[np.ndarray, "voxels 4"]]]:
    """How many points each calibration frame had, and its cells."""
    rows = json.loads(run.path("frames_info").read_text(encoding="utf-8"))["frames"]
    with safe_open(run.path("frames"), framework="np") as file:
        return [
            (row["points"], file.get_tensor(f"{number}.coords"))
            for number, row in enumerate(rows)
            if row["role"] == "calibration"
        ]
