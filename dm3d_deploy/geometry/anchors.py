"""Anchors of AnchorHeadSingle and what their residuals mean, as OpenPCDet's AnchorGenerator and ResidualCoder say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float64

from dm3d_deploy.config import AnchorHeadConfig, DetectorConfig, DirectionConfig

BOX_CHANNELS = 7


def anchor_maps(whole: Mapping[str, Any], per_cell: int) -> dict[str, Any]:
    """The maps of every anchor of a cell, "ANCHOR.BRANCH", as parts of the whole ones (arrays or tensors [1, C, H, W]).

    A whole map holds the channels of the first anchor, then those of the second.
    """
    parts = {}
    for anchor in range(per_cell):
        for name, value in whole.items():
            width = value.shape[1] // per_cell
            parts[f"{anchor}.{name}"] = value[:, anchor * width : (anchor + 1) * width]
    return parts


def cell_anchors(head: AnchorHeadConfig) -> Float64[np.ndarray, "anchors 5"]:
    """Of the anchors at one cell: z of the centre, length, width, height (m), rotation (rad)."""
    rows = [
        (of_class.bottom_m + size[2] / 2, *size, rotation)
        for of_class in head.anchors
        for size in of_class.sizes_m
        for rotation in of_class.rotations_rad
    ]
    return np.array(rows, dtype=np.float64)


def anchor_places(
    config: DetectorConfig, head: AnchorHeadConfig
) -> tuple[Float64[np.ndarray, "anchors columns"], Float64[np.ndarray, "anchors rows"]]:
    """X along the columns and y along the rows (m) of each anchor of a cell.

    OpenPCDet spreads the anchors over the range: the first on its lower edge and the last on its upper, or, with
    `align_center`, each in the middle of its cell.
    """
    _, height, width = config.voxels.grid_zyx
    low, high = config.voxels.point_range_m[:3], config.voxels.point_range_m[3:]
    xs, ys = [], []
    for of_class in head.anchors:
        along = [
            _spread(low[axis], high[axis], cells // head.stride, of_class.align_center)
            for axis, cells in enumerate((width, height))
        ]
        count = len(of_class.sizes_m) * len(of_class.rotations_rad)
        xs += [along[0]] * count
        ys += [along[1]] * count
    return np.stack(xs), np.stack(ys)


def _spread(low: float, high: float, cells: int, centred: bool) -> Float64[np.ndarray, " cells"]:
    if centred:
        step = (high - low) / cells
        return low + step * (np.arange(cells) + 0.5)
    return low + (high - low) / max(cells - 1, 1) * np.arange(cells)


def boxes_from_residuals(
    residuals: Float64[np.ndarray, "boxes 7"], anchors: Float64[np.ndarray, "boxes 7"]
) -> Float64[np.ndarray, "boxes 7"]:
    """x, y, z (m), logarithms of length, width and height (m), yaw (rad): ResidualCoder, its exponential not taken."""
    diagonal = np.hypot(anchors[:, 3], anchors[:, 4])[:, None]
    scale = np.concatenate([diagonal, diagonal, anchors[:, 5:6]], axis=1)
    return np.concatenate(
        [
            residuals[:, :3] * scale + anchors[:, :3],
            residuals[:, 3:6] + np.log(anchors[:, 3:6]),
            residuals[:, 6:] + anchors[:, 6:],
        ],
        axis=1,
    )


def residuals_from_boxes(
    boxes: Float64[np.ndarray, "boxes 7"], anchors: Float64[np.ndarray, "boxes 7"]
) -> Float64[np.ndarray, "boxes 7"]:
    """What the head should say of x, y, z, length, width, height (m), yaw (rad): ResidualCoder.encode_torch."""
    diagonal = np.hypot(anchors[:, 3], anchors[:, 4])[:, None]
    scale = np.concatenate([diagonal, diagonal, anchors[:, 5:6]], axis=1)
    return np.concatenate(
        [
            (boxes[:, :3] - anchors[:, :3]) / scale,
            np.log(boxes[:, 3:6] / anchors[:, 3:6]),
            boxes[:, 6:] - anchors[:, 6:],
        ],
        axis=1,
    )


def from_fold(yaw: Float64[np.ndarray, " boxes"], direction: DirectionConfig) -> Float64[np.ndarray, " boxes"]:
    """How far each yaw lies from where `directed` jumps by a whole period (rad): next to it rounding turns a box."""
    period = 2 * np.pi / direction.bins
    turns = (yaw - direction.offset_rad) / period + direction.limit_offset
    return np.asarray(np.abs(turns - np.rint(turns)) * period)


def directed(
    yaw: Float64[np.ndarray, " boxes"], bins: np.ndarray, direction: DirectionConfig
) -> Float64[np.ndarray, " boxes"]:
    """The yaw turned by whole periods into the classified bin (OpenPCDet's generate_predicted_boxes)."""
    period = 2 * np.pi / direction.bins
    within = yaw - direction.offset_rad
    within = within - np.floor(within / period + direction.limit_offset) * period
    turned: np.ndarray = within + direction.offset_rad + period * bins
    return turned
