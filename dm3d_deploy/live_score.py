"""Average precision while a training runs, on a few frames that it does not see and no report uses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from calib.calibration_set import SENSOR_OF_DATASET
from calib.dataset import DatasetFrame
from calib.simulated_dataset import labelled_frame
from calib.simulator import simulate_frame
from dm3d_deploy.config import DetectorConfig
from dm3d_deploy.detect_in_torch import detect_in_torch
from dm3d_deploy.errors import UsageError
from dm3d_deploy.evaluation.benchmarks import Scores, benchmark_scores
from dm3d_deploy.evaluation.rows import ALL
from dm3d_deploy.pointcloud import Boxes3D, Detections
from dm3d_deploy.training.stop import Stop

if TYPE_CHECKING:
    from dm3d_deploy.models.detector import Detector

# Seeds that neither training, nor a build, nor a reported evaluation draws (calib/held_out.py, calibration_set.py).
FIRST_LIVE_SEED = 2_000_900_000
SIMULATED_FRAMES = 8
HELD_BACK_SHARE, MOST_HELD_BACK = 0.1, 20
METRIC, MEASURE, MEAN = "nuscenes", "centre distance", "mean"


def simulated_live_frames(config: DetectorConfig, count: int = SIMULATED_FRAMES) -> tuple[DatasetFrame, ...]:
    """Full simulated frames of the sensor of the model's data set."""
    sensor = SENSOR_OF_DATASET.get(config.dataset, "nuscenes32")
    seeds = range(FIRST_LIVE_SEED, FIRST_LIVE_SEED + count)
    return tuple(labelled_frame(simulate_frame(seed, sensor=sensor)) for seed in seeds)


def split_names(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The frames to train on, and the last tenth, at most 20, to score on; UsageError for a single frame."""
    count = min(max(int(HELD_BACK_SHARE * len(names)), 1), MOST_HELD_BACK)
    if count >= len(names):
        raise UsageError(
            f"a folder of {len(names)} frame cannot spare one to score on.",
            fix="use two or more; only train can do without a score: --score-every 0",
        )
    return tuple(names[:-count]), tuple(names[-count:])


class LiveScore:
    """AP by class and its mean (percent, nuScenes centre distance) of a detector on frames that are read once."""

    def __init__(self, read: Callable[[], Sequence[DatasetFrame]], stop: Stop) -> None:
        self._frames, self._stop = functools.cache(read), stop

    def check(self, config: DetectorConfig) -> None:
        """Raise UsageError where the frames hold nothing that the model could find."""
        self._scores([_nothing(config)] * len(self._frames()))

    def __call__(self, detector: Detector) -> Mapping[str, float | None] | None:
        """The score, or None where the training was asked to stop; the detector is in eval mode, on whatever device."""
        found: list[Detections] = []
        for frame in self._frames():
            if self._stop.asked:
                return None
            found.append(detect_in_torch(detector, frame.cloud))
        scores = self._scores(found)
        rows = [row for row in scores.rows if (row.measure, row.subset) == (MEASURE, ALL) and row.objects]
        return {MEAN: scores.summary["mAP"], **{row.class_name: row.ap_percent for row in rows}}

    def _scores(self, found: Sequence[Detections]) -> Scores:
        return benchmark_scores(METRIC, found, [frame.labels for frame in self._frames()])


def _nothing(config: DetectorConfig) -> Detections:
    return Detections(
        boxes=Boxes3D(
            centre=np.zeros((0, 3), np.float32), size=np.zeros((0, 3), np.float32),
            yaw=np.zeros(0, np.float32), velocity=np.zeros((0, 2), np.float32),
        ),
        scores=np.zeros(0, np.float32), labels=np.zeros(0, np.int64), class_names=config.class_names,
    )  # fmt: skip
