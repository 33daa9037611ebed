"""The stage that plans the 3D engine: capacities from the calibration frames, kernels compiled without a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Literal, cast

import numpy as np
from jaxtyping import Int16
from safetensors import safe_open

from dm3d_deploy.artifacts import write_json
from dm3d_deploy.config import load_config
from dm3d_deploy.device import Device, devices_from
from dm3d_deploy.errors import EngineError, MissingDependency, UsageError
from dm3d_deploy.plan_facts import NOT_COMPILED, PLAN
from dm3d_deploy.stages import RunContext
from engines.sparse3d.aot import compile_plan, sms_of
from engines.sparse3d.entry import frame_from_config
from engines.sparse3d.plan import Plan
from engines.sparse3d.plan_file import write_plan
from engines.sparse3d.planner import calibrated_plan

VEHICLES = "orin,rtx4090,thor-jp7,rtx5090"
NOTHING_COMPILED: dict[str, Any] = {
    "triton": None, "standing": NOT_COMPILED, "reproducible": True, "targets": {}, "kernels": [],
}  # fmt: skip


def plan3d(run: RunContext) -> None:
    """Plan the pruned 3D backbone, compile its kernels for the recipe's devices, and say what was left out and why."""
    sms, skipped = sms_and_skipped(plan_devices(run.recipe.device))
    told = NOTHING_COMPILED
    try:
        plan = _neutral(run)
    except (EngineError, UsageError) as error:  # what the 3D engine cannot run, ONNX Runtime can
        skipped.append({"layer": PLAN, "reason": str(error)})
        run.watch.noted(f"no 3D plan: {error}")
        write_json(run.path("plan_info"), {**told, "skipped": skipped})
        return
    try:
        plan, told = compile_plan(plan, sms)
    except MissingDependency as error:
        names = ", ".join(f"sm_{sm}" for sm in sms)
        skipped.append({"layer": f"3D kernels for {names}", "reason": str(error)})
        run.watch.noted(f"no kernels in the 3D plan, for {names}: {error}")
    write_plan(run.path("plan"), plan)
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
        try:
            sms.update(dict.fromkeys(sms_of([device.sm])))
        except UsageError as error:
            skipped.append({"layer": f"3D kernels for {device.name}", "reason": str(error)})
    return tuple(sorted(sms)), skipped


def _neutral(run: RunContext) -> Plan:
    """The plan of backbone3d.onnx without kernels, its capacities from the cells of the calibration frames."""
    config = load_config(run.path("model_config")).voxels
    return calibrated_plan(
        run.path("backbone3d"),
        frame=frame_from_config(config, rows=config.max_voxels),
        coords=_calibration_cells(run),
        precision=cast(Literal["fp16", "fp32"], run.recipe.precision),
    )


def _calibration_cells(run: RunContext) -> list[Int16[np.ndarray, "voxels 4"]]:
    info = json.loads(run.path("frames_info").read_text(encoding="utf-8"))
    numbers = [number for number, row in enumerate(info["frames"]) if row["role"] == "calibration"]
    with safe_open(run.path("frames"), framework="np") as file:
        return [file.get_tensor(f"{number}.coords") for number in numbers]
