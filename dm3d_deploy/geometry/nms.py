"""Non-maximum suppression of rotated boxes: greedy, class-agnostic, the same boxes on every machine."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int64

from dm3d_deploy.errors import InternalError
from dm3d_deploy.geometry.boxes import bev_from_boxes, iou_bev_pairs, near_pairs
from dm3d_deploy.pointcloud import Boxes3D

WINDOW = 1024  # boxes looked at before worse ones: often as many as are asked for stay among them
FIRST_BLOCK, GROWTH = 8, 4  # boxes whose overlaps with the window are computed at once: in a pile few of them stay
BLOCK_PAIRS = 8192  # near pairs that a block should have: more are spent on boxes already removed, fewer on blocks
ROUNDING = 1e-9  # of a bound that is computed another way than what it bounds


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
    kept = np.empty(0, dtype=np.int64)
    for start in range(0, len(bev), WINDOW):
        waiting = np.arange(start, min(start + WINDOW, len(bev)))
        earlier, block = kept, FIRST_BLOCK
        while len(waiting) and len(kept) < post:
            rows = earlier[:block] if len(earlier) else waiting[:block]
            row, column, near = _overlapping(bev, rows, waiting, threshold)
            if len(earlier):
                removed = np.zeros(len(waiting), dtype=bool)
                removed[column] = True
                earlier = earlier[block:]
            else:
                removed = _removed(row, column, len(waiting))
                kept = np.concatenate([kept, rows[~removed[: len(rows)]]])
                removed[: len(rows)] = True
            waiting = waiting[~removed]
            block = min(max(block * BLOCK_PAIRS // max(near, 1), 1), GROWTH * block)
    chosen: np.ndarray = order[kept[:post]]
    return chosen


def _removed(row: np.ndarray, column: np.ndarray, count: int) -> np.ndarray:
    """Which of `count` boxes an earlier one removes that stays itself, of overlapping pairs with rows ascending."""
    removed = np.zeros(count, dtype=bool)
    rows = np.unique(row)
    ends = np.searchsorted(row, rows, side="right")
    for box, start, stop in zip(rows, np.searchsorted(row, rows), ends, strict=True):
        if not removed[box]:
            removed[column[start:stop]] = True
    return removed


def _overlapping(
    bev: np.ndarray, rows: np.ndarray, columns: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray, int]:
    """Places in `rows` and in `columns` of pairs, the better box first, whose IoU exceeds `threshold`; rows ascending.

    Also how many pairs were near enough for it: circles bound the extents of `_may_share`.
    """
    least = threshold / (1 + threshold) - ROUNDING
    row, column = near_pairs(bev[rows], bev[columns], scale=1 - 2 * least)
    first, second = rows[row], columns[column]
    possible = _may_share(bev.T, first, second, least)
    over = possible[iou_bev_pairs(bev[first[possible]], bev[second[possible]]) > threshold]
    return row[over], column[over], len(row)


def _may_share(bev: np.ndarray, first: np.ndarray, second: np.ndarray, least: float) -> Int64[np.ndarray, " possible"]:
    """Which pairs with `first` before `second` may share `least` of the sum of their areas, by three cheap bounds.

    They share no more than the smaller area, nor than two strips that cross, each as wide as its box. Cut between their
    centres, what they share is two ends, and an end past the part s of a box's half extent holds at most 1 - s of half
    its area: together at most 1 - distance / sum of half extents along the line of centres, of half of both areas.
    """
    if least <= 0:  # the rounding of an overlap of nothing may exceed such a threshold
        return np.flatnonzero(first < second)
    x, y, length, width, yaw = bev
    cos, sin, area = np.cos(yaw), np.sin(yaw), length * width
    area_a, area_b = area[first], area[second]
    needed = least * (area_a + area_b)
    strips = width[first] * width[second] >= np.abs(sin[second] * cos[first] - cos[second] * sin[first]) * needed
    possible = np.flatnonzero(strips & (np.minimum(area_a, area_b) >= needed) & (first < second))

    first, second = first[possible], second[possible]
    dx, dy = x[second] - x[first], y[second] - y[first]
    extents = np.zeros(len(possible))  # times twice the distance
    for box in (first, second):
        extents += np.abs(cos[box] * dx + sin[box] * dy) * length[box]
        extents += np.abs(cos[box] * dy - sin[box] * dx) * width[box]
    close: np.ndarray = possible[np.square(dx) + np.square(dy) <= (0.5 - least) * extents]
    return close
