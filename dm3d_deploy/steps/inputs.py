"""The first two stages: the detector and the frames."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calib.calibration_set import FramePlan, FrameRef, load_frame
from calib.readers import describe
from dm3d_deploy.artifacts import write_bytes, write_json, write_tensors
from dm3d_deploy.config import load_config
from dm3d_deploy.errors import FrameError, UsageError, require
from dm3d_deploy.geometry.voxelize import voxelize
from dm3d_deploy.models.bundled import TRAINED_ON, bundled_weights
from dm3d_deploy.outside import frame_plan
from dm3d_deploy.pointcloud import PointCloud, Voxels
from dm3d_deploy.recipe import Recipe
from dm3d_deploy.stages import RunContext

if TYPE_CHECKING:
    from torch import Tensor

    from dm3d_deploy.models.checkpoints import CheckpointInfo


def load(run: RunContext) -> None:
    """Read the configuration and the weights, and write both in our own form."""
    require("torch", extra="compile")
    from dm3d_deploy.models.checkpoints import load_checkpoint, save_weights
    from dm3d_deploy.models.detector import build_detector
    from dm3d_deploy.models.seeded import seed_weights
    from dm3d_deploy.models.voxel_pruning import prune_voxels, stage_names

    config = load_config(run.recipe.model)
    detector = build_detector(config)
    if run.recipe.checkpoint is not None:
        info = load_checkpoint(detector, Path(run.recipe.checkpoint))
        source = f"checkpoint {Path(run.recipe.checkpoint).name}{changes_of(info)}"
        trained = True  # which no file can show
    elif (bundled := bundled_weights(run.recipe.model)) is not None:
        load_checkpoint(detector, bundled)
        source, trained = f"bundled with dm3d-deploy, trained on {TRAINED_ON}", True
        run.watch.noted(f"no --checkpoint was given: the bundled weights were trained on {TRAINED_ON}")
    else:
        seed_weights(detector, run.recipe.seed)
        source, trained = f"seeded by parameter name (seed {run.recipe.seed})", False
        run.watch.noted(
            "UNTRAINED: no --checkpoint was given, so the weights are seeded noise; detections mean nothing"
        )
    write_bytes(run.path("model_config"), config.text.encode())
    save_weights(detector, run.path("dense_weights"))
    if run.recipe.start is not None:
        load_checkpoint(detector, Path(run.recipe.start))
    if run.recipe.voxel_keep < 1:
        prune_voxels(detector, permille_of_recipe(run.recipe, stage_names(detector)))
    if run.recipe.start is not None or run.recipe.voxel_keep < 1:
        save_weights(detector, run.path("start_weights"))
    write_json(
        run.path("model_info"),
        {
            "name": Path(run.recipe.model).stem,
            "trained": trained,
            "weights_source": source,
            "classes": list(config.class_names),
            "parameters": sum(p.numel() for p in detector.parameters()),
        },
    )


def changes_of(info: CheckpointInfo) -> str:
    """What reading did to a checkpoint's numbers, in words behind its name."""
    order = ", spconv 1.x's weights brought into 2.x's order" if info.spconv_layout == "1.x" else ""
    return order + (f", {info.cast} tensors cast to float32" if info.cast else "")


def permille_of_recipe(recipe: Recipe, stages: tuple[str, ...]) -> Tensor:
    """Thousandths of the voxels that each stage keeps; UsageError for a stage that is not there."""
    import torch

    chosen = [f"conv{word.strip()}" for word in recipe.voxel_stages.split(",")]
    for name in chosen:
        if name not in stages:
            raise UsageError(
                f"--voxel-stages names {name.removeprefix('conv')}, and the backbone has {len(stages)} stages.",
                fix="for example --voxel-stages 2,3",
            )
    return torch.tensor([round(1000 * recipe.voxel_keep) if name in chosen else 1000 for name in stages])


def shown_frame(plan: FramePlan) -> int:
    """The frame that parity and pictures show: the first real file as it is, else the first held-out scene."""

    def rank(index: int) -> tuple[bool, bool, int]:
        ref = plan.frames[index]
        altered = ref.path is None or ref.turn_deg != 0 or ref.mirrored
        return altered, ref.role != "held_out", index

    return min(range(len(plan.frames)), key=rank)


def frames(run: RunContext) -> None:
    """Read or simulate every frame once and keep its voxels; of the shown frame, keep the points too."""
    config = load_config(run.path("model_config"))
    plan = frame_plan(run.recipe, config)
    shown = shown_frame(plan)
    arrays: dict[str, np.ndarray] = {}
    rows = []
    shown_columns: list[str] = []
    for index, ref in enumerate(plan.frames):
        cloud = load_frame(ref)
        voxels = voxelize(cloud, config)
        arrays[f"{index}.features"] = voxels.features
        arrays[f"{index}.coords"] = voxels.coords.astype(np.int16)
        arrays[f"{index}.num_points"] = voxels.num_points
        if voxels.points is not None:
            arrays[f"{index}.points"] = voxels.points
        if index == shown:
            arrays["shown.points"] = cloud.points
            shown_columns = list(cloud.columns)
        rows.append(_row(ref, cloud, voxels))
        run.watch.advanced(index + 1, len(plan.frames))
    write_tensors(run.path("frames"), arrays)
    write_json(
        run.path("frames_info"),
        {
            "source": run.recipe.frames,
            "simulated": all(ref.path is None for ref in plan.frames),
            "notes": list(plan.notes),
            "overflow": _capacity_notes(rows),
            "shown": shown,
            "shown_columns": shown_columns,
            "frames": rows,
        },
    )


def _row(ref: FrameRef, cloud: PointCloud, voxels: Voxels) -> dict[str, object]:
    if len(voxels.coords) == 0:
        raise FrameError(f"{ref.label} leaves no voxel.", fix="use a frame that has points inside the model's range")
    return {
        **ref.as_json(),
        "label": ref.label,
        "points": len(cloud.points),
        "columns": describe(cloud),
        "voxels": voxels.cells,
        "found": voxels.found,
        "cutoff_m": voxels.cutoff_m if math.isfinite(voxels.cutoff_m) else None,
    }


def _capacity_notes(rows: list[dict[str, object]]) -> list[str]:
    capped = [row for row in rows if row["cutoff_m"] is not None]
    if not capped:
        return []
    nearest = min(float(str(row["cutoff_m"])) for row in capped)
    return [
        f"{len(capped)} of {len(rows)} frames hold more cells than the model's cap; the farthest were dropped, beyond "
        f"{nearest:.1f} m in the fullest frame: the detector is blind there (raise MAX_NUMBER_OF_VOXELS in the YAML)"
    ]
