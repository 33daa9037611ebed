"""The three benchmarks over the same labelled frames: each in its own words, and with what its numbers leave out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from dm3d_deploy.errors import UsageError, nearest
from dm3d_deploy.evaluation.camera import image_boxes
from dm3d_deploy.evaluation.kitti import KITTI_TYPE, MIN_IOU, found_in_view, inside_areas, kitti_rows
from dm3d_deploy.evaluation.labels import FrameLabels
from dm3d_deploy.evaluation.nds import NUSCENES_CLASS, nds_score, nuscenes_rows
from dm3d_deploy.evaluation.nuscenes import CLASS_RANGE_M, Truth
from dm3d_deploy.evaluation.once import CLASSES, ONCE_CLASS, once_mean, once_rows
from dm3d_deploy.evaluation.rows import ALL, RANGES, ApRow, vulnerable_first
from dm3d_deploy.geometry.boxes import select_boxes
from dm3d_deploy.pointcloud import Boxes3D, Detections

MIN_POINTS = 5  # of a simulated object that counts
IN_DONT_CARE = 0.5
# Every word that a metric knows, and what the metric calls it.
WORDS = {"kitti": KITTI_TYPE, "nuscenes": NUSCENES_CLASS, "once": ONCE_CLASS}
SCORED = {
    "kitti": tuple(MIN_IOU),
    "nuscenes": vulnerable_first(tuple(CLASS_RANGE_M)),
    "once": tuple(dict.fromkeys(member for members, _ in CLASSES.values() for member in members)),
}
METRICS = tuple(WORDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Rows, a summary (percent; errors in m, rad, m/s; None where nothing could be counted) and notes."""

    rows: tuple[ApRow, ...]
    summary: Mapping[str, float | None]
    notes: tuple[str, ...]


def scored_classes(metric: str, class_names: Sequence[str]) -> tuple[str, ...]:
    """The metric's classes that a model of these classes can find; UsageError for no metric and for no such class."""
    if metric not in METRICS:
        raise UsageError(f"there is no metric '{metric}'.", fix=nearest(metric, METRICS))
    known = {WORDS[metric].get(name.lower()) for name in class_names}
    scored = tuple(name for name in SCORED[metric] if name in known)
    if not scored:
        raise UsageError(
            f"the model finds {', '.join(class_names)}, none of which the metric '{metric}' knows.",
            fix=f"use a model that finds one of {', '.join(sorted(WORDS[metric]))}",
        )
    return scored


def benchmark_scores(metric: str, found: Sequence[Detections], labels: Sequence[FrameLabels]) -> Scores:
    """Score the detections of frames against their labels.

    Of simulated objects those with at least five points count. Where people labelled what a camera saw, detections
    outside its view and in DontCare areas are left out of every metric. Raises UsageError as `scored_classes`, and
    when no frame holds an object of a class that could be found.
    """
    scored = scored_classes(metric, found[0].class_names)
    scores = {"kitti": _kitti, "nuscenes": _nuscenes, "once": _once}[metric](found, labels, scored)
    if not any(row.objects for row in scores.rows):
        raise UsageError(
            f"the {len(labels)} frames hold no object of {', '.join(scored)} that counts in the metric '{metric}'.",
            fix="use more frames, or another metric",
        )
    unknown = [name for name in SCORED[metric] if name not in scored]
    notes = (f"not scored, for the model does not know them: {', '.join(unknown)}",) if unknown else ()
    seen = "" if all(frame.all_around for frame in labels) else "; labels and detections in the camera's view only"
    least = f"simulated objects count from {MIN_POINTS} points on" if not seen else "objects that people labelled"
    return Scores(rows=scores.rows, summary=scores.summary, notes=(*scores.notes, f"{least}{seen}", *notes))


def _kitti(found: Sequence[Detections], labels: Sequence[FrameLabels], scored: Sequence[str]) -> Scores:
    visible = [found_in_view(d, frame.camera) for d, frame in zip(found, labels, strict=True)]
    rows = kitti_rows([frame.truth for frame in labels], visible, min_iou={name: MIN_IOU[name] for name in scored})
    summary = {}
    for measure in ("3d R40", "bev R40"):
        summary[f"mean AP {measure} moderate"] = _mean(rows, measure, "moderate")
    note = "DontCare areas excuse false positives also in 3D and bird's-eye view; ranges are of all that count as hard"
    return Scores(rows=rows, summary=summary, notes=(note,))


