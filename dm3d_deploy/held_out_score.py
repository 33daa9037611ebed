"""What weights find in simulated scenes that no training, no calibration and no choice saw."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from calib.calibration_set import SENSOR_OF_DATASET
from calib.held_out import FIRST_SCORE_SEED
from calib.pool import FrameJob, FramePool
from calib.simulated_dataset import labelled_frame
from calib.simulator import simulate_frame
from dm3d_deploy.artifacts import write_tensors
from dm3d_deploy.config import DetectorConfig
from dm3d_deploy.evaluation.labels import FrameLabels
from dm3d_deploy.geometry.voxelize import voxelize
from dm3d_deploy.pointcloud import Boxes3D, Detections


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenes:
    """Simulated frames: their voxels in a file as frame workers read it, and their labels."""

    file: Path
    sensor: str
    first_seed: int
    labels: tuple[FrameLabels, ...]

    @property
    def words(self) -> str:
        """What a table calls them."""
        last = self.first_seed + len(self.labels) - 1
        return f"{len(self.labels)} simulated {self.sensor} scenes, seeds {self.first_seed} to {last}"


def simulate_scenes(
    file: Path,
    config: DetectorConfig,
    *,
    frames: int,
    first_seed: int = FIRST_SCORE_SEED,
    advanced: Callable[[int], None],
) -> Scenes:
    """Draw frames of the sensor of the model's data set and write their voxels; `advanced` gets the number done."""
    sensor = SENSOR_OF_DATASET[config.dataset]
    arrays: dict[str, np.ndarray] = {}
    labels = []
    for index in range(frames):
        frame = labelled_frame(simulate_frame(first_seed + index, sensor=sensor))
        voxels = voxelize(frame.cloud, config)
        arrays[f"{index}.features"] = voxels.features
        arrays[f"{index}.coords"] = voxels.coords.astype(np.int16)
        if voxels.points is not None:
            arrays[f"{index}.points"] = voxels.points
        labels.append(frame.labels)
        advanced(index + 1)
    write_tensors(file, arrays)
    return Scenes(file=file, sensor=sensor, first_seed=first_seed, labels=tuple(labels))


def detect_scenes(
    scenes: Scenes,
    weights: Path,
    config: DetectorConfig,
    pool: FramePool,
    *,
    folder: Path,
    advanced: Callable[[int], None],
) -> list[Detections]:
    """Detections of the torch detector with these weights, in each scene; `folder` is scratch.

    Raises CheckpointError for weights that do not fit the model.
    """
    job = FrameJob(
        kind="detections",
        config_text=config.text,
        weights=str(weights.resolve()),
        frames_file=str(scenes.file.resolve()),
        frames=tuple(range(len(scenes.labels))),
        out_dir=str(folder.resolve()),
        settings={},
    )
    files = pool.run(job, advanced=lambda done, _: advanced(done))
    found = [detections_from_arrays(load_file(file), config) for file in files]
    shutil.rmtree(folder)
    return found


def detections_from_arrays(arrays: Mapping[str, np.ndarray], config: DetectorConfig) -> Detections:
    """The detections that a frame worker left ("detections" of calib.frame_worker)."""
    table = arrays["boxes"]
    boxes = Boxes3D(centre=table[:, :3], size=table[:, 3:6], yaw=table[:, 6], velocity=table[:, 7:9])
    return Detections(boxes=boxes, scores=arrays["scores"], labels=arrays["labels"], class_names=config.class_names)
