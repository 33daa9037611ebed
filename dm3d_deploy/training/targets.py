"""What CenterHead should answer: heat maps and box values, as OpenPCDet's CenterHead.assign_targets makes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from dm3d_deploy.config import DetectorConfig
from dm3d_deploy.errors import InternalError
from dm3d_deploy.pointcloud import Boxes3D

GAUSSIAN_OVERLAP = 0.1
MIN_RADIUS_CELLS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskTargets:
    """One task of one or more frames: the heat map, and the values wanted at the cells of the object centres.

    `cells` are flat indices into [batch, row, column]; `values` follow the box branches of the task, in their order.
    """

    heat: Float32[Tensor, "batch classes rows columns"]
    cells: Int64[Tensor, " objects"]
    values: Float32[Tensor, "objects channels"]

    def to(self, device: torch.device) -> TaskTargets:
        """The targets on a device."""
        return TaskTargets(heat=self.heat.to(device), cells=self.cells.to(device), values=self.values.to(device))


def gaussian_radius(length: float, width: float, overlap: float = GAUSSIAN_OVERLAP) -> float:
    """How far (cells) both corners of a box may move for the IoU to stay at `overlap` (OpenPCDet's gaussian_radius).

    The least of three cases: one corner moves in and one out, both in, both out. The roots are taken as OpenPCDet
    takes them, without the division by 2a.
    """
    total, area = length + width, length * width
    cases = (
        (1.0, total, area * (1 - overlap) / (1 + overlap)),
        (4.0, 2 * total, (1 - overlap) * area),
        (4 * overlap, -2 * overlap * total, (overlap - 1) * area),
    )
    return min((b + math.sqrt(b * b - 4 * a * c)) / 2 for a, b, c in cases)


def center_targets(
    boxes: Boxes3D,
    labels: Int64[np.ndarray, " boxes"],
    config: DetectorConfig,
    *,
    low_m: tuple[float, float],
    shape: tuple[int, int],
) -> tuple[TaskTargets, ...]:
    """The targets of one frame for a map of `shape` (rows, columns) whose corner lies at `low_m` (x, y).

    Objects whose centre lies outside the map are left out. Labels are 0-based into `config.class_names`.
    """
    cell_x, cell_y = (config.head.stride * size for size in config.voxels.voxel_size_m[:2])
    x = (boxes.centre[:, 0].astype(np.float64) - low_m[0]) / cell_x
    y = (boxes.centre[:, 1].astype(np.float64) - low_m[1]) / cell_y
    inside = (x >= 0) & (x < shape[1]) & (y >= 0) & (y < shape[0])
    values = _box_values(boxes, x, y)
    cells_lw = boxes.size[:, :2].astype(np.float64) / (cell_x, cell_y)
    tasks = []
    for task, names in enumerate(config.center_head.classes_by_task):
        heat = np.zeros((len(names), *shape), dtype=np.float32)
        channel_of = {config.class_names.index(name): channel for channel, name in enumerate(names)}
        rows = np.flatnonzero(inside & np.isin(labels, list(channel_of)))
        for row in rows:
            radius = max(MIN_RADIUS_CELLS, int(gaussian_radius(*cells_lw[row])))
            _draw_gaussian(heat[channel_of[int(labels[row])]], int(x[row]), int(y[row]), radius)
        branches = [branch.name for branch in config.center_head.branches[task] if branch.name != "hm"]
        columns = [values[name][rows] for name in branches]
        tasks.append(
            TaskTargets(
                heat=torch.from_numpy(heat[None]),
                cells=torch.from_numpy(y[rows].astype(np.int64) * shape[1] + x[rows].astype(np.int64)),
                values=torch.from_numpy(np.concatenate(columns, axis=1).astype(np.float32)),
            )
        )
    return tuple(tasks)


def collate(frames: Sequence[tuple[TaskTargets, ...]]) -> tuple[TaskTargets, ...]:
    """The targets of several frames of one shape, as one batch."""
    if not frames:
        raise InternalError("a batch of no frames has no targets")
    tasks = []
    for parts in zip(*frames, strict=True):
        cells = parts[0].heat[0, 0].numel()
        tasks.append(
            TaskTargets(
                heat=torch.cat([part.heat for part in parts]),
                cells=torch.cat([part.cells + index * cells for index, part in enumerate(parts)]),
                values=torch.cat([part.values for part in parts]),
            )
        )
    return tuple(tasks)


def _box_values(boxes: Boxes3D, x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """What each branch should say of each box; `x` and `y` are the centres in cells."""
    return {
        "center": np.stack([x - np.floor(x), y - np.floor(y)], axis=1),
        "center_z": boxes.centre[:, 2:3],
        "dim": np.log(boxes.size),
        "rot": np.stack([np.cos(boxes.yaw), np.sin(boxes.yaw)], axis=1),
        "vel": boxes.velocity,
    }


def _draw_gaussian(heat: Float32[np.ndarray, "rows columns"], column: int, row: int, radius: int) -> None:
    """Raise the map to a Gaussian that is 1 at the cell (CenterNet's draw_umich_gaussian: sigma = diameter / 6)."""
    sigma = (2 * radius + 1) / 6
    top, left = max(0, row - radius), max(0, column - radius)
    part = heat[top : row + radius + 1, left : column + radius + 1]
    rows = np.arange(top, top + part.shape[0])[:, None] - row
    columns = np.arange(left, left + part.shape[1])[None] - column
    bell = np.exp(-(rows**2 + columns**2) / (2 * sigma * sigma)).astype(np.float32)
    np.maximum(part, bell, out=part)
