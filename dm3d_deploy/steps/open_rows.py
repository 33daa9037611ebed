"""How many rows the open dimensions of a second stage have: RoIs by the configuration, all else by the 3D plans."""

from __future__ import annotations

from collections.abc import Mapping

from dm3d_deploy.config import DetectorConfig
from dm3d_deploy.errors import InternalError
from dm3d_deploy.geometry.pooling import RAW
from dm3d_deploy.geometry.rois import second_stage
from engines.sparse3d.plan import Plan
from engines.tensorrt_rtx import OpenRows
from exporters.graph_files import OPEN_ROWS
from exporters.second_stage import PLACES

PLAN_OF_RAW = "points_plan"


def plans_needed(config: DetectorConfig) -> tuple[str, ...]:
    """The plans that say how many rows the second stage of this detector reads."""
    keypoints = second_stage(config).keypoints
    raw = keypoints is not None and RAW in {source.name for source in keypoints.sources}
    return ("plan", PLAN_OF_RAW) if raw else ("plan",)


def second_stage_rows(config: DetectorConfig, plans: Mapping[str, Plan]) -> dict[str, OpenRows]:
    """Bounds by the name of the dimension; `plans` are those of `plans_needed`.

    The engine takes all that a plan gives out, so it has no other limits than the plan. At least there is one RoI and
    one row of everything: a frame without proposals has nothing to ask a second stage.
    """
    stage = second_stage(config)
    cells = stage.grid**3
    bounds = {
        PLACES: OpenRows(
            least=cells,
            most=stage.nms_post * cells,
            source=f"NMS_POST_MAXSIZE {stage.nms_post} x GRID_SIZE {stage.grid} ^ 3 of the configuration",
        )
    }
    for name in stage.stages_read:
        rows = _rows(plans["plan"], f"features.{name}")
        bounds[f"{OPEN_ROWS}{name}"] = OpenRows(least=1, most=rows, source=f"capacity of {name} in the 3D plan")
    if PLAN_OF_RAW in plans_needed(config):
        rows = _rows(plans[PLAN_OF_RAW], "points")
        bounds[f"{OPEN_ROWS}{RAW}"] = OpenRows(least=1, most=rows, source="points that the 3D plan from points takes")
    return bounds


def _rows(plan: Plan, name: str) -> int:
    shapes = {binding.name: binding.shape for binding in (*plan.inputs, *plan.outputs)}
    if name not in shapes:
        raise InternalError(f"the plan has no '{name}' among {', '.join(shapes)}")
    return int(shapes[name][0])
