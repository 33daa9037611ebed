"""Two sets of detections of the same frames: which box is which, how far apart, and whether that is good enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float64, Int64

from dm3d_deploy.config import DetectorConfig, PostConfig
from dm3d_deploy.errors import InternalError
from dm3d_deploy.evidence import Comparison, Tolerance, compare_arrays
from dm3d_deploy.geometry.boxes import iou_bev_matrix, select_boxes, wrap_angle
from dm3d_deploy.pointcloud import Detections

RANGE_EDGES_M = (0.0, 15.0, 30.0, 50.0, math.inf)
LIMIT_OF = {
    "centre_delta_m": "centre_m",
    "size_delta_m": "size_m",
    "yaw_delta_rad": "yaw_rad",
    "velocity_delta_mps": "velocity_mps",
    "score_delta": "score",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Matching:
    """Pairs (reference index, candidate index), what each side has alone, and the differences pair by pair.

    Centre: distance of the centres. Size: the largest of the three. Yaw: modulo 2 pi. Velocity: length of the
    difference.
    """

    pairs: Int64[np.ndarray, "pairs 2"]
    missing: Int64[np.ndarray, " missing"]
    extra: Int64[np.ndarray, " extra"]
    centre_delta_m: Float64[np.ndarray, " pairs"]
    size_delta_m: Float64[np.ndarray, " pairs"]
    yaw_delta_rad: Float64[np.ndarray, " pairs"]
    velocity_delta_mps: Float64[np.ndarray, " pairs"]
    score_delta: Float64[np.ndarray, " pairs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeRow:
    """Boxes of one class between two horizontal distances from the sensor (m)."""

    class_name: str
    from_m: float
    to_m: float
    reference: int
    missing: int
    extra: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxTolerance:
    """How far a matched box may differ in each respect. There are no defaults."""

    centre_m: float
    size_m: float
    yaw_rad: float
    velocity_mps: float
    score: float


def match_detections(
    reference: Detections, candidate: Detections, *, max_centre_m: float, min_score: float = 0.0
) -> Matching:
    """Match one to one within each class, nearest centres first, up to `max_centre_m` apart.

    Boxes below `min_score` take no part on either side. Equal distances go to the lower reference index, then to the
    lower candidate index. `missing` and `extra` rise by index.
    """
    _check_classes(reference, candidate)
    rows, columns = np.flatnonzero(reference.scores >= min_score), np.flatnonzero(candidate.scores >= min_score)
    centre_a = reference.boxes.centre[rows].astype(np.float64)
    centre_b = candidate.boxes.centre[columns].astype(np.float64)
    distance = np.linalg.norm(centre_a[:, None, :] - centre_b[None, :, :], axis=2)
    same = reference.labels[rows][:, None] == candidate.labels[columns][None, :]
    row, column = np.nonzero(same & (distance <= max_centre_m))
    free_rows, free_columns = np.ones(len(rows), dtype=bool), np.ones(len(columns), dtype=bool)
    pairs: list[tuple[int, int]] = []
    for k in np.argsort(distance[row, column], kind="stable"):
        i, j = row[k], column[k]
        if free_rows[i] and free_columns[j]:
            free_rows[i] = free_columns[j] = False
            pairs.append((int(rows[i]), int(columns[j])))
    return _measured(
        reference,
        candidate,
        np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2),
        rows[free_rows],
        columns[free_columns],
    )


def _check_classes(reference: Detections, candidate: Detections) -> None:
    if reference.class_names != candidate.class_names:
        raise InternalError(f"detections of {reference.class_names} and of {candidate.class_names} cannot be matched")


def _measured(
    reference: Detections, candidate: Detections, pairs: np.ndarray, missing: np.ndarray, extra: np.ndarray
) -> Matching:
    def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        delta: np.ndarray = b[pairs[:, 1]].astype(np.float64) - a[pairs[:, 0]].astype(np.float64)
        return delta

    a, b = reference.boxes, candidate.boxes
    return Matching(
        pairs=pairs,
        missing=missing,
        extra=extra,
        centre_delta_m=np.linalg.norm(difference(a.centre, b.centre), axis=1),
        size_delta_m=np.abs(difference(a.size, b.size)).max(axis=1, initial=0.0),
        yaw_delta_rad=np.abs(wrap_angle(difference(a.yaw, b.yaw))),
        velocity_delta_mps=np.linalg.norm(difference(a.velocity, b.velocity), axis=1),
        score_delta=np.abs(difference(reference.scores, candidate.scores)),
    )


def by_class_and_range(matching: Matching, reference: Detections, candidate: Detections) -> tuple[RangeRow, ...]:
    """What is missing and extra in each class and range bin, all bins of every class, in class order."""
    range_a = np.hypot(reference.boxes.centre[:, 0], reference.boxes.centre[:, 1])
    range_b = np.hypot(candidate.boxes.centre[:, 0], candidate.boxes.centre[:, 1])
    taking_part = np.sort(np.concatenate([matching.pairs[:, 0], matching.missing]))

    def count(distance: np.ndarray, labels: np.ndarray, index: np.ndarray, label: int, low: float, high: float) -> int:
        chosen = (labels[index] == label) & (distance[index] >= low) & (distance[index] < high)
        return int(np.count_nonzero(chosen))

    return tuple(
        RangeRow(
            class_name=name,
            from_m=low,
            to_m=high,
            reference=count(range_a, reference.labels, taking_part, label, low, high),
            missing=count(range_a, reference.labels, matching.missing, label, low, high),
            extra=count(range_b, candidate.labels, matching.extra, label, low, high),
        )
        for label, name in enumerate(reference.class_names)
        for low, high in pairwise(RANGE_EDGES_M)
    )


def boxes_comparison(
    reference: Sequence[Detections],
    candidate: Sequence[Detections],
    *,
    names: tuple[str, str],
    tolerance: BoxTolerance,
    config: DetectorConfig,
) -> Comparison:
    """Judge the detections of the same frames: every box matched within the tolerance or excused; no box at all fails.

    A missing or extra box is excused only if
    (1) its score lies within `tolerance.score` of the score threshold; or
    (2) the side that lacks it returned `nms_post` boxes of its task, and its score lies within `tolerance.score` of
        the lowest of these; or
    (3) a missing and an extra box of one task, neither excused yet and their scores within `tolerance.score`, overlap
        by more than the NMS threshold: each side kept the other one of two that suppress each other.
    The numbers of the comparison are those of the matched centres; `detail` counts boxes and excuses.
    """
    frames = list(zip(reference, candidate, strict=True))
    found = [match_detections(a, b, max_centre_m=tolerance.centre_m) for a, b in frames]
    excuses = [_excuses(a, b, matching, tolerance, config) for (a, b), matching in zip(frames, found, strict=True)]
    accused = _accused(frames, found, excuses)
    deltas = {name: np.concatenate([getattr(m, name) for m in found] or [np.empty(0)]) for name in LIMIT_OF}
    within = all(bool((delta <= getattr(tolerance, LIMIT_OF[name])).all()) for name, delta in deltas.items())
    matched = len(deltas["centre_delta_m"])
    max_abs, max_relative, cosine = _centre_numbers(frames, found)
    largest = ", ".join(f"{LIMIT_OF[name]} {delta.max(initial=0.0):.4g}" for name, delta in deltas.items())
    missing, extra = sum(len(m.missing) for m in found), sum(len(m.extra) for m in found)
    excused = [sum(int(np.count_nonzero(pair[side])) for pair in excuses) for side in (0, 1)]
    counts = f"{matched} matched, {missing} missing ({excused[0]} excused), {extra} extra ({excused[1]} excused)"
    return Comparison(
        output="boxes",
        reference=names[0],
        candidate=names[1],
        frames=len(frames),
        max_abs=max_abs,
        max_relative=max_relative,
        cosine=cosine,
        worst=accused[0] if accused else "",
        tolerance=", ".join(f"{limit} <= {getattr(tolerance, limit):g}" for limit in LIMIT_OF.values()),
        passed=matched > 0 and within and not accused,
        detail=f"{counts}; " + (f"largest difference: {largest}" if matched else "no evidence"),
    )


def _accused(
    frames: Sequence[tuple[Detections, Detections]],
    found: Sequence[Matching],
    excuses: Sequence[tuple[np.ndarray, np.ndarray]],
) -> list[str]:
    """Every missing or extra box without an excuse, in words, the highest score first."""
    accused: list[tuple[float, str]] = []
    for number, ((a, b), matching, excused) in enumerate(zip(frames, found, excuses, strict=True)):
        for index in matching.missing[~excused[0]]:
            accused.append((float(a.scores[index]), f"frame {number}: missing {_described(a, int(index), b)}"))
        for index in matching.extra[~excused[1]]:
            accused.append((float(b.scores[index]), f"frame {number}: extra {_described(b, int(index), a)}"))
    return [text for _, text in sorted(accused, key=lambda entry: -entry[0])]


def _excuses(
    a: Detections, b: Detections, matching: Matching, tolerance: BoxTolerance, config: DetectorConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Which of `matching.missing` and of `matching.extra` are excused."""
    tasks = enumerate(config.head.classes_by_task)
    task_by_name = {name: task for task, names in tasks for name in names}
    task_of_label = np.array([task_by_name[name] for name in a.class_names], dtype=np.int64)
    task_a, task_b = task_of_label[a.labels], task_of_label[b.labels]
    missing, extra = matching.missing, matching.extra
    score_a, score_b = a.scores[missing].astype(np.float64), b.scores[extra].astype(np.float64)
    excused_a = _near_a_cut(score_a, task_a[missing], b.scores, task_b, tolerance.score, config.post)
    excused_b = _near_a_cut(score_b, task_b[extra], a.scores, task_a, tolerance.score, config.post)

    overlap = iou_bev_matrix(select_boxes(a.boxes, missing), select_boxes(b.boxes, extra))
    flipped = (
        (overlap > config.post.nms_threshold)
        & (task_a[missing][:, None] == task_b[extra][None, :])
        & (np.abs(score_a[:, None] - score_b[None, :]) <= tolerance.score)
    )
    for i, j in np.argwhere(flipped):
        if not excused_a[i] and not excused_b[j]:
            excused_a[i] = excused_b[j] = True
    return excused_a, excused_b


