"""Upright boxes: corners, overlaps, points inside; every formula in float64, every pair without a Python loop."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from dm3d_deploy.pointcloud import Boxes3D

CORNER_ALONG, CORNER_ACROSS = np.array([[1.0, -1.0, -1.0, 1.0], [1.0, 1.0, -1.0, -1.0]])[:, :, None]
NEXT_CORNER = [1, 2, 3, 0]
CACHED_PAIRS = 1024  # pairs whose intermediate values fit a core's cache
SWEEP_ROWS = 256  # bounds the memory of a sweep in which every box is near every other


def wrap_angle(angle: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """The same angle within [-pi, pi] (rad); angles already there come back unchanged."""
    wrapped: np.ndarray = angle - 2 * np.pi * np.round(angle / (2 * np.pi))
    return wrapped


def select_boxes(boxes: Boxes3D, index: Int64[np.ndarray, " chosen"]) -> Boxes3D:
    """The boxes at `index`, in that order."""
    return Boxes3D(
        centre=boxes.centre[index], size=boxes.size[index], yaw=boxes.yaw[index], velocity=boxes.velocity[index]
    )


def bev_from_boxes(boxes: Boxes3D) -> Float64[np.ndarray, "boxes 5"]:
    """The bird's-eye rectangles x, y, length, width (m), yaw (rad)."""
    columns = (boxes.centre[:, :2], boxes.size[:, :2], boxes.yaw[:, None])
    return np.concatenate(columns, axis=1, dtype=np.float64)


def corners_bev(bev: Float64[np.ndarray, "boxes 5"]) -> Float64[np.ndarray, "boxes 4 2"]:
    """Corners (m), counter-clockwise from the front left one."""
    along = bev[:, 2, None] * np.array([0.5, -0.5, -0.5, 0.5])
    across = bev[:, 3, None] * np.array([0.5, 0.5, -0.5, -0.5])
    cos, sin = np.cos(bev[:, 4, None]), np.sin(bev[:, 4, None])
    x = bev[:, 0, None] + cos * along - sin * across
    y = bev[:, 1, None] + sin * along + cos * across
    return np.stack([x, y], axis=-1)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`part / whole` within [0, 1]; 0 where `whole` is 0."""
    ratio = part / np.where(whole == 0, np.inf, whole)
    return _clamp(ratio, 0.0, 1.0)


def _clamp(value: np.ndarray, low: np.ndarray | float, high: np.ndarray | float) -> np.ndarray:
    """`np.clip` in two steps, which numpy does many values at a time."""
    clamped: np.ndarray = np.minimum(np.maximum(value, low), high)
    return clamped


def intersection_bev(
    a: Float64[np.ndarray, "pairs 5"], b: Float64[np.ndarray, "pairs 5"]
) -> Float64[np.ndarray, " pairs"]:
    """Area (m2) that rectangle `a[i]` shares with rectangle `b[i]`, to within 1e-16 of the area of `a`."""
    area = np.empty(len(a))
    for start in range(0, len(a), CACHED_PAIRS):
        part = slice(start, start + CACHED_PAIRS)
        area[part] = _shared_area(a[part].T, b[part].T)
    return area


def _shared_area(a: Float64[np.ndarray, "5 pairs"], b: Float64[np.ndarray, "5 pairs"]) -> Float64[np.ndarray, " pairs"]:
    """Green's theorem in the frame of `a`, where `a` is |x| <= hx, |y| <= hy.

    The area is minus the sum over the edges of `b`, taken counter-clockwise, of the integral of clamp(y, -hy, hy) dx
    over the part with |x| <= hx. Each edge is a straight line, so its integral is a closed form; nothing is ordered and
    no case is special, so touching, identical and empty rectangles need no tolerance.
    """
    cos, sin = np.cos(a[4]), np.sin(a[4])
    dx, dy = b[0] - a[0], b[1] - a[1]
    turned_cos, turned_sin = np.cos(b[4] - a[4]) / 2, np.sin(b[4] - a[4]) / 2
    x0 = cos * dx + sin * dy + CORNER_ALONG * (turned_cos * b[2]) - CORNER_ACROSS * (turned_sin * b[3])
    y0 = cos * dy - sin * dx + CORNER_ALONG * (turned_sin * b[2]) + CORNER_ACROSS * (turned_cos * b[3])
    x1, y1 = x0[NEXT_CORNER], y0[NEXT_CORNER]
    half_x, half_y = a[2] / 2, a[3] / 2

    left = _clamp(x0, -half_x, half_x)
    right = left[NEXT_CORNER]
    width, rise = x1 - x0, y1 - y0
    y_left, y_right = y0 + _share(left - x0, width) * rise, y1 - _share(x1 - right, width) * rise
    low, high = _clamp(y_left, -half_y, half_y), _clamp(y_right, -half_y, half_y)
    rise = y_right - y_left
    before, after = _share(low - y_left, rise), _share(y_right - high, rise)
    mean = before * low + (1 - before - after) * (low + high) / 2 + after * high
    area: np.ndarray = np.maximum(-((right - left) * mean).sum(axis=0), 0.0)
    return area


def iou_bev_pairs(
    a: Float64[np.ndarray, "pairs 5"], b: Float64[np.ndarray, "pairs 5"]
) -> Float64[np.ndarray, " pairs"]:
    """Intersection over union of rectangle `a[i]` with `b[i]`; 0 where both are empty."""
    shared = intersection_bev(a, b)
    union = a[:, 2] * a[:, 3] + b[:, 2] * b[:, 3] - shared
    return _share(shared, union)


def near_pairs(
    a: Float64[np.ndarray, "rows 5"], b: Float64[np.ndarray, "columns 5"], scale: float = 1.0
) -> tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"]]:
    """Row and column of every pair whose circumscribed circles, `scale` times as wide, meet; rows ascending."""
    radius_a, radius_b = (np.hypot(bev[:, 2], bev[:, 3]) * (scale / 2) for bev in (a, b))
    order = np.argsort(b[:, 0], kind="stable")
    x, y, radius = b[order, 0], b[order, 1], radius_b[order]
    reach = radius_a + radius_b.max(initial=0.0)
    first, last = np.searchsorted(x, a[:, 0] - reach), np.searchsorted(x, a[:, 0] + reach, side="right")
    rows, columns = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for start in range(0, len(a), SWEEP_ROWS):
        part = slice(start, start + SWEEP_ROWS)
        count = last[part] - first[part]
        place = np.arange(count.sum()) + np.repeat(first[part] - np.cumsum(count) + count, count)
        dx, dy = x[place] - np.repeat(a[part, 0], count), y[place] - np.repeat(a[part, 1], count)
        within = np.square(radius[place] + np.repeat(radius_a[part], count))
        near = np.flatnonzero(np.square(dx) + np.square(dy) <= within)
        rows.append(np.repeat(np.arange(start, start + len(count)), count)[near])
        columns.append(order[place[near]])
    return np.concatenate(rows), np.concatenate(columns)


def _intersection_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    matrix = np.zeros((len(a), len(b)))
    row, column = near_pairs(a, b)
    matrix[row, column] = intersection_bev(a[row], b[column])
    return matrix


def iou_bev_matrix(a: Boxes3D, b: Boxes3D) -> Float64[np.ndarray, "rows columns"]:
    """Bird's-eye intersection over union of every box of `a` with every box of `b`."""
    bev_a, bev_b = bev_from_boxes(a), bev_from_boxes(b)
    shared = _intersection_matrix(bev_a, bev_b)
    union = (bev_a[:, 2] * bev_a[:, 3])[:, None] + (bev_b[:, 2] * bev_b[:, 3])[None, :] - shared
    return _share(shared, union)


