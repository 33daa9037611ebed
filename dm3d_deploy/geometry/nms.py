"""Non-maximum suppression of rotated boxes: greedy, class-agnostic, the same boxes on every machine."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int64

from dm3d_deploy.errors import InternalError
from dm3d_deploy.geometry.boxes import bev_from_boxes, iou_bev_pairs, near_pairs
from dm3d_deploy.pointcloud import Boxes3D

BLOCK = 64  # boxes whose overlaps are computed at once; more would compute overlaps with boxes already removed


def order_by_score(scores: Float32[np.ndarray, " boxes"]) -> Int64[np.ndarray, " boxes"]:
    """Indices by falling score; equal scores keep their index order."""
    order: np.ndarray = np.argsort(-scores, kind="stable")
    return order


def rotated_nms(
    boxes: Boxes3D, scores: Float32[np.ndarray, " boxes"], threshold: float, pre: int, post: int
) -> Int64[np.ndarray, " kept"]:
    """Indices of the boxes that stay, by falling score, equal scores by rising index (OpenPCDet's nms_gpu).

    Of the `pre` best boxes, each that stays removes every later one whose bird's-eye IoU with it exceeds `threshold`;
    the first `post` that stay are returned.
    """
    bev = bev_from_boxes(boxes)
    if not (np.isfinite(bev).all() and np.isfinite(scores).all()):
        raise InternalError("boxes or scores handed to rotated_nms are not finite")
    order = order_by_score(scores)[:pre]
    bev = bev[order]
    kept: list[int] = []
    waiting = np.arange(len(order))
    while len(waiting) and len(kept) < post:
        block = min(BLOCK, len(waiting))
        removed = np.zeros(len(waiting), dtype=bool)
        row, column = _overlapping(bev[waiting], block, threshold)
        ends = np.searchsorted(row, np.arange(block + 1))
        for i in range(block):
            if not removed[i]:
                kept.append(int(waiting[i]))
                removed[column[ends[i] : ends[i + 1]]] = True
        removed[:block] = True
        waiting = waiting[~removed]
    chosen: np.ndarray = order[np.array(kept[:post], dtype=np.int64)]
    return chosen


def _overlapping(bev: np.ndarray, block: int, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (row < `block`, later column) whose IoU exceeds `threshold`, rows ascending."""
    row, column = near_pairs(bev[:block], bev)
    area = bev[:, 2] * bev[:, 3]
    small, large = np.minimum(area[row], area[column]), np.maximum(area[row], area[column])
    possible = (column > row) & (small >= threshold * large)  # the IoU of two areas is at most their ratio
    row, column = row[possible], column[possible]
    over = iou_bev_pairs(bev[row], bev[column]) > threshold
    return row[over], column[over]
