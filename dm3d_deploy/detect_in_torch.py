"""Detections of one frame by a detector in memory, where `detect` uses a run's graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dm3d_deploy.geometry.decode import detections_from_maps
from dm3d_deploy.geometry.voxelize import voxelize
from dm3d_deploy.pointcloud import Detections, PointCloud

if TYPE_CHECKING:
    from dm3d_deploy.models.detector import Detector


def detect_in_torch(detector: Detector, cloud: PointCloud) -> Detections:
    """The boxes that a detector in eval mode, on whatever device, finds in a cloud; raises what `voxelize` raises."""
    import torch

    from dm3d_deploy.models.detector import tensors_from_voxels

    device = next(detector.parameters()).device
    features, coords = tensors_from_voxels(voxelize(cloud, detector.config), device)
    with torch.inference_mode():
        maps = detector(features, coords)
    return detections_from_maps({name: value.cpu().numpy() for name, value in maps.items()}, detector.config)
