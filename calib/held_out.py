"""Which seeds of simulated frames are for what, and the objects that a model should find in such a frame."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int64

from calib.simulator.frame import SimulatedFrame
from calib.simulator.objects import CLASS_NAMES
from dm3d_deploy.config import DetectorConfig
from dm3d_deploy.errors import UsageError
from dm3d_deploy.evaluation.kitti import KITTI_TYPE
from dm3d_deploy.evaluation.once import ONCE_CLASS
from dm3d_deploy.geometry.boxes import select_boxes
from dm3d_deploy.pointcloud import Boxes3D

# Seeds of frames to train on start here; every lower seed is free for evaluation.
FIRST_TRAINING_SEED = 1 << 40
FIRST_SEED = 1_000_000_000
# Of the scenes on which a build reports AP. No seed of a build reaches them: calibration_set.SEED_OF_ROLE keeps its
# frames off the last 100,000 of every million.
FIRST_SCORE_SEED = 1_000_900_000


def model_labels(config: DetectorConfig) -> Int64[np.ndarray, " classes"]:
    """For each class of the simulator its label in the model, -1 where the model does not know it.

    For a model in KITTI's or ONCE's words the classes are those of the metrics: bicycles are Cyclist, in ONCE
    motorcycles too. Raises UsageError for a model with a class that the simulator does not draw.
    """
    words = {name: name if name in config.class_names else _words(config).get(name, "") for name in CLASS_NAMES}
    strange = [name for name in config.class_names if name not in words.values()]
    if strange:
        raise UsageError(
            f"{config.name} detects {', '.join(strange)}, which no simulated scene holds.",
            fix=f"use a model of {', '.join(CLASS_NAMES)}",
        )
    known = {name: label for label, name in enumerate(config.class_names)}
    return np.array([known.get(words[name], -1) for name in CLASS_NAMES], dtype=np.int64)


def _words(config: DetectorConfig) -> Mapping[str, str]:
    """What the data set of a model calls the simulator's classes."""
    return {"KittiDataset": KITTI_TYPE, "ONCEDataset": ONCE_CLASS}.get(config.dataset, {})


def seen_objects(
    frame: SimulatedFrame, config: DetectorConfig, *, min_points: int
) -> tuple[Boxes3D, Int64[np.ndarray, " boxes"]]:
    """The objects of classes that the model knows, with at least `min_points` points, labelled as the model does."""
    labels = model_labels(config)[frame.labels]
    seen = np.flatnonzero((frame.num_points >= min_points) & (labels >= 0))
    return select_boxes(frame.boxes, seen), labels[seen]
