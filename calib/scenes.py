"""What a second stage reads of stored frames: their points, and the RoIs of the dense detector.

Every detector of a build is compared at the RoIs that the dense one proposes: proposals of another detector stand in
another order, and their differences would say nothing of the second stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from dm3d_deploy.config import DetectorConfig
from dm3d_deploy.geometry.rois import array_from_rois, rois_from_array
from dm3d_deploy.models.detector import Detector
from dm3d_deploy.models.outputs import Scene


def read_scenes(config: DetectorConfig, frames_file: Path, frames: Iterable[int], rois_file: str | None) -> list[Scene]:
    """One scene a frame, none for a detector with one stage; without `rois_file` each detector proposes its own."""
    if config.second_stage is None:
        return []
    scenes = []
    for frame in frames:
        points = _array(frames_file, f"{frame}.points") if config.second_stage.reads_points else None
        rois = None if rois_file is None else rois_from_array(_array(Path(rois_file), str(frame)), config)
        scenes.append(Scene(points=points, rois=rois))
    return scenes


def _array(path: Path, name: str) -> np.ndarray:
    with safe_open(path, framework="np") as file:
        array: np.ndarray = file.get_tensor(name)
    return array


def proposed_rois(
    detector: Detector, features: Any, coords: Any, frame: int, settings: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The RoIs that a detector with two stages proposes in a frame: "rois" Float64[rois, 10]."""
    import torch

    with torch.inference_mode():
        found = detector.outputs(features, coords, scenes=settings["scenes"])
    return {"rois": array_from_rois(found.rois[0])}
