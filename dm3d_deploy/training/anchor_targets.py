"""What an anchor head should answer: classes, residuals and directions, as OpenPCDet's AxisAlignedTargetAssigner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from dm3d_deploy.config import AnchorHeadConfig, ClassAnchors, DetectorConfig
from dm3d_deploy.errors import InternalError
from dm3d_deploy.geometry.anchors import anchor_places, cell_anchors, residuals_from_boxes
from dm3d_deploy.geometry.boxes import select_boxes
from dm3d_deploy.pointcloud import Boxes3D

IGNORED, BACKGROUND = -1, 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorTargets:
    """Per frame and anchor (row, column, anchor of the cell): the class, 1-based, 0 background, -1 not asked about.

    `residuals` and `directions` (bins; 0 without a direction classifier) count where a class is given.
    """

    classes: Int64[Tensor, "batch anchors"]
    residuals: Float32[Tensor, "batch anchors 7"]
    directions: Int64[Tensor, "batch anchors"]

    def to(self, device: torch.device) -> AnchorTargets:
        """The targets on a device."""
        return AnchorTargets(
            classes=self.classes.to(device),
            residuals=self.residuals.to(device),
            directions=self.directions.to(device),
        )


def anchor_targets(
    boxes: Boxes3D,
    labels: Int64[np.ndarray, " boxes"],
    config: DetectorConfig,
    head: AnchorHeadConfig,
    *,
    first: tuple[int, int] = (0, 0),
    shape: tuple[int, int] | None = None,
) -> AnchorTargets:
    """The targets of one frame, or of a window of `shape` cells (rows, columns) of its map that begins at cell `first`.

    Within each class an anchor belongs to the object that it overlaps most if that is at least `matched`, or if no
    anchor of the class overlaps that object more; below `unmatched` it is background; between, it is ignored. Overlaps
    are those of the boxes turned to the nearest axis. Objects whose centre lies outside the window are left out. Labels
    are 0-based into `config.class_names`.
    """
    x, y = anchor_places(config, head)
    rows, columns = shape if shape is not None else (y.shape[1], x.shape[1])
    inside = _inside(boxes, config, head.stride, first, (rows, columns))
    boxes, labels = select_boxes(boxes, inside), labels[inside]
    row, column = slice(first[0], first[0] + rows), slice(first[1], first[1] + columns)
    x, y = x[:, column], y[:, row]
    if x.shape[1] != columns or y.shape[1] != rows:
        raise InternalError(f"a window of {rows} x {columns} cells from {first} leaves the map of {config.name}")
    truth = np.concatenate([boxes.centre, boxes.size, boxes.yaw[:, None]], axis=1).astype(np.float64)
    cell = cell_anchors(head)
    classes = np.full((rows, columns, head.per_cell), IGNORED, dtype=np.int64)
    residuals = np.zeros((rows, columns, head.per_cell, 7))
    at = 0
    for of_class in head.anchors:
        count = len(of_class.sizes_m) * len(of_class.rotations_rad)
        part = slice(at, at + count)
        at += count
        anchors = np.empty((rows, columns, count, 7))
        anchors[..., 0], anchors[..., 1] = x[part].T[None], y[part].T[:, None]
        anchors[..., 2:] = cell[part]
        label = config.class_names.index(of_class.class_name)
        found, wanted = _of_class(anchors.reshape(-1, 7), truth[labels == label], of_class)
        classes[:, :, part] = np.where(found > 0, label + 1, found).reshape(rows, columns, count)
        residuals[:, :, part] = wanted.reshape(rows, columns, count, 7)
    rotations = np.broadcast_to(cell[:, 4], classes.shape).reshape(-1)
    yaw = residuals.reshape(-1, 7)[:, 6] + rotations
    return AnchorTargets(
        classes=torch.from_numpy(classes.reshape(1, -1)),
        residuals=torch.from_numpy(residuals.reshape(1, -1, 7).astype(np.float32)),
        directions=torch.from_numpy(_directions(yaw, head)[None]),
    )


def _inside(
    boxes: Boxes3D, config: DetectorConfig, stride: int, first: tuple[int, int], shape: tuple[int, int]
) -> Int64[np.ndarray, " inside"]:
    """Indices of the boxes whose centre lies in the window."""
    cell = stride * np.array(config.voxels.voxel_size_m[:2])
    place = (boxes.centre[:, :2] - np.array(config.voxels.point_range_m[:2])) / cell - (first[1], first[0])
    index: np.ndarray = np.flatnonzero(((place >= 0) & (place < (shape[1], shape[0]))).all(axis=1))
    return index


def collate_anchors(frames: Sequence[AnchorTargets]) -> AnchorTargets:
    """The targets of several frames of one shape, as one batch."""
    if not frames:
        raise InternalError("a batch of no frames has no targets")
    return AnchorTargets(
        classes=torch.cat([frame.classes for frame in frames]),
        residuals=torch.cat([frame.residuals for frame in frames]),
        directions=torch.cat([frame.directions for frame in frames]),
    )


def nearest_bev_iou(
    a: Float64[np.ndarray, "rows 7"], b: Float64[np.ndarray, "columns 7"]
) -> Float64[np.ndarray, "rows columns"]:
    """Bird's-eye IoU after turning every box to the nearer axis (OpenPCDet's boxes3d_nearest_bev_iou)."""
    low_a, high_a = _aligned(a)
    low_b, high_b = _aligned(b)
    shared = np.minimum(high_a[:, None], high_b[None]) - np.maximum(low_a[:, None], low_b[None])
    area = np.maximum(shared, 0).prod(axis=2)
    union = (a[:, 3] * a[:, 4])[:, None] + (b[:, 3] * b[:, 4])[None] - area
    iou: np.ndarray = area / np.maximum(union, 1e-6)
    return iou


def _aligned(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper corners in x and y."""
    angle = np.abs(boxes[:, 6] - np.floor(boxes[:, 6] / math.pi + 0.5) * math.pi)
    size = np.where((angle < math.pi / 4)[:, None], boxes[:, 3:5], boxes[:, [4, 3]])
    return boxes[:, :2] - size / 2, boxes[:, :2] + size / 2


def _of_class(anchors: np.ndarray, truth: np.ndarray, of_class: ClassAnchors) -> tuple[np.ndarray, np.ndarray]:
    """1, background or ignored for each anchor of one class, and the residuals of the ones."""
    residuals = np.zeros((len(anchors), 7))
    if not len(truth):
        return np.full(len(anchors), BACKGROUND), residuals
    overlap = nearest_bev_iou(anchors, truth)
    best, most = overlap.argmax(axis=1), overlap.max(axis=1)
    highest = overlap.max(axis=0)
    forced = ((overlap == highest) & (highest > 0)).any(axis=1)
    owned = forced | (most >= of_class.matched)
    classes = np.where(owned, 1, np.where(most < of_class.unmatched, BACKGROUND, IGNORED))
    residuals[owned] = residuals_from_boxes(truth[best[owned]], anchors[owned])
    return classes, residuals


def _directions(yaw: Float64[np.ndarray, " anchors"], head: AnchorHeadConfig) -> Int64[np.ndarray, " anchors"]:
    """The bin of each yaw (OpenPCDet's get_direction_target)."""
    if head.direction is None:
        return np.zeros(len(yaw), dtype=np.int64)
    turned = yaw - head.direction.offset_rad
    turned -= np.floor(turned / (2 * math.pi)) * 2 * math.pi
    bins = np.floor(turned / (2 * math.pi / head.direction.bins)).astype(np.int64)
    return np.clip(bins, 0, head.direction.bins - 1)