def _nuscenes(found: Sequence[Detections], labels: Sequence[FrameLabels], scored: Sequence[str]) -> Scores:
    detections, truths = in_words(found, labels, NUSCENES_CLASS, scored)
    farthest = max(CLASS_RANGE_M.values())
    limits = {ALL: (0.0, np.inf), **{name: limit for name, limit in RANGES.items() if limit[0] < farthest}}
    rows = tuple(row for name, limit in limits.items() for row in nuscenes_rows(detections, truths, name, limit))
    summary: dict[str, float | None] = {"mAP": _mean(rows, "centre distance", ALL)}
    if summary["mAP"] is not None:
        score = nds_score(detections, truths)
        summary |= {"NDS": 100 * score.nds, **score.errors}
    notes = ["classes without an object are left out of the means; NDS counts the attribute error as 1"]
    if not all(frame.all_around for frame in labels):
        notes.append("the labels hold no velocities, so AVE is 1")
    return Scores(rows=rows, summary=summary, notes=tuple(notes))


def _once(found: Sequence[Detections], labels: Sequence[FrameLabels], scored: Sequence[str]) -> Scores:
    rows = once_rows(*in_words(found, labels, ONCE_CLASS, scored))
    summary = {f"mAP {subset}": once_mean(rows, subset) for subset in dict.fromkeys(row.subset for row in rows)}
    return Scores(rows=rows, summary=summary, notes=("mAP is over vehicle, pedestrian and cyclist",))


def _mean(rows: Sequence[ApRow], measure: str, subset: str) -> float | None:
    values = [row.ap_percent for row in rows if (row.measure, row.subset) == (measure, subset)]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def in_words(
    found: Sequence[Detections], labels: Sequence[FrameLabels], words: Mapping[str, str], scored: Sequence[str]
) -> tuple[list[Detections], list[Truth]]:
    """Detections and labels in the metric's classes; those of other classes are left out."""
    detections, truths = [], []
    for one, frame in zip(found, labels, strict=True):
        one = in_labelled_view(one, frame)
        own = _places([one.class_names[label] for label in one.labels], words, scored)
        kept = np.flatnonzero(own >= 0)
        detections.append(_chosen(one, kept, own[kept], tuple(scored)))
        own = _places(frame.truth.types, words, scored)
        kept = np.flatnonzero((own >= 0) & visible(frame))
        truths.append(Truth(boxes=_labelled_boxes(frame, kept), labels=own[kept]))
    return detections, truths


def visible(frame: FrameLabels) -> Bool[np.ndarray, " boxes"]:
    """Which objects are asked for: simulated ones of five points, else those in view that a point fell on."""
    if frame.all_around:
        seen: np.ndarray = frame.num_points >= MIN_POINTS
        return seen
    pixels = image_boxes(frame.camera, frame.truth.boxes)
    seen = (frame.num_points >= 1) & (pixels[:, 3] > pixels[:, 1])
    return seen


def _places(names: Sequence[str], words: Mapping[str, str], scored: Sequence[str]) -> np.ndarray:
    """The place of each name among the scored classes, -1 for none."""
    own = [words.get(name.lower(), "") for name in names]
    return np.array([scored.index(name) if name in scored else -1 for name in own], dtype=np.int64)


def _labelled_boxes(frame: FrameLabels, kept: np.ndarray) -> Boxes3D:
    boxes = select_boxes(frame.truth.boxes, kept)
    if frame.all_around:
        return boxes
    unknown = np.full_like(boxes.velocity, np.nan)
    return Boxes3D(centre=boxes.centre, size=boxes.size, yaw=boxes.yaw, velocity=unknown)


def in_labelled_view(found: Detections, frame: FrameLabels) -> Detections:
    """Detections where somebody labelled: in the camera's view, outside DontCare areas; all of a simulated frame."""
    if frame.all_around:
        return found
    pixels = image_boxes(frame.camera, found.boxes)
    kept = np.flatnonzero((pixels[:, 3] > pixels[:, 1]) & ~inside_areas(pixels, frame.truth.dont_care_px, IN_DONT_CARE))
    return _chosen(found, kept, found.labels[kept], found.class_names)


def _chosen(found: Detections, kept: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]) -> Detections:
    return Detections(
        boxes=select_boxes(found.boxes, kept), scores=found.scores[kept], labels=labels, class_names=class_names
    )
