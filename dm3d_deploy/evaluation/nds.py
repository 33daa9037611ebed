"""The nuScenes detection score: mean AP and the errors of what was found (devkit 1.1, detection_cvpr_2019)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from dm3d_deploy.evaluation.nuscenes import (
    CLASS_RANGE_M,
    DEFAULT_RANGE_M,
    DISTANCES_M,
    MIN_RECALL,
    RECALLS,
    NuscenesScore,
    Truth,
    average_precision,
    by_falling_score,
    matched_objects,
    precision_at,
    score_frames,
    within,
)
from dm3d_deploy.evaluation.rows import ApRow
from dm3d_deploy.geometry.boxes import select_boxes, wrap_angle
from dm3d_deploy.pointcloud import Boxes3D, Detections

ERRORS = ("ATE", "ASE", "AOE", "AVE")
ERROR_DISTANCE_M = 2.0
MEAN_AP_WEIGHT = 5
# Cones have no front and do not move; barriers have two fronts and do not move.
WITHOUT = {"traffic_cone": ("AOE", "AVE"), "barrier": ("AVE",)}
HALF_TURN = ("barrier",)
# Other data sets' words for the ten classes; words of neither kind count for no class.
NUSCENES_CLASS = {**{name: name for name in CLASS_RANGE_M}, "van": "car", "cyclist": "bicycle",
                  "person_sitting": "pedestrian"}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class NdsScore:
    """Mean AP, mean errors and NDS over the classes that occur; all 0 to 1 but the errors, which have no bound above.

    ATE in metres, ASE 1 - IoU of aligned boxes, AOE in rad, AVE in m/s. Detections carry no attributes, so the
    attribute error stands in `nds` as 1, its worst: the sum has the devkit's ten parts, one of them empty.
    """

    ap: NuscenesScore
    errors: Mapping[str, float]
    errors_by_class: Mapping[str, Mapping[str, float]]

    @property
    def nds(self) -> float:
        """(5 mAP + sum of max(0, 1 - error)) / 10."""
        kept = sum(max(0.0, 1.0 - error) for error in self.errors.values())
        return (MEAN_AP_WEIGHT * self.ap.mean_ap + kept) / (MEAN_AP_WEIGHT + len(ERRORS) + 1)


def nds_score(detections: Sequence[Detections], truths: Sequence[Truth]) -> NdsScore:
    """NDS of detections against the labels of the same frames; errors as `score_frames`.

    Labels whose velocity is not a number leave it out; where no label of a class has one its AVE is 1.
    """
    ap = score_frames(detections, truths)
    names = detections[0].class_names
    by_class = {
        name: _class_errors(detections, truths, names.index(name), np.pi if name in HALF_TURN else 2 * np.pi)
        for name in ap.classes
    }
    means = {}
    for error in ERRORS:
        values = [by_class[name][error] for name in by_class if error not in WITHOUT.get(name, ())]
        means[error] = float(np.mean(values)) if values else 1.0
    return NdsScore(ap=ap, errors=means, errors_by_class=by_class)


def nuscenes_rows(
    detections: Sequence[Detections], truths: Sequence[Truth], subset: str, limits_m: tuple[float, float]
) -> tuple[ApRow, ...]:
    """AP of each class (mean of 0.5, 1, 2 and 4 m) within horizontal limits; the curve is that of 2 m."""
    rows = []
    recall = np.linspace(0, 1, RECALLS)
    for label, name in enumerate(detections[0].class_names):
        pairs = _pairs(detections, truths, label, limits_m)
        objects = sum(len(truth) for _, _, truth in pairs)
        hits = {d: _matched(pairs, d) >= 0 for d in DISTANCES_M}
        precision = precision_at(recall, hits[ERROR_DISTANCE_M], objects)
        ap = float(np.mean([average_precision(row, objects) for row in hits.values()])) if objects else None
        rows.append(
            ApRow(
                class_name=name,
                subset=subset,
                measure="centre distance",
                objects=objects,
                ap_percent=None if ap is None else 100 * ap,
                recall=tuple(recall.tolist()),
                precision=tuple(precision.tolist()),
            )
        )
    return tuple(rows)


Pair = tuple[Boxes3D, Float64[np.ndarray, " boxes"], Boxes3D]


def _pairs(
    detections: Sequence[Detections], truths: Sequence[Truth], label: int, limits_m: tuple[float, float]
) -> list[Pair]:
    """Of each frame the detections of a class, their scores and its objects, within limits and the class's range."""
    low, high = limits_m
    high = min(high, CLASS_RANGE_M.get(detections[0].class_names[label], DEFAULT_RANGE_M))
    pairs = []
    for found, truth in zip(detections, truths, strict=True):
        rows = np.flatnonzero((found.labels == label) & within(found.boxes, low, high))
        objects = np.flatnonzero((truth.labels == label) & within(truth.boxes, low, high))
        pairs.append(
            (
                select_boxes(found.boxes, rows),
                found.scores[rows].astype(np.float64),
                select_boxes(truth.boxes, objects),
            )
        )
    return pairs


