"""Non-maximum suppression of rotated boxes: greedy, class-agnostic, the same boxes on every machine."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int64

from dm3d_deploy.errors import InternalError
from dm3d_deploy.geometry.boxes import bev_from_boxes, iou_bev_pairs, near_pairs
from dm3d_deploy.pointcloud import Boxes3D

FIRST_BLOCK, LARGEST_BLOCK = 32, 1024  # boxes whose overlaps with all later ones are computed at once
ROUNDING = 1e-9  # of a bound that is computed another way than what it bounds
BLOCK_PAIRS = 16_384  # what a block should compute: more is spent on boxes already removed, less on starting blocks


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
    block = FIRST_BLOCK
    while len(waiting) and len(kept) < post:
        block = min(block, len(waiting))
        removed = np.zeros(len(waiting), dtype=bool)
        row, column, computed = _overlapping(bev[waiting], block, threshold)
        ends = np.searchsorted(row, np.arange(block + 1))
        for i in range(block):
            if not removed[i]:
                kept.append(int(waiting[i]))
                removed[column[ends[i] : ends[i + 1]]] = True
        removed[:block] = True
        waiting = waiting[~removed]
        block = min(max(block * BLOCK_PAIRS // max(computed, 1), 1), 4 * block, LARGEST_BLOCK)
    chosen: np.ndarray = order[np.array(kept[:post], dtype=np.int64)]
    return chosen


def _overlapping(bev: np.ndarray, block: int, threshold: float) -> tuple[np.ndarray, np.ndarray, int]:
    """Pairs (row < `block`, later column) whose IoU exceeds `threshold`, rows ascending, and how many were near."""
    row, column = near_pairs(bev[:block], bev)
    later = column > row
    row, column = row[later], column[later]
    possible = _may_exceed(bev.T, row, column, threshold)
    row, column = row[possible], column[possible]
    over = iou_bev_pairs(bev[row], bev[column]) > threshold
    return row[over], column[over], len(row)


def _may_exceed(bev: np.ndarray, row: np.ndarray, column: np.ndarray, threshold: float) -> np.ndarray:
    """Whether the rectangle around `column`, upright in the frame of `row`, shares enough with `row` for `threshold`.

    What two boxes share is at most what that rectangle shares, and at most the smaller area.
    """
    x, y, length, width, yaw = bev
    cos, sin, area = np.cos(yaw), np.sin(yaw), length * width
    cos_row, sin_row, cos_column, sin_column = cos[row], sin[row], cos[column], sin[column]
    dx, dy = x[column] - x[row], y[column] - y[row]
    turned_cos = np.abs(cos_row * cos_column + sin_row * sin_column)
    turned_sin = np.abs(cos_row * sin_column - sin_row * cos_column)
    reach_x = (length[row] + turned_cos * length[column] + turned_sin * width[column]) / 2
    reach_y = (width[row] + turned_sin * length[column] + turned_cos * width[column]) / 2
    shared_x = np.minimum(reach_x - np.abs(cos_row * dx + sin_row * dy), length[row])
    shared_y = np.minimum(reach_y - np.abs(cos_row * dy - sin_row * dx), width[row])
    shared = np.minimum(np.maximum(shared_x, 0) * np.maximum(shared_y, 0), np.minimum(area[row], area[column]))
    enough: np.ndarray = shared * (1 + ROUNDING) >= threshold / (1 + threshold) * (area[row] + area[column])
    return enough
