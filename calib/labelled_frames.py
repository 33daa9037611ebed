"""Labelled frames by a description that another process can read, and their labels as arrays that it can hand back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from calib.dataset import DatasetFrame, open_dataset
from calib.simulated_dataset import labelled_frame
from calib.simulator import simulate_frame
from dm3d_deploy.evaluation.camera import Camera
from dm3d_deploy.evaluation.kitti import KittiTruth
from dm3d_deploy.evaluation.labels import FrameLabels
from dm3d_deploy.pointcloud import Boxes3D


def read_labelled(source: Mapping[str, Any], index: int) -> DatasetFrame:
    """Frame `index` of a "folder" and the "names" of its frames, or of a simulated "sensor" from a "seed" on.

    Raises what opening and reading the folder raises.
    """
    if "sensor" in source:
        return labelled_frame(simulate_frame(source["seed"] + index, sensor=source["sensor"]))
    name = source["names"][index]
    return open_dataset(source["folder"], (name,)).read(name)


def arrays_from_labels(labels: FrameLabels) -> dict[str, np.ndarray]:
    """The labels of a frame as arrays "label.FIELD", types as UTF-8 with a line each."""
    truth, boxes, camera = labels.truth, labels.truth.boxes, labels.camera
    fields = {
        "centre": boxes.centre,
        "size": boxes.size,
        "yaw": boxes.yaw,
        "velocity": boxes.velocity,
        "types": np.frombuffer("\n".join(truth.types).encode(), np.uint8),
        "image_px": truth.image_px,
        "truncation": truth.truncation,
        "occlusion": truth.occlusion,
        "dont_care_px": truth.dont_care_px,
        "num_points": labels.num_points,
        "projection": camera.projection,
        "from_lidar": camera.from_lidar,
        "camera_px": np.array([camera.width_px, camera.height_px]),
        "all_around": np.array([labels.all_around]),
    }
    return {f"label.{name}": array for name, array in fields.items()}


def labels_from_arrays(arrays: Mapping[str, np.ndarray]) -> FrameLabels:
    """The labels that `arrays_from_labels` turned into arrays."""
    of = {name.removeprefix("label."): array for name, array in arrays.items() if name.startswith("label.")}
    width, height = of["camera_px"].tolist()
    truth = KittiTruth(
        boxes=Boxes3D(centre=of["centre"], size=of["size"], yaw=of["yaw"], velocity=of["velocity"]),
        types=tuple(of["types"].tobytes().decode().split("\n")) if len(of["types"]) else (),
        image_px=of["image_px"],
        truncation=of["truncation"],
        occlusion=of["occlusion"],
        dont_care_px=of["dont_care_px"],
    )
    camera = Camera(projection=of["projection"], from_lidar=of["from_lidar"], width_px=width, height_px=height)
    return FrameLabels(
        truth=truth, num_points=of["num_points"], camera=camera, all_around=bool(of["all_around"].item())
    )
