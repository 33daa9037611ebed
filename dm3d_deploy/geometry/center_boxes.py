"""Candidates of a CenterHead, as OpenPCDet's CenterHead.generate_predicted_boxes reads them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dm3d_deploy.config import CenterHeadConfig, DetectorConfig, PostConfig
from dm3d_deploy.errors import EngineError
from dm3d_deploy.geometry.candidates import Located, checked, scores_from_logits, select_located, sizes_from_logarithms
from dm3d_deploy.geometry.nms import order_by_score
from dm3d_deploy.pointcloud import Boxes3D, Detections

EMPTY_LOGIT = -30.0  # what a sparse head's map holds where no cell is active; a score of 1e-13


def task_candidates(
    maps: Mapping[str, np.ndarray], task: int, config: DetectorConfig, head: CenterHeadConfig, post: PostConfig
) -> tuple[Located, float | None]:
    """The candidates of one task, and the lowest score of its `max_objects` cells if there were so many."""
    maps = _task_maps(maps, task, head)
    hm = maps["hm"][0]
    least = EMPTY_LOGIT if head.sparse else -np.inf
    scores, cell, class_of_task = _best_cells(hm, post.max_objects, post.score_threshold, least)
    row, column = np.divmod(cell, hm.shape[2])
    value = {name: branch[0].reshape(branch.shape[1], -1)[:, cell].astype(np.float64) for name, branch in maps.items()}

    step_x, step_y, _ = (head.stride * step for step in config.voxels.voxel_size_m)
    x = (column + value["center"][0]) * step_x + config.voxels.point_range_m[0]
    y = (row + value["center"][1]) * step_y + config.voxels.point_range_m[1]
    centre = np.stack([x, y, value["center_z"][0]], axis=1).astype(np.float32)
    low, high = np.array(post.centre_limit_m[:3]), np.array(post.centre_limit_m[3:])
    inside = np.flatnonzero(((centre >= low) & (centre <= high)).all(axis=1))

    cos, sin = value["rot"]
    names = np.array([config.class_names.index(name) for name in head.classes_by_task[task]], dtype=np.int64)
    boxes = Boxes3D(
        centre=centre,
        size=sizes_from_logarithms(value["dim"].T, f"{task}.dim"),
        yaw=np.arctan2(sin, cos).astype(np.float32),
        velocity=value.get("vel", np.zeros((2, len(cell)))).T.astype(np.float32),
    )
    found = Detections(boxes=boxes, scores=scores, labels=names[class_of_task], class_names=config.class_names)
    cut = float(scores[-1]) if len(scores) == post.max_objects else None
    located = Located(detections=found, cells=cell, headings=np.hypot(cos, sin).astype(np.float32))
    return select_located(located, inside), cut


def _best_cells(
    hm: np.ndarray, count: int, threshold: float, least: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score, cell (flat in [H, W]) and class of the `count` best cells of [C, H, W].

    Their scores exceed `threshold`, and their logits `least`.
    """
    scores = scores_from_logits(hm.ravel())
    flat = np.flatnonzero((scores > np.float32(threshold)) & (hm.ravel() > least))
    if len(flat) > count:
        flat = flat[scores[flat] >= np.partition(scores[flat], -count)[-count]]
    flat = flat[order_by_score(scores[flat])[:count]]
    return scores[flat], flat % hm[0].size, flat // hm[0].size


def _task_maps(maps: Mapping[str, np.ndarray], task: int, head: CenterHeadConfig) -> dict[str, np.ndarray]:
    """The maps of one task by branch, every one checked."""
    found: dict[str, np.ndarray] = {}
    for branch in head.branches[task]:
        name = f"{task}.{branch.name}"
        if name not in maps:
            raise EngineError(
                f"the output '{name}' of the detection head is missing; there are {len(maps)} outputs.",
                fix="export the graph again from this model",
            )
        found[branch.name] = checked(name, maps[name], branch.channels)
    if len({value.shape[2:] for value in found.values()}) != 1:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in found.items())
        raise EngineError(
            f"the outputs of task {task} lie on different grids: {shapes}.",
            fix="export the graph again from this model",
        )
    return found
