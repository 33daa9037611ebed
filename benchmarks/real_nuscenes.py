"""Cars and pedestrians in nuScenes keyframes at scores from simulated ones: `python -m benchmarks.real_nuscenes DIR`.

DIR holds keyframes (`*LIDAR_TOP*.pcd.bin`, one sweep each) and info files (`*.pkl`) of mmdetection3d, older or newer.
An info file may name arrays and numbers only: what else it would call is refused. Scores as in benchmarks.real_frames,
on simulated single sweeps of `nuscenes32`.
"""

from __future__ import annotations

import argparse
import io
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.real_frames import FIRST_SEED, WITHIN_M, detected, lowest_score, told
from calib.dataset import DatasetFrame
from calib.readers import read_points
from calib.simulated_dataset import camera_of, labelled_frame
from calib.simulator import SENSORS, simulate_frame
from dm3d_deploy.config import load_config
from dm3d_deploy.evaluation.kitti import KittiTruth
from dm3d_deploy.evaluation.labels import FrameLabels
from dm3d_deploy.evaluation.operating_point import operating_point
from dm3d_deploy.models.bundled import bundled_weights
from dm3d_deploy.models.checkpoints import load_checkpoint
from dm3d_deploy.models.detector import build_detector
from dm3d_deploy.pointcloud import Boxes3D

SENSOR = "nuscenes32"
SUFFIX = ".pcd.bin"
CLASSES = ("car", "pedestrian")
ARRAYS = {
    (module, name)
    for package in ("numpy.core", "numpy._core")
    for module, name in ((f"{package}.multiarray", "_reconstruct"), (f"{package}.multiarray", "scalar"))
} | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}  # Python 2's bytes, turned from text


class _Arrays(pickle.Unpickler):
    """Opens pickles of plain values and numpy arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"an info file may not call {module}.{name}")
        return super().find_class(module, name)


def arrays_from(content: bytes) -> Any:
    """What a pickle of plain values and numpy arrays holds; UnpicklingError for any other."""
    return _Arrays(io.BytesIO(content)).load()


def labelled_keyframes(folder: Path) -> Iterator[DatasetFrame]:
    """Every keyframe of a folder that an info file labels."""
    for file in sorted(folder.glob("*.pkl")):
        info = arrays_from(file.read_bytes())
        for path, boxes, types, counts in _newer(info) if "data_list" in info else _older(info):
            name = path.rsplit("/", 1)[-1].removesuffix(SUFFIX)
            points = folder / f"{name}{SUFFIX}"
            if points.is_file():
                yield DatasetFrame(name=name, cloud=read_points(points), labels=_labels(boxes, types, counts))


def _older(info: Any) -> Iterator[tuple[str, Boxes3D, list[str], np.ndarray]]:
    """Boxes as x, y, z, width, length, height and a yaw that turns the other way."""
    for row in info["infos"]:
        table = np.asarray(row["gt_boxes"]).reshape(-1, 7)
        boxes = _boxes(table[:, :3], table[:, [4, 3, 5]], -table[:, 6] - np.pi / 2)
        yield row["lidar_path"], boxes, [str(name) for name in row["gt_names"]], np.asarray(row["num_lidar_pts"])


def _newer(info: Any) -> Iterator[tuple[str, Boxes3D, list[str], np.ndarray]]:
    words = list(info["metainfo"]["categories"])
    for row in info["data_list"]:
        table = np.array([box["bbox_3d"] for box in row["instances"]]).reshape(-1, 7)
        types = [words[box["bbox_label_3d"]] for box in row["instances"]]
        counts = np.array([box["num_lidar_pts"] for box in row["instances"]])
        yield row["lidar_points"]["lidar_path"], _boxes(table[:, :3], table[:, 3:6], table[:, 6]), types, counts


def _boxes(centre: np.ndarray, size: np.ndarray, yaw: np.ndarray) -> Boxes3D:
    parts = (np.asarray(part, dtype=np.float32) for part in (centre, size, yaw, np.zeros((len(yaw), 2))))
    return Boxes3D(**dict(zip(("centre", "size", "yaw", "velocity"), parts, strict=True)))


def _labels(boxes: Boxes3D, types: list[str], counts: np.ndarray) -> FrameLabels:
    """All around, as the data set labels it; image boxes play no part."""
    nothing = np.zeros(len(boxes))
    truth = KittiTruth(
        boxes=boxes, types=tuple(types), image_px=np.zeros((len(boxes), 4)), truncation=nothing,
        occlusion=nothing.astype(np.int64), dont_care_px=np.zeros((0, 4)),
    )  # fmt: skip
    return FrameLabels(
        truth=truth, num_points=counts.astype(np.int64), camera=camera_of(SENSORS[SENSOR]), all_around=True
    )


def main() -> None:
    """Print each class's score, and what it gives on simulated and on real frames."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="centerpoint")
    parser.add_argument("--frames", type=int, default=30, help="simulated ones")
    parser.add_argument("--false", type=float, default=1.25, help="of a class that a simulated frame may show")
    asked = parser.parse_args()
    weights = bundled_weights(asked.model)
    if weights is None:
        sys.exit(f"{asked.model} has no bundled weights")
    torch.set_num_threads(1)
    detector = build_detector(load_config(asked.model))
    load_checkpoint(detector, weights)
    drawn = (labelled_frame(simulate_frame(FIRST_SEED + i, sensor=SENSOR, sweeps=1)) for i in range(asked.frames))
    simulated = detected(detector, drawn, camera_only=False)
    real = detected(detector, labelled_keyframes(asked.folder), camera_only=False)
    if not real[0]:
        sys.exit(f"{asked.folder} holds no keyframe that one of its info files labels")
    print(f"{asked.model}, single sweeps, within {WITHIN_M:g} m, all around")
    for name in CLASSES:
        point = lowest_score(*simulated, asked.false, name)
        print(f"{name}, score {point.threshold:.2f}: {told('simulated', point, name)}")
        found = operating_point(*real, class_name=name, threshold=point.threshold, within_m=WITHIN_M)
        print(f"{name}, score {point.threshold:.2f}: {told('real', found, name)}")


if __name__ == "__main__":
    main()
