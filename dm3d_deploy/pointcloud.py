"""The contracts of what goes in and what comes out: points, voxels, boxes, detections."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32, Int64

from dm3d_deploy.errors import FrameError, InternalError


@dataclass(frozen=True, slots=True, kw_only=True)
class PointCloud:
    """Points in the sensor frame: x forward, y left, z up, in metres; other columns as `columns` names them.

    `intensity` keeps the data set's own scale (KITTI 0..1, nuScenes and ONCE 0..255); `timestamp` is seconds before
    the key frame, as OpenPCDet feeds it.
    """

    points: Float32[np.ndarray, "points columns"]
    columns: tuple[str, ...]
    source: str = ""

    def __post_init__(self) -> None:
        if self.points.ndim != 2 or self.points.dtype != np.float32 or self.points.shape[1] != len(self.columns):
            raise InternalError(
                f"points of shape {self.points.shape} and type {self.points.dtype} do not fit columns {self.columns}"
            )
        if self.columns[:3] != ("x", "y", "z"):
            raise InternalError(f"the first columns must be x, y, z, not {self.columns[:3]}")

    def column(self, name: str) -> Float32[np.ndarray, " points"]:
        """One column by name."""
        if name not in self.columns:
            raise FrameError(
                f"{self.source or 'the frame'} has the columns {', '.join(self.columns)} and no '{name}'.",
                fix="use a frame of the sensor that the model was trained for",
            )
        column: np.ndarray = self.points[:, self.columns.index(name)]
        return column


@dataclass(frozen=True, slots=True, kw_only=True)
class Voxels:
    """Occupied cells in raster order (z, then y, then x), at most `max_voxels` of them.

    A row is a voxel, and `features` are the means over the points kept in it; or, for a detector over pillars, a row is
    a point, and rows of one pillar stand together. `num_points` are the points kept in a row's cell. `found` counts the
    cells before the cap; `cutoff_m` is the horizontal range beyond which cells were dropped, infinite when none was.
    `points` are those that a second stage draws keypoints from, in the frame's order.
    """

    features: Float32[np.ndarray, "rows columns"]
    coords: Int32[np.ndarray, "rows 4"]
    num_points: Int32[np.ndarray, " rows"]
    found: int
    cutoff_m: float
    points: Float32[np.ndarray, "points columns"] | None = None

    def __post_init__(self) -> None:
        count = len(self.coords)
        if self.coords.shape != (count, 4) or len(self.features) != count or len(self.num_points) != count:
            raise InternalError(f"voxel arrays disagree: {self.features.shape}, {self.coords.shape}")

    @property
    def cells(self) -> int:
        """Occupied cells that were kept."""
        return len(self.coords) and 1 + int(np.count_nonzero((self.coords[1:] != self.coords[:-1]).any(axis=1)))

    @property
    def dropped(self) -> int:
        """Cells that the cap removed, farthest first."""
        return self.found - self.cells


@dataclass(frozen=True, slots=True, kw_only=True)
class Boxes3D:
    """Upright boxes: centre (m), size length x width x height (m), yaw about z (rad), velocity (m/s)."""

    centre: Float32[np.ndarray, "boxes 3"]
    size: Float32[np.ndarray, "boxes 3"]
    yaw: Float32[np.ndarray, " boxes"]
    velocity: Float32[np.ndarray, "boxes 2"]

    def __post_init__(self) -> None:
        count = len(self.centre)
        shapes = (self.centre.shape, self.size.shape, self.yaw.shape, self.velocity.shape)
        if shapes != ((count, 3), (count, 3), (count,), (count, 2)):
            raise InternalError(f"box arrays disagree: {shapes}")

    def __len__(self) -> int:
        return len(self.centre)


@dataclass(frozen=True, slots=True, kw_only=True)
class Detections:
    """Boxes with scores (0..1, descending) and labels, 0-based into `class_names`."""

    boxes: Boxes3D
    scores: Float32[np.ndarray, " boxes"]
    labels: Int64[np.ndarray, " boxes"]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.boxes) == len(self.scores) == len(self.labels):
            raise InternalError("boxes, scores and labels differ in number")
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.class_names):
            raise InternalError("a label lies outside class_names")

    def __len__(self) -> int:
        return len(self.boxes)
