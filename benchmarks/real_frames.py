"""Cars in real KITTI frames at a score fixed on simulated ones: `python -m benchmarks.real_frames FOLDER --names A,B`.

The score is the lowest at which simulated hdl64 frames show `--false` cars a frame that are none, in the same camera's
view and range; no real frame has a part in it. Prints one line a model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from calib.dataset import DatasetFrame, open_dataset
from calib.simulated_dataset import labelled_frame
from calib.simulator import simulate_frame
from dm3d_deploy.config import load_config
from dm3d_deploy.detect_in_torch import detect_in_torch
from dm3d_deploy.evaluation.labels import FrameLabels
from dm3d_deploy.evaluation.operating_point import OperatingPoint, operating_point
from dm3d_deploy.models.bundled import bundled_weights
from dm3d_deploy.models.checkpoints import load_checkpoint
from dm3d_deploy.models.detector import Detector, build_detector
from dm3d_deploy.pointcloud import Detections

FIRST_SEED = 2_100_000_000
WITHIN_M = 40.0


def detected(
    detector: Detector, frames: Iterable[DatasetFrame], *, camera_only: bool
) -> tuple[list[Detections], list[FrameLabels]]:
    """Detections and labels of every frame; with `camera_only` simulated frames count in the camera's view alone."""
    found, labels = [], []
    for frame in frames:
        found.append(detect_in_torch(detector, frame.cloud))
        labels.append(replace(frame.labels, all_around=False) if camera_only else frame.labels)
    return found, labels


def lowest_score(
    found: list[Detections], labels: list[FrameLabels], most_false: float, class_name: str = "car"
) -> OperatingPoint:
    """The operating point with the lowest score, in steps of 0.01, that shows no more than `most_false` a frame."""
    for threshold in np.arange(0.05, 1.0, 0.01):
        point = operating_point(found, labels, class_name=class_name, threshold=float(threshold), within_m=WITHIN_M)
        if point.false_positives_per_frame <= most_false:
            return point
    raise SystemExit(f"no score leaves {most_false} false {class_name}s a frame or fewer")


def told(where: str, point: OperatingPoint, class_name: str = "car") -> str:
    """One operating point in words."""
    low, high = point.recall_interval
    return (
        f"{where}: {point.hits} of {point.objects} {class_name}s ({point.recall:.2f}, 95 % {low:.2f} to {high:.2f}), "
        f"{point.false_positives_per_frame:.2f} false a frame, {point.frames} frames"
    )


def main() -> None:
    """Print the score, and what it gives on simulated and on real frames."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="KITTI's layout")
    parser.add_argument("--names", required=True, help="frames to report, comma-separated")
    parser.add_argument("--model", default="centerpoint")
    parser.add_argument("--checkpoint", type=Path, help="[default: the bundled weights]")
    parser.add_argument("--frames", type=int, default=30, help="simulated ones")
    parser.add_argument("--false", type=float, default=1.25, help="cars a simulated frame that are none, at most")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    detector = build_detector(load_config(asked.model))
    weights = asked.checkpoint or bundled_weights(asked.model)
    if weights is None:
        sys.exit(f"{asked.model} has no bundled weights; name some with --checkpoint")
    load_checkpoint(detector, weights)
    drawn = (labelled_frame(simulate_frame(FIRST_SEED + i, sensor="hdl64")) for i in range(asked.frames))
    point = lowest_score(*detected(detector, drawn, camera_only=True), asked.false)
    folder = open_dataset(asked.folder, tuple(asked.names.split(",")))
    real = detected(detector, map(folder.read, folder.names), camera_only=False)
    print(f"{asked.model}, score {point.threshold:.2f}, within {WITHIN_M:g} m")
    print(told("simulated", point))
    print(told("real", operating_point(*real, class_name="car", threshold=point.threshold, within_m=WITHIN_M)))


if __name__ == "__main__":
    main()