def _near_a_cut(
    scores: np.ndarray, tasks: np.ndarray, kept: np.ndarray, kept_tasks: np.ndarray, margin: float, post: PostConfig
) -> np.ndarray:
    near: np.ndarray = np.abs(scores - post.score_threshold) <= margin
    for task in np.unique(tasks):
        other = kept[kept_tasks == task].astype(np.float64)
        if len(other) >= post.nms_post:
            near |= (tasks == task) & (np.abs(scores - other.min()) <= margin)
    return near


def _described(side: Detections, index: int, other: Detections) -> str:
    """One box in words, with the distance to the nearest box of its class on the other side."""
    label, centre = side.labels[index], side.boxes.centre[index]
    x, y, z = (float(value) for value in centre)
    text = f"{side.class_names[label]} {side.scores[index]:.4f} at ({x:.2f}, {y:.2f}, {z:.2f}) m"
    same = other.boxes.centre[other.labels == label]
    if not len(same):
        return f"{text}; the other side has none of its class"
    return f"{text}; the nearest of its class lies {np.linalg.norm(same - centre, axis=1).min():.4g} m away"


def _centre_numbers(
    frames: Sequence[tuple[Detections, Detections]], found: Sequence[Matching]
) -> tuple[float, float, float]:
    """Largest absolute and relative difference, and cosine, of the matched centres; NaN without any."""
    if not any(len(m.pairs) for m in found):
        return math.nan, math.nan, math.nan
    a = np.concatenate([a.boxes.centre[m.pairs[:, 0]] for (a, _), m in zip(frames, found, strict=True)])
    b = np.concatenate([b.boxes.centre[m.pairs[:, 1]] for (_, b), m in zip(frames, found, strict=True)])
    centres = Tolerance(max_relative=math.inf, min_cosine=-1.0)  # the judgement is not made here
    numbers = compare_arrays("centres", a, b, names=("", ""), tolerance=centres)
    return numbers.max_abs, numbers.max_relative, numbers.cosine
