"""The Python API, every name in one place; what needs torch is imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dm3d_deploy.errors import require

if TYPE_CHECKING:
    from calib.readers import read_points
    from dm3d_deploy.artifacts import Manifest
    from dm3d_deploy.build import build
    from dm3d_deploy.config import load_config
    from dm3d_deploy.detect import load_run
    from dm3d_deploy.geometry.voxelize import voxelize
    from dm3d_deploy.models.checkpoints import load_checkpoint, save_weights
    from dm3d_deploy.models.detector import build_detector
    from dm3d_deploy.models.pcdet import detector_from_pcdet
    from dm3d_deploy.pointcloud import Boxes3D, Detections, PointCloud, Voxels
    from dm3d_deploy.recipe import Recipe

__all__ = [
    "Boxes3D",
    "Detections",
    "Manifest",
    "PointCloud",
    "Recipe",
    "Voxels",
    "build",
    "build_detector",
    "detector_from_pcdet",
    "load_checkpoint",
    "load_config",
    "load_run",
    "read_points",
    "save_weights",
    "voxelize",
]

HOME = {
    "Boxes3D": "dm3d_deploy.pointcloud",
    "Detections": "dm3d_deploy.pointcloud",
    "Manifest": "dm3d_deploy.artifacts",
    "PointCloud": "dm3d_deploy.pointcloud",
    "Recipe": "dm3d_deploy.recipe",
    "Voxels": "dm3d_deploy.pointcloud",
    "build": "dm3d_deploy.build",
    "build_detector": "dm3d_deploy.models.detector",
    "detector_from_pcdet": "dm3d_deploy.models.pcdet",
    "load_checkpoint": "dm3d_deploy.models.checkpoints",
    "load_config": "dm3d_deploy.config",
    "load_run": "dm3d_deploy.detect",
    "read_points": "calib.readers",
    "save_weights": "dm3d_deploy.models.checkpoints",
    "voxelize": "dm3d_deploy.geometry.voxelize",
}


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"dm3d_deploy.api has no '{name}'")
    if HOME[name].startswith("dm3d_deploy.models."):
        require("torch", extra="compile")
    return getattr(importlib.import_module(HOME[name]), name)
