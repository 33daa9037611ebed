"""Objects of other frames pasted into a frame where nothing stands (Yan et al. 2018, SECOND, section 3.3)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from calib.crops import LabelledFrame
from calib.training_folder import FolderFrame, TrainingFolder
from dm3d_deploy.geometry.boxes import iou_bev_matrix, points_in_boxes, select_boxes
from dm3d_deploy.pointcloud import Boxes3D

DRAWS = 12  # objects tried in a frame
MIN_POINTS = 5
FRAMES_IN_HAND = 256  # whose objects, not whose points, are kept


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """The objects of one frame: boxes, and the points in each."""

    boxes: Boxes3D
    points: tuple[Float32[np.ndarray, "points columns"], ...]


class ObjectBank:
    """The objects of the frames `names` by class; what is kept in memory changes no answer."""

    def __init__(self, folder: TrainingFolder, names: Sequence[str]) -> None:
        self._folder = folder
        self._cuts: OrderedDict[str, _Cut] = OrderedDict()
        places = [(name, row, int(label)) for name in names for row, label in enumerate(folder.labels[name])]
        classes = sorted({label for *_, label in places if label >= 0})
        self._of_class = {label: [(name, row) for name, row, own in places if own == label] for label in classes}

    def paste(self, name: str, frame: FolderFrame, random: np.random.Generator) -> LabelledFrame:
        """The frame with objects of other frames, where they stood there, on ground that no labelled box covers.

        Every class is drawn equally often, so rare ones are pasted most. Points of the frame inside a pasted box go.
        """
        taken, old = frame.boxes, frame.labelled
        boxes, labels, points = [], [], []
        for _ in range(DRAWS):
            label = list(self._of_class)[int(random.integers(len(self._of_class)))]
            places = self._of_class[label]
            other, row = places[int(random.integers(len(places)))]
            if other == name:
                continue
            cut = self._cut(other)
            box = select_boxes(cut.boxes, np.array([row]))
            if len(cut.points[row]) < MIN_POINTS or (iou_bev_matrix(box, taken) > 0).any():
                continue
            taken = _joined([taken, box])
            boxes.append(box)
            labels.append(label)
            points.append(cut.points[row])
        if not boxes:
            return old
        covered = points_in_boxes(old.points[:, :3], _joined(boxes)).any(axis=0)
        return LabelledFrame(
            points=np.concatenate([old.points[~covered], *points]),
            boxes=_joined([old.boxes, *boxes]),
            labels=np.concatenate([old.labels, np.array(labels, dtype=np.int64)]),
            full_scale=old.full_scale,
        )

    def _cut(self, name: str) -> _Cut:
        if name not in self._cuts:
            frame = self._folder.read(name)
            points = frame.labelled.points
            inside = points_in_boxes(points[:, :3], frame.boxes)
            self._cuts[name] = _Cut(boxes=frame.boxes, points=tuple(points[row] for row in inside))
        self._cuts.move_to_end(name)
        while len(self._cuts) > FRAMES_IN_HAND:
            self._cuts.popitem(last=False)
        return self._cuts[name]


def _joined(parts: Sequence[Boxes3D]) -> Boxes3D:
    return Boxes3D(
        centre=np.concatenate([part.centre for part in parts]),
        size=np.concatenate([part.size for part in parts]),
        yaw=np.concatenate([part.yaw for part in parts]),
        velocity=np.concatenate([part.velocity for part in parts]),
    )
