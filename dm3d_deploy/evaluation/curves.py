"""Precision over recall for benchmarks that ignore some boxes and sample the curve at score thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from dm3d_deploy.errors import InternalError

COUNTED, IGNORED, ABSENT = 0, 1, -1
ROUNDING = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class FlaggedFrame:
    """One frame before matching.

    Flags are COUNTED, IGNORED (neither a hit nor a mistake) or ABSENT (takes no part). `excused` detections are no
    false positives where they match nothing.
    """

    iou: Float64[np.ndarray, "objects found"]
    scores: Float64[np.ndarray, " found"]
    object_flag: Int64[np.ndarray, " objects"]
    found_flag: Int64[np.ndarray, " found"]
    excused: Bool[np.ndarray, " found"]

    def __post_init__(self) -> None:
        objects, found = self.iou.shape
        if not (
            len(self.object_flag) == objects and len(self.found_flag) == len(self.scores) == len(self.excused) == found
        ):
            raise InternalError(f"flags do not fit overlaps of shape {self.iou.shape}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Precision, made monotone, at evenly spaced steps of recall from 0 to 1; 0 beyond what was reached."""

    objects: int
    precision: Float64[np.ndarray, " steps"]
    recall: Float64[np.ndarray, " steps"]

    def ap_percent(self, every: int = 1, first: int = 1) -> float | None:
        """Mean precision at the steps `first`, `first + every`, ... in percent; None where there was no object."""
        return 100.0 * float(self.precision[first::every].mean()) if self.objects else None


def precision_curve(frames: Sequence[FlaggedFrame], *, min_iou: float, positions: int, repeat_below: float) -> Curve:
    """The curve that KITTI's and ONCE's evaluations draw.

    First pass: each object takes the best-scored free detection that overlaps it by more than `min_iou`; the scores
    of the hits give one threshold per step of recall. Second pass, at each threshold: each object takes the free
    detection above the threshold that overlaps it most. With fewer objects than `repeat_below` one score may serve
    several steps of recall, without which few objects could never reach full precision at every step.
    """
    frames = [_without_absent(frame) for frame in frames]
    objects = sum(int(np.count_nonzero(frame.object_flag == COUNTED)) for frame in frames)
    precision, recall = np.zeros(positions + 1), np.linspace(0, 1, positions + 1)
    if not objects:
        return Curve(objects=0, precision=precision, recall=recall)
    scores = np.concatenate([_hit_scores(frame, min_iou) for frame in frames])
    thresholds = score_thresholds(scores, objects, positions, repeat=objects < repeat_below)
    true, false = np.sum([_counts(frame, thresholds, min_iou) for frame in frames], axis=0)
    steps = len(thresholds)
    precision[:steps] = np.divide(true, true + false, out=np.zeros(steps), where=true + false > 0)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return Curve(objects=objects, precision=precision, recall=recall)


def score_thresholds(
    scores: Float64[np.ndarray, " hits"], objects: int, positions: int, *, repeat: bool
) -> Float64[np.ndarray, " thresholds"]:
    """The score at which recall is nearest to each of 0, 1 / positions, 2 / positions, ...; falling."""
    falling = np.sort(scores)[::-1]
    last = len(falling) - 1
    chosen: list[float] = []
    wanted = 0.0
    for index, score in enumerate(falling.tolist()):
        before = (index + 1) / objects
        after = (index + 2) / objects if index < last else before
        if after - wanted < wanted - before and index < last:  # as KITTI writes it: ties are decided by rounding
            continue
        chosen.append(score)
        wanted += 1 / positions
        while repeat and before + after + ROUNDING > 2 * wanted and len(chosen) <= positions:
            chosen.append(score)
            wanted += 1 / positions
    return np.array(chosen[: positions + 1], dtype=np.float64)


def _without_absent(frame: FlaggedFrame) -> FlaggedFrame:
    rows, columns = np.flatnonzero(frame.object_flag != ABSENT), np.flatnonzero(frame.found_flag != ABSENT)
    return FlaggedFrame(
        iou=frame.iou[np.ix_(rows, columns)],
        scores=frame.scores[columns],
        object_flag=frame.object_flag[rows],
        found_flag=frame.found_flag[columns],
        excused=frame.excused[columns],
    )


def _hit_scores(frame: FlaggedFrame, min_iou: float) -> Float64[np.ndarray, " hits"]:
    """Scores of the detections that hit counted objects, objects in their order."""
    free = np.ones(len(frame.scores), dtype=bool)
    hits = []
    for row, flag in zip(frame.iou, frame.object_flag, strict=True):
        candidates = np.flatnonzero(free & (row > min_iou))
        if not len(candidates):
            continue
        best = candidates[np.argmax(frame.scores[candidates])]
        free[best] = False
        if flag == COUNTED and frame.found_flag[best] == COUNTED:
            hits.append(frame.scores[best])
    return np.array(hits, dtype=np.float64)


def _counts(
    frame: FlaggedFrame, thresholds: Float64[np.ndarray, " thresholds"], min_iou: float
) -> Float64[np.ndarray, "2 thresholds"]:
    """True and false positives at each threshold."""
    true = np.zeros(len(thresholds))
    if not len(frame.scores):
        return np.stack([true, true])
    free = frame.scores[None, :] >= thresholds[:, None]
    counted = frame.found_flag == COUNTED
    every = np.arange(len(thresholds))
    for row, flag in zip(frame.iou, frame.object_flag, strict=True):
        candidates = free & (row > min_iou)
        # A counted detection is preferred by overlap; without one, the first ignored detection is taken.
        best = np.where(candidates, np.where(counted, 1.0 + row, 1.0), 0.0).argmax(axis=1)
        taken = candidates[every, best]
        if flag == COUNTED:
            true += taken & counted[best]
        free[every[taken], best[taken]] = False
    return np.stack([true, (free & counted & ~frame.excused).sum(axis=1)])
