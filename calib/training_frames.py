"""Simulated frames as training batches: drawn by their number, cut into crops while they are in hand."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from calib.crops import LARGE_M, SMALL_M, Crop, LabelledFrame, batch_of, crop_of, window_of_step
from calib.held_out import FIRST_TRAINING_SEED, model_labels, seen_objects
from calib.simulator.frame import SimulatedFrame, simulate_frame
from calib.simulator.sensor import sensor_named
from dm3d_deploy.config import DetectorConfig
from dm3d_deploy.errors import UsageError
from dm3d_deploy.training.batch import Batch

MIN_POINTS = 3
POOL = 8  # frames in hand
STEPS_PER_FRAME = 4  # steps until the oldest is replaced: a frame gives about eight crops
# sensor, sweeps (None: as its data set stacks), factors of the rare classes, share of the frames
SOURCES = (
    ("nuscenes32", None, 0.40),
    ("nuscenes32", 1, 0.15),
    ("hdl64", None, 0.30),
    ("once40", None, 0.15),
)
RARE = (1.0, 4.0)


class SimulatedCrops:
    """The batch of each step, from the step's number, the seed and the process alone; frames in hand are a cache."""

    def __init__(self, config: DetectorConfig, *, seed: int, rank: int = 0, crops: int = 2) -> None:
        if crops < 1:
            raise UsageError(f"a batch of {crops} crops is empty.", fix="use one crop or more")
        self._config, self._seed, self._rank, self._crops = config, seed, rank, crops
        model_labels(config)
        self._frames: OrderedDict[int, LabelledFrame] = OrderedDict()

    def __call__(self, step: int) -> Batch:
        """The batch of that step."""
        window, large = window_of_step(self._config, self._seed, step)
        random = np.random.default_rng((self._seed, step, self._rank))
        count = max(1, round(self._crops * (SMALL_M / LARGE_M) ** 2)) if large else self._crops
        newest = step // STEPS_PER_FRAME + POOL - 1
        crops: list[Crop] = []
        while len(crops) < count:
            frame = self._frame(newest - int(random.integers(POOL)))
            crop = crop_of(frame, self._config, window, random, prefer_large=large)
            if crop is not None:
                crops.append(crop)
        for old in [index for index in self._frames if index <= newest - POOL]:
            del self._frames[old]
        return batch_of(crops, self._config, window)

    def _frame(self, index: int) -> LabelledFrame:
        if index not in self._frames:
            self._frames[index] = _draw_frame(self._config, (self._seed, self._rank, index))
        return self._frames[index]


def _draw_frame(config: DetectorConfig, key: tuple[int, int, int]) -> LabelledFrame:
    random = np.random.default_rng(key)
    sensor, sweeps, _ = SOURCES[int(random.choice(len(SOURCES), p=[share for *_, share in SOURCES]))]
    seed = FIRST_TRAINING_SEED + int(random.integers(1 << 40))
    frame = simulate_frame(seed, sensor=sensor, sweeps=sweeps, rare=RARE[int(random.integers(len(RARE)))])
    return labelled(frame, config, min_points=MIN_POINTS)


def labelled(frame: SimulatedFrame, config: DetectorConfig, *, min_points: int) -> LabelledFrame:
    """A simulated frame in the columns of a model, with its objects of at least `min_points` points."""
    rows = len(frame.cloud.points)
    columns = [
        frame.cloud.column(name) if name in frame.cloud.columns else np.zeros(rows, np.float32)
        for name in config.voxels.columns
    ]
    points = np.stack(columns, axis=1)
    full_scale = sensor_named(frame.sensor).intensity_scale
    if "intensity" in config.voxels.columns:
        points[:, config.voxels.columns.index("intensity")] /= full_scale
    boxes, labels = seen_objects(frame, config, min_points=min_points)
    return LabelledFrame(points=points, boxes=boxes, labels=labels, full_scale=full_scale)
