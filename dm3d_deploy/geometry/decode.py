"""From a head's raw maps to detections, in numpy: candidates, suppression within each group of classes, one list."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float32

from dm3d_deploy.config import AnchorHeadConfig, AnchorPostConfig, CenterHeadConfig, DetectorConfig, PostConfig
from dm3d_deploy.errors import InternalError
from dm3d_deploy.geometry.anchor_boxes import group_candidates
from dm3d_deploy.geometry.candidates import Decoded, Located, join_located, select_located, suppressed
from dm3d_deploy.geometry.center_boxes import task_candidates
from dm3d_deploy.geometry.nms import order_by_score
from dm3d_deploy.geometry.rois import refined
from dm3d_deploy.pointcloud import Detections

__all__ = ["Decoded", "Located", "decoded", "detections_from_maps", "join_located", "select_located"]


def detections_from_maps(
    maps: Mapping[str, Float32[np.ndarray, "1 channels rows columns"]],
    config: DetectorConfig,
    rois: Located | None = None,
) -> Detections:
    """Decode every task, suppress within each, and merge: scores fall; equal scores keep task order, then NMS order.

    Raises EngineError as `decoded` does.
    """
    return decoded(maps, config, rois).kept.detections


def decoded(
    maps: Mapping[str, Float32[np.ndarray, "1 channels rows columns"]],
    config: DetectorConfig,
    rois: Located | None = None,
) -> Decoded:
    """The candidates of every task and what suppression keeps of them.

    `maps["0.hm"]` is the raw output of branch `hm` of task 0, `maps["0.cls"]` that of `cls` of a cell's first anchor.
    Of a CenterHead, of the `max_objects` best cells over all classes of a task those stay whose score exceeds the
    threshold and whose centre lies in the limit range: scores falling, equal scores by rising index in [C, H, W]. Of an
    anchor head, see `group_candidates`. Of a detector with two stages the candidates are the `rois`, one group, see
    `rois.refined`. Raises EngineError for a map that is missing, misshapen or not finite, and for
    a size that overflows.
    """
    head, post = config.head, config.post
    tasks: list[tuple[Located, float | None]]
    if (config.second_stage is None) != (rois is None):
        raise InternalError(f"{config.name} is decoded with RoIs exactly if it has a second stage")
    if rois is not None:
        tasks = [(refined(maps, rois, config), None)]
    elif isinstance(head, CenterHeadConfig) and isinstance(post, PostConfig):
        tasks = [task_candidates(maps, task, config, head, post) for task in range(len(head.branches))]
    elif isinstance(head, AnchorHeadConfig) and isinstance(post, AnchorPostConfig):
        tasks = group_candidates(maps, config, head, post)
    else:
        raise InternalError(f"{config.name}: a {type(head).__name__} is not decoded by a {type(post).__name__}")
    before_nms = tuple(candidates for candidates, _ in tasks)
    kept = join_located([suppressed(candidates, post) for candidates in before_nms])
    return Decoded(
        before_nms=before_nms,
        cut_scores=tuple(cut for _, cut in tasks),
        kept=select_located(kept, order_by_score(kept.detections.scores)),
    )
