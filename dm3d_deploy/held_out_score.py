"""How well a detector finds what simulated scenes hold that no training saw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from calib.held_out import FIRST_SEED, held_out_frames
from dm3d_deploy.config import DetectorConfig, load_config
from dm3d_deploy.errors import require
from dm3d_deploy.evaluation.nuscenes import NuscenesScore, Truth, score_frames
from dm3d_deploy.geometry.decode import detections_from_maps
from dm3d_deploy.geometry.voxelize import voxelize
from dm3d_deploy.pointcloud import Detections, PointCloud

if TYPE_CHECKING:
    from dm3d_deploy.models.detector import Detector

Detect = Callable[[PointCloud], Detections]


def evaluate_checkpoint(
    model: str,
    checkpoint: Path | str,
    *,
    frames: int = 100,
    sensor: str = "nuscenes32",
    first_seed: int = FIRST_SEED,
    advanced: Callable[[int, int], None] | None = None,
) -> NuscenesScore:
    """Centre-distance AP of a model with these weights on full simulated frames.

    Raises what `detect_held_out` raises, and CheckpointError for weights that do not fit the model.
    """
    require("torch", extra="compile")
    from dm3d_deploy.models.checkpoints import load_checkpoint
    from dm3d_deploy.models.detector import build_detector

    detector = build_detector(load_config(model))
    load_checkpoint(detector, checkpoint)
    found, truths = detect_held_out(
        lambda cloud: detect_with(detector, cloud),
        detector.config,
        frames=frames,
        sensor=sensor,
        first_seed=first_seed,
        advanced=advanced,
    )
    return score_frames(found, truths)


def detect_held_out(
    detect: Detect,
    config: DetectorConfig,
    *,
    frames: int = 100,
    sensor: str = "nuscenes32",
    first_seed: int = FIRST_SEED,
    advanced: Callable[[int, int], None] | None = None,
) -> tuple[list[Detections], list[Truth]]:
    """What `detect` finds in held-out simulated frames, and what is there: both for `score_frames`.

    `detect` may be the method of a deployed run. Raises UsageError for frames that cannot be drawn or that training
    may have seen.
    """
    found, truths = [], []
    for cloud, truth in held_out_frames(config, frames=frames, sensor=sensor, first_seed=first_seed):
        found.append(detect(cloud))
        truths.append(truth)
        if advanced is not None:
            advanced(len(found), frames)
    return found, truths


def detect_with(detector: Detector, cloud: PointCloud) -> Detections:
    """Detections of one frame by a detector in memory, in eval mode."""
    import torch

    from dm3d_deploy.models.detector import tensors_from_voxels

    features, coords = tensors_from_voxels(voxelize(cloud, detector.config.voxels))
    with torch.inference_mode():
        maps = detector(features, coords)
    return detections_from_maps({name: value.numpy() for name, value in maps.items()}, detector.config)
