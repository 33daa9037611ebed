"""How well weights detect in simulated scenes that no training saw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dm3d_deploy.config import load_config
from dm3d_deploy.errors import UsageError, require
from dm3d_deploy.evaluation.nuscenes import NuscenesScore, Truth, score_frames
from dm3d_deploy.geometry.decode import detections_from_maps
from dm3d_deploy.geometry.voxelize import voxelize
from dm3d_deploy.pointcloud import Detections, PointCloud

if TYPE_CHECKING:
    from dm3d_deploy.models.detector import Detector

FIRST_SEED = 1_000_000_000
MIN_POINTS = 5


def evaluate_simulated(
    model: str,
    checkpoint: Path | str,
    *,
    frames: int = 100,
    sensor: str = "nuscenes32",
    first_seed: int = FIRST_SEED,
    advanced: Callable[[int, int], None] | None = None,
) -> NuscenesScore:
    """Centre-distance AP on full simulated frames with the seeds from `first_seed` on, below all seeds of training.

    Objects count that at least five points fell on. Raises UsageError for a seed that training may have seen,
    CheckpointError for weights that do not fit the model.
    """
    found, truths = detect_simulated(
        model, checkpoint, frames=frames, sensor=sensor, first_seed=first_seed, advanced=advanced
    )
    return score_frames(found, truths)


def detect_simulated(
    model: str,
    checkpoint: Path | str,
    *,
    frames: int,
    sensor: str,
    first_seed: int = FIRST_SEED,
    advanced: Callable[[int, int], None] | None = None,
) -> tuple[list[Detections], list[Truth]]:
    """Detections and labels of held-out simulated frames; errors as `evaluate_simulated`."""
    require("torch", extra="compile")
    from calib.simulator.frame import simulate_frame
    from calib.training_frames import FIRST_TRAINING_SEED, seen_objects
    from dm3d_deploy.models.checkpoints import load_checkpoint
    from dm3d_deploy.models.detector import build_detector

    if frames < 1:
        raise UsageError(f"{frames} frames show nothing.", fix="use one frame or more")
    if not 0 <= first_seed <= FIRST_TRAINING_SEED - frames:
        raise UsageError(
            f"training may have seen the frames of seed {first_seed} and after.",
            fix=f"use seeds from 0 to {FIRST_TRAINING_SEED - frames}",
        )
    detector = build_detector(load_config(model))
    load_checkpoint(detector, checkpoint)
    found, truths = [], []
    for index in range(frames):
        frame = simulate_frame(first_seed + index, sensor=sensor)
        found.append(detect_with(detector, frame.cloud))
        boxes, labels = seen_objects(frame, detector.config, min_points=MIN_POINTS)
        truths.append(Truth(boxes=boxes, labels=labels))
        if advanced is not None:
            advanced(index + 1, frames)
    return found, truths


def detect_with(detector: Detector, cloud: PointCloud) -> Detections:
    """Detections of one frame by a detector in memory, in eval mode."""
    import torch

    from dm3d_deploy.models.detector import tensors_from_voxels

    features, coords = tensors_from_voxels(voxelize(cloud, detector.config.voxels))
    with torch.inference_mode():
        maps = detector(features, coords)
    return detections_from_maps({name: value.numpy() for name, value in maps.items()}, detector.config)