def iou_3d_matrix(a: Boxes3D, b: Boxes3D) -> Float64[np.ndarray, "rows columns"]:
    """Volume intersection over union of every box of `a` with every box of `b`: shared area times shared height."""
    shared = _intersection_matrix(bev_from_boxes(a), bev_from_boxes(b))
    z_a, z_b = a.centre[:, 2].astype(np.float64)[:, None], b.centre[:, 2].astype(np.float64)[None, :]
    size_a, size_b = a.size.astype(np.float64), b.size.astype(np.float64)
    half_a, half_b = size_a[:, 2, None] / 2, size_b[None, :, 2] / 2
    overlap = np.minimum(z_a + half_a, z_b + half_b) - np.maximum(z_a - half_a, z_b - half_b)
    shared *= np.maximum(overlap, 0.0)
    return _share(shared, size_a.prod(axis=1)[:, None] + size_b.prod(axis=1)[None, :] - shared)


def points_in_boxes(xyz: Float[np.ndarray, "points 3"], boxes: Boxes3D) -> Bool[np.ndarray, "boxes points"]:
    """Which points lie in which box, faces included."""
    inside = np.zeros((len(boxes), len(xyz)), dtype=bool)
    points = xyz.astype(np.float64)
    half = boxes.size.astype(np.float64) / 2
    for row, (centre, yaw) in enumerate(
        zip(boxes.centre.astype(np.float64), boxes.yaw.astype(np.float64), strict=True)
    ):
        near = np.flatnonzero(
            (np.abs(points[:, 2] - centre[2]) <= half[row, 2])
            & (np.abs(points[:, 0] - centre[0]) <= half[row, 0] + half[row, 1])
        )
        dx, dy = points[near, 0] - centre[0], points[near, 1] - centre[1]
        along, across = np.cos(yaw) * dx + np.sin(yaw) * dy, np.cos(yaw) * dy - np.sin(yaw) * dx
        inside[row, near] = (np.abs(along) <= half[row, 0]) & (np.abs(across) <= half[row, 1])
    return inside
