"""AP of two detectors on the same frames, and how sure their difference is: a bootstrap over whole frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from dm3d_deploy.errors import InternalError
from dm3d_deploy.evaluation.nuscenes import (
    CLASS_RANGE_M,
    DEFAULT_RANGE_M,
    DISTANCES_M,
    Truth,
    average_precision,
    by_falling_score,
    match_by_distance,
    within,
)
from dm3d_deploy.pointcloud import Detections

DRAWS = 1000
CONFIDENCE_PERCENT = (2.5, 97.5)
MIN_FRAMES = 5  # that hold an object of a class; below, resampling them says nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassHits:
    """The detections of one class, best score first: the frame of each and whether it hits at each of DISTANCES_M.

    `objects` counts the class's objects in each frame.
    """

    frame: Int64[np.ndarray, " detections"]
    hits: Bool[np.ndarray, "distances detections"]
    objects: Int64[np.ndarray, " frames"]

    def __post_init__(self) -> None:
        if self.hits.shape != (len(DISTANCES_M), len(self.frame)):
            raise InternalError(f"hits of shape {self.hits.shape} do not fit {len(self.frame)} detections")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """AP of a second detector minus that of the first, in points of 100, with its 95 % bootstrap interval.

    The interval is None where fewer than MIN_FRAMES frames hold an object.
    """

    points: float
    interval_points: tuple[float, float] | None


def class_hits(found: Sequence[Detections], truths: Sequence[Truth], label: int) -> ClassHits:
    """Match the detections of a class within its range (m), as `score_frames` does."""
    name = found[0].class_names[label]
    reach = CLASS_RANGE_M.get(name, DEFAULT_RANGE_M)
    rows = [np.flatnonzero((one.labels == label) & within(one.boxes, 0.0, reach)) for one in found]
    places = [one.boxes.centre[own, :2].astype(np.float64) for one, own in zip(found, rows, strict=True)]
    scores = np.concatenate([one.scores[own] for one, own in zip(found, rows, strict=True)]).astype(np.float64)
    objects = [t.boxes.centre[(t.labels == label) & within(t.boxes, 0.0, reach), :2].astype(np.float64) for t in truths]
    return ClassHits(
        frame=np.repeat(np.arange(len(found)), [len(own) for own in rows])[by_falling_score(scores)],
        hits=np.stack([match_by_distance(places, scores, objects, distance) for distance in DISTANCES_M]),
        objects=np.array([len(own) for own in objects], dtype=np.int64),
    )


def resampled_ap(hits: ClassHits, times: Int64[np.ndarray, " frames"]) -> float:
    """AP (0 to 1) of the set that holds each frame so many times; NaN where that set holds no object."""
    objects = int(hits.objects @ times)
    if not objects:
        return float("nan")
    rows = np.repeat(np.arange(len(hits.frame)), times[hits.frame])
    return float(np.mean([average_precision(hit, objects) for hit in hits.hits[:, rows]]))


def draw_frames(frames: int, *, draws: int = DRAWS, seed: int = 0) -> Int64[np.ndarray, "draws frames"]:
    """How often each frame lies in each of `draws` sets of as many frames, drawn with replacement."""
    random = np.random.Generator(np.random.PCG64(seed))
    drawn: Int64[np.ndarray, "draws frames"] = random.multinomial(frames, np.full(frames, 1 / frames), size=draws)
    return drawn


def changes(
    first: Sequence[ClassHits], second: Sequence[ClassHits], times: Int64[np.ndarray, "draws frames"]
) -> tuple[Float64[np.ndarray, " classes"], Float64[np.ndarray, "draws classes"]]:
    """AP of the second minus the first, per class: of the frames as they are, and of every draw; NaN without objects.

    Both detectors are resampled alike, so what is easy or hard about a frame cancels (Efron's paired bootstrap).
    """
    once = np.ones(times.shape[1], dtype=np.int64)
    table = [
        [resampled_ap(b, draw) - resampled_ap(a, draw) for a, b in zip(first, second, strict=True)]
        for draw in (once, *times)
    ]
    whole = np.array(table, dtype=np.float64)
    return whole[0], whole[1:]


def paired_changes(
    first: Sequence[Detections],
    second: Sequence[Detections],
    truths: Sequence[Truth],
    groups: Mapping[str, Sequence[str]],
    *,
    times: Int64[np.ndarray, "draws frames"],
) -> dict[str, Change]:
    """The change of each group of classes: the mean over those of its classes that the frames hold.

    Groups without an object are left out. Raises InternalError for sequences of different length.
    """
    if not len(first) == len(second) == len(truths) == times.shape[1]:
        raise InternalError(f"{len(first)}, {len(second)}, {len(truths)} and {times.shape[1]} frames cannot be paired")
    names = first[0].class_names
    before, after = ([class_hits(found, truths, label) for label in range(len(names))] for found in (first, second))
    whole, drawn = changes(before, after, times)
    found = {}
    for group, members in groups.items():
        held = [names.index(name) for name in members if before[names.index(name)].objects.any()]
        if not held:
            continue
        frames = int(np.count_nonzero(sum(before[label].objects for label in held)))
        found[group] = Change(
            points=100 * float(whole[held].mean()),
            interval_points=_interval(drawn[:, held]) if frames >= MIN_FRAMES else None,
        )
    return found


def _interval(drawn: Float64[np.ndarray, "draws classes"]) -> tuple[float, float]:
    """Percentiles of the mean over the classes that each draw holds; draws without any are left out."""
    present = ~np.isnan(drawn)
    usable = present.any(axis=1)
    means = np.where(present, drawn, 0.0)[usable].sum(axis=1) / present[usable].sum(axis=1)
    low, high = np.percentile(100 * means, CONFIDENCE_PERCENT)
    return float(low), float(high)
