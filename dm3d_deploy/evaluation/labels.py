"""The labels of one frame, whatever the metric."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from dm3d_deploy.errors import InternalError
from dm3d_deploy.evaluation.camera import Camera
from dm3d_deploy.evaluation.kitti import KittiTruth


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameLabels:
    """Labels, the points that fell on each object, and the camera that KITTI's difficulties refer to.

    `all_around`: a simulated frame, where everything on every side is labelled and velocities are known. Otherwise
    people labelled what the camera saw, and nothing says how fast it was.
    """

    truth: KittiTruth
    num_points: Int64[np.ndarray, " boxes"]
    camera: Camera
    all_around: bool

    def __post_init__(self) -> None:
        if len(self.num_points) != len(self.truth.boxes):
            raise InternalError(f"{len(self.num_points)} counts of points for {len(self.truth.boxes)} boxes")
