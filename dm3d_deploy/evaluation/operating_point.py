"""What one score threshold gives: the share of objects found, with its interval, and false positives a frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from dm3d_deploy.errors import InternalError
from dm3d_deploy.evaluation.benchmarks import in_labelled_view, visible
from dm3d_deploy.evaluation.kitti import NEIGHBOUR
from dm3d_deploy.evaluation.labels import FrameLabels
from dm3d_deploy.evaluation.nds import NUSCENES_CLASS
from dm3d_deploy.evaluation.nuscenes import by_falling_score, matched_objects, within
from dm3d_deploy.geometry.boxes import select_boxes
from dm3d_deploy.pointcloud import Boxes3D, Detections

NEIGHBOURS = tuple(name.lower() for name in NEIGHBOUR.values())
CONFIDENCE = 1.959964  # two-sided 95 % of the normal distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatingPoint:
    """Counts at one threshold."""

    threshold: float
    frames: int
    objects: int
    hits: int
    false_positives: int

    @property
    def recall(self) -> float:
        """The share of objects that were found; NaN without objects."""
        return self.hits / self.objects if self.objects else math.nan

    @property
    def recall_interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the recall, objects taken as independent; (0, 1) without objects."""
        if not self.objects:
            return 0.0, 1.0
        square = CONFIDENCE**2
        middle = (self.hits + square / 2) / (self.objects + square)
        spread = self.hits * (self.objects - self.hits) / self.objects + square / 4
        half = CONFIDENCE * math.sqrt(spread) / (self.objects + square)
        return max(0.0, middle - half), min(1.0, middle + half)

    @property
    def false_positives_per_frame(self) -> float:
        """Detections that match nothing, per frame."""
        return self.false_positives / self.frames


def operating_point(
    found: Sequence[Detections],
    labels: Sequence[FrameLabels],
    *,
    class_name: str,
    threshold: float,
    within_m: float,
    distance_m: float = 2.0,
) -> OperatingPoint:
    """Count hits and false positives of a class (nuScenes' word) within a horizontal range.

    Detections of at least `threshold` take the nearest free object by falling score, if its centre lies nearer than
    `distance_m`. Vans beside cars, sitting persons beside pedestrians, objects beyond the range and those with too few
    points are not missed, and what finds them is not false. Detections that `in_labelled_view` leaves out do not count.
    """
    if len(found) != len(labels) or not found:
        raise InternalError(f"{len(found)} frames of detections and {len(labels)} of labels cannot be compared")
    objects = hits = false = 0
    for detections, frame in zip(found, labels, strict=True):
        boxes, scores = _sure(in_labelled_view(detections, frame), class_name, threshold)
        words = [word.lower() for word in frame.truth.types]
        rows = np.flatnonzero([NUSCENES_CLASS.get(word) == class_name for word in words])
        known = select_boxes(frame.truth.boxes, rows)
        whole = np.array([words[row] not in NEIGHBOURS for row in rows], dtype=bool)
        counted = whole & visible(frame)[rows] & within(known, 0.0, within_m)
        matched = matched_objects([_places(boxes)], scores, [_places(known)], distance_m)
        near = within(boxes, 0.0, within_m)[by_falling_score(scores)]
        objects += int(counted.sum())
        hits += int(counted[matched[matched >= 0]].sum())
        false += int((near & (matched < 0)).sum())
    return OperatingPoint(threshold=threshold, frames=len(found), objects=objects, hits=hits, false_positives=false)


def _sure(found: Detections, class_name: str, threshold: float) -> tuple[Boxes3D, Float64[np.ndarray, " boxes"]]:
    own = [NUSCENES_CLASS.get(found.class_names[label].lower()) == class_name for label in found.labels]
    rows = np.flatnonzero(np.array(own, dtype=bool) & (found.scores >= threshold))
    return select_boxes(found.boxes, rows), found.scores[rows].astype(np.float64)


def _places(boxes: Boxes3D) -> Float64[np.ndarray, "boxes 2"]:
    return boxes.centre[:, :2].astype(np.float64)
