"""Simulated frames that no training saw, with the objects that a model should find in them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64

from calib.simulator.frame import SimulatedFrame, simulate_frame
from calib.simulator.objects import CLASS_NAMES
from dm3d_deploy.config import DetectorConfig
from dm3d_deploy.errors import UsageError
from dm3d_deploy.evaluation.nuscenes import Truth
from dm3d_deploy.geometry.boxes import select_boxes
from dm3d_deploy.pointcloud import Boxes3D, PointCloud

# Seeds of frames to train on start here; every lower seed is free for evaluation.
FIRST_TRAINING_SEED = 1 << 40
FIRST_SEED = 1_000_000_000
MIN_POINTS = 5


def held_out_frames(
    config: DetectorConfig, *, frames: int, sensor: str = "nuscenes32", first_seed: int = FIRST_SEED
) -> Iterator[tuple[PointCloud, Truth]]:
    """Clouds with the seeds from `first_seed` on, and their objects of at least five points.

    Raises UsageError for no frame, for seeds that training may have seen, for an unknown sensor, and for a model with
    classes that the simulator does not draw.
    """
    if frames < 1:
        raise UsageError(f"{frames} frames show nothing.", fix="use one frame or more")
    if not 0 <= first_seed <= FIRST_TRAINING_SEED - frames:
        raise UsageError(
            f"training may have seen the {frames} frames from seed {first_seed} on.",
            fix=f"use a first seed from 0 to {FIRST_TRAINING_SEED - frames}",
        )
    for seed in range(first_seed, first_seed + frames):
        frame = simulate_frame(seed, sensor=sensor)
        boxes, labels = seen_objects(frame, config, min_points=MIN_POINTS)
        yield frame.cloud, Truth(boxes=boxes, labels=labels)


def model_labels(config: DetectorConfig) -> Int64[np.ndarray, " classes"]:
    """For each class of the simulator its label in the model, -1 where the model does not know it.

    Raises UsageError for a model with a class that the simulator does not draw.
    """
    strange = [name for name in config.class_names if name not in CLASS_NAMES]
    if strange:
        raise UsageError(
            f"{config.name} detects {', '.join(strange)}, which no simulated scene holds.",
            fix=f"use a model of {', '.join(CLASS_NAMES)}",
        )
    known = {name: label for label, name in enumerate(config.class_names)}
    return np.array([known.get(name, -1) for name in CLASS_NAMES], dtype=np.int64)


def seen_objects(
    frame: SimulatedFrame, config: DetectorConfig, *, min_points: int
) -> tuple[Boxes3D, Int64[np.ndarray, " boxes"]]:
    """The objects of classes that the model knows, with at least `min_points` points, labelled as the model does."""
    labels = model_labels(config)[frame.labels]
    seen = np.flatnonzero((frame.num_points >= min_points) & (labels >= 0))
    return select_boxes(frame.boxes, seen), labels[seen]
