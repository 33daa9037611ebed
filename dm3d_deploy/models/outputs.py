"""What a detector takes beside voxels, and what it says of a frame."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32
from torch import Tensor

from dm3d_deploy.config import DetectorConfig
from dm3d_deploy.geometry.candidates import Located
from dm3d_deploy.geometry.decode import detections_from_maps
from dm3d_deploy.pointcloud import Detections


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scene:
    """What the second stage reads of a frame: its points, if keypoints are drawn, and RoIs, if they are given."""

    points: Float32[np.ndarray, "points columns"] | None = None
    rois: Located | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outputs:
    """The bird's-eye view, raw head maps by name, and of a detector with two stages the RoIs of each frame."""

    bev: Float[Tensor, "batch bev_channels height width"]
    maps: dict[str, Float[Tensor, "batch channels h w"]]
    rois: tuple[Located, ...] = ()


def detections_from_outputs(outputs: Outputs, config: DetectorConfig) -> Detections:
    """The detections of a batch of one; raises what `decoded` does."""
    maps = {name: value.detach().cpu().numpy() for name, value in outputs.maps.items()}
    return detections_from_maps(maps, config, outputs.rois[0] if outputs.rois else None)
