"""Detections of one frame by a detector in memory, where `detect` uses a run's graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dm3d_deploy.geometry.voxelize import voxelize
from dm3d_deploy.pointcloud import Detections, PointCloud

if TYPE_CHECKING:
    from dm3d_deploy.models.detector import Detector


def detect_in_torch(detector: Detector, cloud: PointCloud) -> Detections:
    """The boxes that a detector in eval mode, on whatever device, finds in a cloud; raises what `voxelize` raises."""
    import torch

    from dm3d_deploy.models.detector import tensors_from_voxels
    from dm3d_deploy.models.outputs import Scene, detections_from_outputs

    device = next(detector.parameters()).device
    voxels = voxelize(cloud, detector.config)
    features, coords = tensors_from_voxels(voxels, device)
    scenes = [] if detector.config.second_stage is None else [Scene(points=voxels.points)]
    with torch.inference_mode():
        outputs = detector.outputs(features, coords, scenes=scenes)
    return detections_from_outputs(outputs, detector.config)
