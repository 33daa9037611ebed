"""Crops of labelled frames as batches: turned, mirrored, scaled, lifted, cut out along the BEV grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float32, Int32, Int64

from dm3d_deploy.config import AnchorHeadConfig, DetectorConfig
from dm3d_deploy.geometry.boxes import wrap_angle
from dm3d_deploy.geometry.voxelize import voxelize
from dm3d_deploy.pointcloud import Boxes3D, PointCloud
from dm3d_deploy.training.anchor_targets import AnchorTargets, anchor_targets, collate_anchors
from dm3d_deploy.training.batch import Batch
from dm3d_deploy.training.targets import TaskTargets, center_targets, collate

SMALL_M, LARGE_M = 25.6, 38.4
LARGE_SHARE = 1 / 3
MIN_CROP_POINTS = 200
# How often a crop is drawn around an object of the class.
CLASS_WEIGHT = {
    "car": 1.0,
    "truck": 3.0,
    "construction_vehicle": 3.0,
    "bus": 5.0,
    "trailer": 5.0,
    "barrier": 1.2,
    "motorcycle": 3.0,
    "bicycle": 2.0,
    "pedestrian": 1.2,
    "traffic_cone": 1.5,
}
LARGE_CLASSES = ("truck", "construction_vehicle", "bus", "trailer")
HEIGHT_JITTER_M = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledFrame:
    """Points in the columns of the model, and the objects that enough points fell on.

    Intensity lies in 0..1 and `full_scale` is what its data set writes for 1; without `full_scale` it is as the model
    will see it, and stays so.
    """

    points: Float32[np.ndarray, "points columns"]
    boxes: Boxes3D
    labels: Int64[np.ndarray, " boxes"]
    full_scale: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A crop's size: whole BEV cells, so many that every block of the 2D backbone halves them evenly, within the range.

    `cells` are BEV cells along x and y, `cell_m` their size.
    """

    cells: tuple[int, int]
    cell_m: tuple[float, float]

    @classmethod
    def of(cls, config: DetectorConfig, size_m: float) -> Window:
        """The window of a model that is nearest to a square of `size_m`."""
        even = math.prod(config.backbone_2d.strides) // config.backbone_2d.strides[0]
        _, rows, columns = config.voxels.grid_zyx
        cell_m = tuple(config.head.stride * step for step in config.voxels.voxel_size_m[:2])
        cells = (
            min(max(round(size_m / cell / even), 1) * even, grid // config.head.stride)
            for cell, grid in zip(cell_m, (columns, rows), strict=True)
        )
        x, y = cells
        return cls(cells=(x, y), cell_m=(cell_m[0], cell_m[1]))

    @property
    def size_m(self) -> tuple[float, float]:
        """Length along x and y."""
        return self.cells[0] * self.cell_m[0], self.cells[1] * self.cell_m[1]


def window_of_step(config: DetectorConfig, seed: int, step: int) -> tuple[Window, bool]:
    """The crop size of a step, and whether it is the large one: all processes take one size, so that none waits."""
    large = bool(np.random.default_rng((seed, step)).random() < LARGE_SHARE)
    return Window.of(config, LARGE_M if large else SMALL_M), large


@dataclass(frozen=True, slots=True, kw_only=True)
class Crop:
    """Voxels of one crop and what the head should answer."""

    features: Float32[np.ndarray, "voxels columns"]
    coords: Int32[np.ndarray, "voxels 4"]
    targets: tuple[TaskTargets, ...] | AnchorTargets


def crop_of(
    frame: LabelledFrame, config: DetectorConfig, window: Window, random: np.random.Generator, *, prefer_large: bool
) -> Crop | None:
    """A random window of the randomly turned frame; None when it is almost empty."""
    points, boxes = turned(frame, random)
    x0, y0 = _corner(boxes, frame.labels, config, window, random, prefer_large=prefer_large)
    z0, z1 = config.voxels.point_range_m[2], config.voxels.point_range_m[5]
    low, high = (x0, y0, z0), (x0 + window.size_m[0], y0 + window.size_m[1], z1)
    inside = np.ones(len(points), dtype=bool)
    for axis in range(3):
        inside &= (points[:, axis] >= low[axis]) & (points[:, axis] < high[axis])
    if np.count_nonzero(inside) < MIN_CROP_POINTS:
        return None
    points = _relit(points[inside], config, frame.full_scale, random)
    grid = replace(config.voxels, point_range_m=(*low, *high), max_voxels=len(points))
    voxels = voxelize(PointCloud(points=points, columns=config.voxels.columns), replace(config, voxels=grid))
    targets = _targets_of(boxes, frame.labels, config, window, low_m=(x0, y0))
    return Crop(features=voxels.features, coords=voxels.coords, targets=targets)


def _targets_of(
    boxes: Boxes3D,
    labels: Int64[np.ndarray, " boxes"],
    config: DetectorConfig,
    window: Window,
    *,
    low_m: tuple[float, float],
) -> tuple[TaskTargets, ...] | AnchorTargets:
    columns, rows = window.cells
    if not isinstance(config.head, AnchorHeadConfig):
        return center_targets(boxes, labels, config, low_m=low_m, shape=(rows, columns))
    column, row = (round((low_m[axis] - config.voxels.point_range_m[axis]) / window.cell_m[axis]) for axis in range(2))
    return anchor_targets(boxes, labels, config, config.head, first=(row, column), shape=(rows, columns))


def turned(frame: LabelledFrame, random: np.random.Generator) -> tuple[np.ndarray, Boxes3D]:
    """The frame mirrored, turned about the sensor, scaled and lifted, at random."""
    sign = -1.0 if random.random() < 0.5 else 1.0
    turn = random.uniform(-math.pi, math.pi) if random.random() < 0.5 else random.uniform(-0.4, 0.4)
    scale = random.uniform(0.95, 1.05)
    lift = random.normal(0, HEIGHT_JITTER_M)
    cos, sin = math.cos(turn), math.sin(turn)
    # Row vectors: mirror y, then turn.
    plane = np.array([[cos, sin], [-sign * sin, sign * cos]])
    points = frame.points.copy()
    points[:, :2] = points[:, :2] @ (scale * plane).astype(np.float32)
    points[:, 2] = scale * points[:, 2] + lift
    centre = frame.boxes.centre @ np.block([[scale * plane, np.zeros((2, 1))], [np.zeros((1, 2)), scale]])
    boxes = Boxes3D(
        centre=(centre + np.array([0, 0, lift])).astype(np.float32),
        size=frame.boxes.size * np.float32(scale),
        yaw=wrap_angle(sign * frame.boxes.yaw + turn).astype(np.float32),
        velocity=(frame.boxes.velocity @ (scale * plane)).astype(np.float32),
    )
    return points, boxes


def _corner(
    boxes: Boxes3D,
    labels: Int64[np.ndarray, " boxes"],
    config: DetectorConfig,
    window: Window,
    random: np.random.Generator,
    *,
    prefer_large: bool,
) -> tuple[float, float]:
    """The lower corner of a crop that likely holds an object, on the grid of BEV cells, inside the range."""
    low, high = config.voxels.point_range_m[:2], config.voxels.point_range_m[3:5]
    in_range = ((boxes.centre[:, :2] > low) & (boxes.centre[:, :2] < high)).all(axis=1)
    rows = np.flatnonzero(in_range)
    if len(rows) and random.random() < 0.95:
        names = [config.class_names[label] for label in labels[rows]]
        weight = np.array([CLASS_WEIGHT.get(n, 1.0) * (4 if prefer_large and n in LARGE_CLASSES else 1) for n in names])
        chosen = rows[int(random.choice(len(rows), p=weight / weight.sum()))]
        middle = boxes.centre[chosen, :2] + random.uniform(-0.4, 0.4, 2) * window.size_m
    else:
        middle = random.uniform(np.array(low) * 0.7, np.array(high) * 0.7)
    corner = []
    for axis in range(2):
        step, size = window.cell_m[axis], window.size_m[axis]
        most = round((high[axis] - low[axis] - size) / step)
        cell = min(max(round(float(middle[axis] - size / 2 - low[axis]) / step), 0), most)
        corner.append(low[axis] + cell * step)
    return corner[0], corner[1]


def _relit(
    points: Float32[np.ndarray, "points columns"],
    config: DetectorConfig,
    full_scale: float | None,
    random: np.random.Generator,
) -> Float32[np.ndarray, "points columns"]:
    """Other brightness: gamma and gain; scales of 0..1 are half of the time brought to 0..255."""
    if full_scale is None or "intensity" not in config.voxels.columns:
        return points
    column = config.voxels.columns.index("intensity")
    light = np.clip(points[:, column] ** random.uniform(0.6, 1.6) * random.uniform(0.6, 1.4), 0, 1)
    if full_scale == 1.0 and random.random() < 0.5:
        full_scale = 255.0 * 10 ** random.uniform(-1, 0)
    points[:, column] = light * full_scale
    return points


def batch_of(crops: Sequence[Crop], config: DetectorConfig, window: Window) -> Batch:
    """Crops of one window as a batch."""
    depth = config.voxels.grid_zyx[0] + (config.pillars is None)
    features, coords = [], []
    for index, crop in enumerate(crops):
        cells = torch.from_numpy(crop.coords.astype(np.int64))
        cells[:, 0] = index
        features.append(torch.from_numpy(crop.features))
        coords.append(cells)
    return Batch(
        features=torch.cat(features),
        coords=torch.cat(coords),
        shape_zyx=(depth, window.cells[1] * config.head.stride, window.cells[0] * config.head.stride),
        size=len(crops),
        targets=_collated([crop.targets for crop in crops]),
    )


def _collated(found: Sequence[tuple[TaskTargets, ...] | AnchorTargets]) -> tuple[TaskTargets, ...] | AnchorTargets:
    anchors = [targets for targets in found if isinstance(targets, AnchorTargets)]
    if anchors:
        return collate_anchors(anchors)
    return collate([targets for targets in found if not isinstance(targets, AnchorTargets)])
