"""Average precision by centre distance, as the nuScenes detection task counts it (devkit 1.1, detection_cvpr_2019)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from dm3d_deploy.errors import InternalError
from dm3d_deploy.pointcloud import Boxes3D, Detections

DISTANCES_M = (0.5, 1.0, 2.0, 4.0)
CLASS_RANGE_M = {
    "car": 50.0,
    "truck": 50.0,
    "construction_vehicle": 50.0,
    "bus": 50.0,
    "trailer": 50.0,
    "barrier": 30.0,
    "motorcycle": 40.0,
    "bicycle": 40.0,
    "pedestrian": 40.0,
    "traffic_cone": 30.0,
}
DEFAULT_RANGE_M = 50.0
RECALLS = 101
MIN_RECALL = 0.1
MIN_PRECISION = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """The labelled objects of one frame; labels are 0-based into the class names of the detections."""

    boxes: Boxes3D
    labels: Int64[np.ndarray, " boxes"]

    def __post_init__(self) -> None:
        if len(self.boxes) != len(self.labels):
            raise InternalError(f"{len(self.boxes)} boxes have {len(self.labels)} labels")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScore:
    """One class: how many objects there were, and the average precision at each distance (m) for a match."""

    objects: int
    detections: int
    ap_at_m: Mapping[float, float]

    @property
    def ap(self) -> float:
        """The mean over the distances."""
        return float(np.mean(list(self.ap_at_m.values())))


@dataclass(frozen=True, slots=True, kw_only=True)
class NuscenesScore:
    """The scores of every class that has at least one object in the frames."""

    frames: int
    classes: Mapping[str, ClassScore]

    @property
    def mean_ap(self) -> float:
        """MAP over the classes that occur; a class without an object says nothing."""
        return float(np.mean([score.ap for score in self.classes.values()]))


def score_frames(
    detections: Sequence[Detections], truths: Sequence[Truth], *, between_m: tuple[float, float] | None = None
) -> NuscenesScore:
    """Centre-distance AP of every class that occurs.

    Boxes count whose horizontal distance from the sensor is within the class range of nuScenes (50 m for a class that
    it does not know), or in `between_m` where that is narrower. Raises InternalError when there is no frame, no
    object, or not one truth per frame.
    """
    if len(detections) != len(truths) or not detections:
        raise InternalError(f"{len(detections)} frames of detections and {len(truths)} of truth cannot be compared")
    names = detections[0].class_names
    classes = {}
    for label, name in enumerate(names):
        low, high = between_m or (0.0, np.inf)
        high = min(high, CLASS_RANGE_M.get(name, DEFAULT_RANGE_M))
        objects = [t.boxes.centre[(t.labels == label) & within(t.boxes, low, high), :2] for t in truths]
        if not sum(map(len, objects)):
            continue
        chosen = [(d.labels == label) & within(d.boxes, low, high) for d in detections]
        found = [d.boxes.centre[rows, :2] for d, rows in zip(detections, chosen, strict=True)]
        scores = np.concatenate([d.scores[rows] for d, rows in zip(detections, chosen, strict=True)])
        classes[name] = _class_score(found, scores.astype(np.float64), objects)
    if not classes:
        raise InternalError(f"{len(truths)} frames hold no object to find")
    return NuscenesScore(frames=len(truths), classes=classes)


def average_precision(hits: Bool[np.ndarray, " detections"], objects: int) -> float:
    """AP from hits in the order of falling scores.

    Precision is read at 101 recalls; recalls up to 0.1 are left out, and precision counts above 0.1 (devkit: calc_ap).
    """
    at = precision_at(np.linspace(0, 1, RECALLS), hits, objects)
    kept = at[round((RECALLS - 1) * MIN_RECALL) + 1 :] - MIN_PRECISION
    return float(np.maximum(kept, 0).mean() / (1 - MIN_PRECISION))


def precision_at(
    recalls: Float64[np.ndarray, " recalls"], hits: Bool[np.ndarray, " detections"], objects: int
) -> Float64[np.ndarray, " recalls"]:
    """Precision by linear interpolation, 0 beyond the largest recall; unlike VOC not made monotone (accumulate)."""
    if not hits.any():
        return np.zeros_like(recalls)
    true = np.cumsum(hits).astype(np.float64)
    precision = true / np.arange(1, len(hits) + 1)
    at: Float64[np.ndarray, " recalls"] = np.interp(recalls, true / objects, precision, right=0)
    return at


def match_by_distance(
    found: Sequence[Float64[np.ndarray, "boxes 2"]],
    scores: Float64[np.ndarray, " detections"],
    objects: Sequence[Float64[np.ndarray, "objects 2"]],
    distance_m: float,
) -> Bool[np.ndarray, " detections"]:
    """Which detections hit, in the order of falling scores over all frames, as `matched_objects` pairs them."""
    return matched_objects(found, scores, objects, distance_m) >= 0


def matched_objects(
    found: Sequence[Float64[np.ndarray, "boxes 2"]],
    scores: Float64[np.ndarray, " detections"],
    objects: Sequence[Float64[np.ndarray, "objects 2"]],
    distance_m: float,
) -> Int64[np.ndarray, " detections"]:
    """The object of its frame that each detection hits, -1 for none, in the order `by_falling_score`.

    Each takes the nearest object of its frame that no better one took, if that is nearer than `distance_m`.
    """
    frame = np.repeat(np.arange(len(found)), [len(f) for f in found])
    row = np.concatenate([np.arange(len(f)) for f in found])
    free = [np.ones(len(o), dtype=bool) for o in objects]
    matched = np.full(len(scores), -1, dtype=np.int64)
    for place, index in enumerate(by_falling_score(scores)):
        at = frame[index]
        if not free[at].any():
            continue
        away = np.where(free[at], np.hypot(*(objects[at] - found[at][row[index]]).T), np.inf)
        nearest = int(np.argmin(away))
        if away[nearest] < distance_m:
            free[at][nearest] = False
            matched[place] = nearest
    return matched


def by_falling_score(scores: Float64[np.ndarray, " detections"]) -> Int64[np.ndarray, " detections"]:
    """Indices of the detections, best first; of equal scores the later comes first, as in the devkit."""
    return np.argsort(scores, kind="stable")[::-1]


def _class_score(found: list[np.ndarray], scores: np.ndarray, objects: list[np.ndarray]) -> ClassScore:
    found = [f.astype(np.float64) for f in found]
    objects = [o.astype(np.float64) for o in objects]
    count = sum(map(len, objects))
    at = {d: average_precision(match_by_distance(found, scores, objects, d), count) for d in DISTANCES_M}
    return ClassScore(objects=count, detections=len(scores), ap_at_m=at)


def within(boxes: Boxes3D, low_m: float, high_m: float) -> Bool[np.ndarray, " boxes"]:
    """Which boxes lie at a horizontal distance from the sensor of at least `low_m` and less than `high_m`."""
    away = np.hypot(boxes.centre[:, 0], boxes.centre[:, 1])
    inside: np.ndarray = (away >= low_m) & (away < high_m)
    return inside