def _matched(pairs: Sequence[Pair], distance_m: float) -> Int64[np.ndarray, " detections"]:
    found = [boxes.centre[:, :2].astype(np.float64) for boxes, _, _ in pairs]
    objects = [boxes.centre[:, :2].astype(np.float64) for _, _, boxes in pairs]
    return matched_objects(found, _scores(pairs), objects, distance_m)


def _scores(pairs: Sequence[Pair]) -> Float64[np.ndarray, " detections"]:
    return np.concatenate([scores for _, scores, _ in pairs])


def _class_errors(
    detections: Sequence[Detections], truths: Sequence[Truth], label: int, period_rad: float
) -> dict[str, float]:
    """Mean errors of the hits within 2 m, each averaged over recalls from 0.1 to the largest reached."""
    pairs = _pairs(detections, truths, label, (0.0, np.inf))
    scores, matched = _scores(pairs), _matched(pairs, ERROR_DISTANCE_M)
    order = by_falling_score(scores)
    hits = np.flatnonzero(matched >= 0)
    if not len(hits):
        return dict.fromkeys(ERRORS, 1.0)
    frame = np.repeat(np.arange(len(pairs)), [len(s) for _, s, _ in pairs])[order[hits]]
    starts = np.cumsum([0] + [len(truth) for _, _, truth in pairs])
    a = _table([found for found, _, _ in pairs])[order[hits]]
    b = _table([truth for _, _, truth in pairs])[starts[frame] + matched[hits]]
    shared = np.minimum(a[:, 3:6], b[:, 3:6]).prod(axis=1)
    turn = np.abs(wrap_angle((a[:, 6] - b[:, 6]) * 2 * np.pi / period_rad)) * period_rad / (2 * np.pi)
    single = {
        "ATE": np.hypot(a[:, 0] - b[:, 0], a[:, 1] - b[:, 1]),
        "ASE": 1 - shared / (a[:, 3:6].prod(axis=1) + b[:, 3:6].prod(axis=1) - shared),
        "AOE": turn,
        "AVE": np.hypot(a[:, 7] - b[:, 7], a[:, 8] - b[:, 8]),
    }
    recall = np.cumsum(matched >= 0) / starts[-1]
    reached = np.interp(np.linspace(0, 1, RECALLS), recall, scores[order], right=0)
    return {name: _over_recall(values, scores[order[hits]], reached) for name, values in single.items()}


def _over_recall(values: np.ndarray, scores: np.ndarray, reached: np.ndarray) -> float:
    """The running mean of `values` at the scores of each recall, averaged (devkit: accumulate, calc_tp)."""
    known = ~np.isnan(values)
    counts = np.cumsum(known)
    running = np.divide(np.nancumsum(values), counts, out=np.zeros(len(values)), where=counts > 0)
    if not known.any():
        running[:] = 1.0
    at = np.interp(reached[::-1], scores[::-1], running[::-1])[::-1]
    first = round((RECALLS - 1) * MIN_RECALL) + 1
    last = int(np.flatnonzero(reached)[-1]) if reached.any() else 0
    return float(at[first : last + 1].mean()) if last >= first else 1.0


def _table(sides: Sequence[Boxes3D]) -> Float64[np.ndarray, "boxes 9"]:
    """Centre, size, yaw and velocity of the boxes of all frames."""
    parts = [np.concatenate([b.centre, b.size, b.yaw[:, None], b.velocity], axis=1, dtype=np.float64) for b in sides]
    return np.concatenate(parts)
