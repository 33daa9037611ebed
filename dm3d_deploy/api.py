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
    from dm3d_deploy.models.checkpoints import load_checkpoint
    from dm3d_deploy.models.detector import build_detector
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
    "load_checkpoint",
    "load_config",
    "load_run",
    "read_points",
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
    "load_checkpoint": "dm3d_deploy.models.checkpoints",
    "load_config": "dm3d_deploy.config",
    "load_run": "dm3d_deploy.detect",
    "read_points": "calib.readers",
    "voxelize": "dm3d_deploy.geometry.voxelize",
}


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"dm3d_deploy.api has no '{name}'")
    if HOME[name].startswith("dm3d_deploy.models."):
        require("torch", extra="compile")
    return getattr(importlib.import_module(HOME[name]), name)
