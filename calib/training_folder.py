"""A folder to train on: every file that can be wrong is looked at before the first step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64

from calib.crops import LabelledFrame
from calib.dataset import POINTS, LabelledFolder, open_dataset, refuse_image
from calib.readers import list_frames, read_points
from dm3d_deploy.config import DetectorConfig
from dm3d_deploy.errors import UsageError
from dm3d_deploy.evaluation.camera import points_in_view
from dm3d_deploy.evaluation.kitti import KITTI_TYPE
from dm3d_deploy.evaluation.nds import NUSCENES_CLASS
from dm3d_deploy.evaluation.once import ONCE_CLASS
from dm3d_deploy.geometry.boxes import points_in_boxes, select_boxes
from dm3d_deploy.pointcloud import Boxes3D, PointCloud

MIN_POINTS = 3
WITHOUT_LABELS = f"move the frames that lack them out of {POINTS}"
# Words of other data sets, in those of the data set that the model was made for.
WORDS = {"KittiDataset": KITTI_TYPE, "NuScenesDataset": NUSCENES_CLASS, "OnceDataset": ONCE_CLASS}


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderFrame:
    """A frame to train on, and all that was labelled in it: -1 is the label of what the model does not look for."""

    labelled: LabelledFrame
    boxes: Boxes3D
    labels: Int64[np.ndarray, " boxes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFolder:
    """The frames of a folder by name; `labels` holds those of each frame's objects, `left_out` counts by word.

    `sizes_m` are mean length, width and height of the classes that occur. `folder` is None where nothing is labelled.
    """

    config: DetectorConfig
    paths: Mapping[str, Path]
    labels: Mapping[str, Int64[np.ndarray, " boxes"]]
    left_out: Mapping[str, int]
    sizes_m: Mapping[str, tuple[float, float, float]]
    folder: LabelledFolder | None

    def read(self, name: str) -> FolderFrame:
        """One frame; FrameError for points that cannot be used."""
        if self.folder is None:
            points = _columns_of(read_points(self.paths[name]), self.config)
            nothing = Boxes3D(
                centre=np.zeros((0, 3), np.float32), size=np.zeros((0, 3), np.float32),
                yaw=np.zeros(0, np.float32), velocity=np.zeros((0, 2), np.float32),
            )  # fmt: skip
            empty = np.zeros(0, np.int64)
            labelled = LabelledFrame(points=points, boxes=nothing, labels=empty, full_scale=None)
            return FolderFrame(labelled=labelled, boxes=nothing, labels=empty)
        frame = self.folder.read(name)
        points, boxes, labels = _columns_of(frame.cloud, self.config), frame.labels.truth.boxes, self.labels[name]
        counts = frame.labels.num_points
        if not frame.labels.all_around:
            # What the camera did not see nobody labelled: trained on, it would teach that no objects are there.
            points = points[points_in_view(frame.labels.camera, points[:, :3])]
            counts = points_in_boxes(points[:, :3], boxes).sum(axis=1)
            unknown = np.full_like(boxes.velocity, np.nan)
            boxes = Boxes3D(centre=boxes.centre, size=boxes.size, yaw=boxes.yaw, velocity=unknown)
        known = np.flatnonzero((labels >= 0) & (counts >= MIN_POINTS))
        labelled = LabelledFrame(points=points, boxes=select_boxes(boxes, known), labels=labels[known], full_scale=None)
        return FolderFrame(labelled=labelled, boxes=boxes, labels=labels)


def open_labelled(path: Path | str, config: DetectorConfig, *, otherwise: str = WITHOUT_LABELS) -> TrainingFolder:
    """A labelled folder in KITTI's layout, every label and the kind of every file looked at.

    Objects of classes that the model does not know are background, and counted in `left_out`; `otherwise` is what
    `open_dataset` offers where labels are missing. Raises what that and reading labels raise, FrameError for an image
    among the points, and UsageError when nothing in the folder is of a class of the model.
    """
    folder = open_dataset(path, otherwise=otherwise)
    label_of = _label_of_word(config)
    labels: dict[str, np.ndarray] = {}
    left_out: Counter[str] = Counter()
    sizes: list[np.ndarray] = []
    for name in folder.names:
        refuse_image(folder.paths[name])
        _, truth = folder.read_truth(name)
        labels[name] = np.array([label_of.get(word.lower(), -1) for word in truth.types], dtype=np.int64)
        sizes.append(truth.boxes.size)
        left_out.update(word for word in truth.types if word.lower() not in label_of)
    if not any((known >= 0).any() for known in labels.values()):
        found = ", ".join(sorted(left_out)) or "nothing"
        raise UsageError(
            f"{path} labels {found}, and {config.name} detects {', '.join(config.class_names)}.",
            fix="use a model of those classes, or rename the classes in the labels",
        )
    sizes_m = _mean_sizes(config, np.concatenate(list(labels.values())), np.concatenate(sizes))
    return TrainingFolder(
        config=config, paths=folder.paths, labels=labels, left_out=dict(left_out), sizes_m=sizes_m, folder=folder
    )


def open_unlabelled(path: Path | str, config: DetectorConfig) -> TrainingFolder:
    """The frames of a folder, labels or not; FrameError where there is none, and for an image among them."""
    paths = {frame.name: frame for frame in list_frames(path)}
    for frame in paths.values():
        refuse_image(frame)
    return TrainingFolder(config=config, paths=paths, labels={}, left_out={}, sizes_m={}, folder=None)


def _mean_sizes(
    config: DetectorConfig, labels: Int64[np.ndarray, " boxes"], sizes: Float32[np.ndarray, "boxes 3"]
) -> dict[str, tuple[float, float, float]]:
    found = {}
    for label, name in enumerate(config.class_names):
        if (labels == label).any():
            length, width, height = sizes[labels == label].mean(axis=0, dtype=np.float64).tolist()
            found[name] = (length, width, height)
    return found


def _label_of_word(config: DetectorConfig) -> dict[str, int]:
    """The model's label for every word that means one of its classes, in lower case."""
    own = {name.lower(): label for label, name in enumerate(config.class_names)}
    other = WORDS.get(config.dataset, {})
    return {**{word: own[name.lower()] for word, name in other.items() if name.lower() in own}, **own}


def _columns_of(cloud: PointCloud, config: DetectorConfig) -> Float32[np.ndarray, "points columns"]:
    """The points in the columns of the model; without a timestamp they are one sweep."""
    rows = len(cloud.points)
    columns = [
        np.zeros(rows, np.float32) if name == "timestamp" and name not in cloud.columns else cloud.column(name)
        for name in config.voxels.columns
    ]
    return np.stack(columns, axis=1)
