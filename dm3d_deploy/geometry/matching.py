"""Two sets of detections of the same frames: which box is which, how far apart, and whether that is good enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from jaxtyping import Float64, Int64

from dm3d_deploy.config import AnchorPostConfig, DetectorConfig, PostConfig
from dm3d_deploy.errors import InternalError
from dm3d_deploy.evidence import Comparison, Tolerance, compare_arrays
from dm3d_deploy.geometry.boxes import iou_bev_matrix, select_boxes, wrap_angle
from dm3d_deploy.geometry.decode import Decoded, Located, join_located, select_located
from dm3d_deploy.pointcloud import Detections

Post = PostConfig | AnchorPostConfig
MIN_HEADING = 0.1  # trained heads give about 1; fp16 errs by a few thousandths
RANGE_EDGES_M = (0.0, 15.0, 30.0, 50.0, math.inf)
LIMIT_OF = {
    "centre_delta_m": "centre_m",
    "size_share": "size_share",
    "yaw_delta_rad": "yaw_rad",
    "velocity_delta_mps": "velocity_mps",
    "score_delta": "score",
}
EXCUSES = ("at the score threshold", "at a full list", "by NMS")
IOU_ROUNDING = 1e-9  # NMS computed the same overlap in another order


@dataclass(frozen=True, slots=True, kw_only=True)
class Matching:
    """Pairs (reference index, candidate index), what each side has alone, and the differences pair by pair.

    Centre: distance of the centres. Size: difference over the reference's size, the largest of the three. Yaw: modulo
    2 pi. Velocity: length of the difference.
    """

    pairs: Int64[np.ndarray, "pairs 2"]
    missing: Int64[np.ndarray, " missing"]
    extra: Int64[np.ndarray, " extra"]
    centre_delta_m: Float64[np.ndarray, " pairs"]
    size_share: Float64[np.ndarray, " pairs"]
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
    """How far a matched box may differ in each respect. There are no defaults.

    `size_share` is a share of the box's size: the head gives its logarithm, whose error is one of proportion.
    """

    centre_m: float
    size_share: float
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
        size_share=_shares(np.abs(difference(a.size, b.size)), a.size[pairs[:, 0]]).max(axis=1, initial=0.0),
        yaw_delta_rad=np.abs(wrap_angle(difference(a.yaw, b.yaw))),
        velocity_delta_mps=np.linalg.norm(difference(a.velocity, b.velocity), axis=1),
        score_delta=np.abs(difference(reference.scores, candidate.scores)),
    )


def _shares(delta: np.ndarray, size: np.ndarray) -> np.ndarray:
    """`delta` over `size`; a size of 0 is met exactly or missed without bound."""
    unbounded = np.where(delta == 0, 0.0, np.inf)
    share: np.ndarray = np.divide(delta, size, out=unbounded, where=size != 0)
    return share


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """Two sides matched; `excuses` gives each of `missing` and each of `extra` a place in EXCUSES, or -1."""

    a: Detections
    b: Detections
    matching: Matching
    excuses: tuple[np.ndarray, np.ndarray]


def boxes_comparison(
    reference: Sequence[Decoded],
    candidate: Sequence[Decoded],
    *,
    names: tuple[str, str],
    tolerance: BoxTolerance,
    config: DetectorConfig,
) -> tuple[Comparison, Comparison]:
    """Judge the boxes of the same frames twice: "boxes before NMS" and "boxes", which are those that NMS kept.

    Boxes of the same class and BEV cell are the same box; each must agree within the tolerances, but for the yaw where
    `Located.headings` is less than MIN_HEADING: an angle that rounding decides is no heading. A
    box that the other side lacks is excused only if
    (1) its score lies within `tolerance.score` of the score threshold; or
    (2) the other side cut the list of its task at `max_objects`, and its score lies within `tolerance.score` of the
        lowest there; or, after NMS only,
    (3) the other side had it before NMS, within all tolerances, and NMS had a reason to drop it: a box kept in its
        task with no lower score overlaps it beyond the NMS threshold, or NMS stopped at `nms_pre` or `nms_post`. Then
        the detector agrees, and rounding turned NMS at its margin.
    No matched box at all fails, and so does NaN. The numbers of a comparison are those of the matched centres; `detail`
    counts boxes and excuses, and says of which class and at what range those are that stand alone.
    """
    tasks = enumerate(config.nms_groups)
    task_by_name = {name: task for task, of_task in tasks for name in of_task}
    before: list[_Frame] = []
    after: list[_Frame] = []
    for a, b in zip(reference, candidate, strict=True):
        _check_classes(a.kept.detections, b.kept.detections)
        task_of_label = np.array([task_by_name[name] for name in a.kept.detections.class_names], dtype=np.int64)
        before.append(_before_nms(a, b, tolerance, config.post, task_of_label))
        after.append(_after_nms(a, b, tolerance, config.post, task_of_label))
    return (
        _judged("boxes before NMS", before, names, tolerance),
        _judged("boxes", after, names, tolerance),
    )


def _match_cells(reference: Located, candidate: Located) -> Matching:
    """Pairs of the same class and cell; their yaws are not held against each other where either has no heading."""
    a, b = reference.detections, candidate.detections
    key_a, key_b = (
        side.cells * len(a.class_names) + side.detections.labels * side.by_class for side in (reference, candidate)
    )
    _, row, column = np.intersect1d(key_a, key_b, return_indices=True)
    order = np.argsort(row)
    missing, extra = np.setdiff1d(np.arange(len(a)), row), np.setdiff1d(np.arange(len(b)), column)
    matching = _measured(a, b, np.stack([row[order], column[order]], axis=1), missing, extra)
    heading = np.minimum(reference.headings[matching.pairs[:, 0]], candidate.headings[matching.pairs[:, 1]])
    return replace(matching, yaw_delta_rad=np.where(heading < MIN_HEADING, 0.0, matching.yaw_delta_rad))


def _before_nms(a: Decoded, b: Decoded, tolerance: BoxTolerance, post: Post, task_of_label: np.ndarray) -> _Frame:
    all_a, all_b = join_located(a.before_nms), join_located(b.before_nms)
    matching = _match_cells(all_a, all_b)
    lone_a, lone_b = select_located(all_a, matching.missing), select_located(all_b, matching.extra)
    excuses = (
        _cut_excuses(lone_a, b, tolerance.score, post, task_of_label),
        _cut_excuses(lone_b, a, tolerance.score, post, task_of_label),
    )
    return _Frame(a=all_a.detections, b=all_b.detections, matching=matching, excuses=excuses)


def _after_nms(a: Decoded, b: Decoded, tolerance: BoxTolerance, post: Post, task_of_label: np.ndarray) -> _Frame:
    matching = _match_cells(a.kept, b.kept)
    lone_a, lone_b = select_located(a.kept, matching.missing), select_located(b.kept, matching.extra)
    excuses = []
    for lone, other in ((lone_a, b), (lone_b, a)):
        kinds = _cut_excuses(lone, other, tolerance.score, post, task_of_label)
        dropped = _dropped_by_nms(lone, other, tolerance, post, task_of_label)
        excuses.append(np.where((kinds < 0) & dropped, EXCUSES.index("by NMS"), kinds))
    return _Frame(a=a.kept.detections, b=b.kept.detections, matching=matching, excuses=(excuses[0], excuses[1]))


def _cut_excuses(lone: Located, other: Decoded, margin: float, post: Post, task_of_label: np.ndarray) -> np.ndarray:
    """Excuse (1) or (2) of each box that the other side lacks, -1 without."""
    scores = lone.detections.scores.astype(np.float64)
    cuts = np.array([math.nan if cut is None else cut for cut in other.cut_scores])[
        task_of_label[lone.detections.labels]
    ]
    at_cut = np.where(np.abs(scores - cuts) <= margin, EXCUSES.index("at a full list"), -1)
    kinds: np.ndarray = np.where(
        np.abs(scores - post.score_threshold) <= margin, EXCUSES.index("at the score threshold"), at_cut
    )
    return kinds


def _dropped_by_nms(
    lone: Located,
    other: Decoded,
    tolerance: BoxTolerance,
    post: Post,
    task_of_label: np.ndarray,
) -> np.ndarray:
    """Which of the boxes that the other side lacks after NMS have excuse (3)."""
    candidates = join_located(other.before_nms)
    found, kept = candidates.detections, other.kept.detections
    matching = _match_cells(lone, candidates)
    row, column = matching.pairs[_within(matching, tolerance)].T
    task_found, task_kept = task_of_label[found.labels], task_of_label[kept.labels]
    suppressors = (
        (iou_bev_matrix(kept.boxes, select_boxes(found.boxes, column)) > post.nms_threshold - IOU_ROUNDING)
        & (task_kept[:, None] == task_found[column][None, :])
        & (kept.scores[:, None] >= found.scores[column][None, :])
    )
    tasks = len(other.before_nms)
    stopped = (np.bincount(task_found, minlength=tasks) > post.nms_pre) | (
        np.bincount(task_kept, minlength=tasks) >= post.nms_post
    )
    dropped = np.zeros(len(lone.cells), dtype=bool)
    dropped[row] = suppressors.any(axis=0) | stopped[task_found[column]]
    return dropped


def _within(matching: Matching, tolerance: BoxTolerance) -> np.ndarray:
    """Which pairs agree in every respect; NaN does not."""
    checks = [getattr(matching, name) <= getattr(tolerance, limit) for name, limit in LIMIT_OF.items()]
    within: np.ndarray = np.logical_and.reduce(checks)
    return within


def _judged(output: str, frames: Sequence[_Frame], names: tuple[str, str], tolerance: BoxTolerance) -> Comparison:
    deltas = {
        name: np.concatenate([getattr(frame.matching, name) for frame in frames] or [np.empty(0)]) for name in LIMIT_OF
    }
    accused = _accused(frames, tolerance)
    matched = len(deltas["centre_delta_m"])
    max_abs, max_relative, cosine = _centre_numbers(frames)
    largest = ", ".join(f"{LIMIT_OF[name]} {delta.max(initial=0.0):.4g}" for name, delta in deltas.items())
    missing, extra = (
        _counted(word, [frame.excuses[side] for frame in frames]) for side, word in enumerate(("missing", "extra"))
    )
    return Comparison(
        output=output,
        reference=names[0],
        candidate=names[1],
        frames=len(frames),
        max_abs=max_abs,
        max_relative=max_relative,
        cosine=cosine,
        worst=accused[0] if accused else "",
        tolerance=", ".join(f"{limit} <= {getattr(tolerance, limit):g}" for limit in LIMIT_OF.values()),
        passed=matched > 0 and not accused,
        detail=f"{matched} matched, {missing}, {extra}; "
        + (f"largest difference: {largest}" if matched else "no evidence")
        + _where(frames),
    )


def _where(frames: Sequence[_Frame]) -> str:
    """Like "; missing and extra by class and range: car 15 to 30 m 2 and 0"; nothing where no box stands alone."""
    counts: dict[tuple[str, float, float], tuple[int, int]] = {}
    for frame in frames:
        for row in by_class_and_range(frame.matching, frame.a, frame.b):
            missing, extra = counts.get((row.class_name, row.from_m, row.to_m), (0, 0))
            counts[row.class_name, row.from_m, row.to_m] = missing + row.missing, extra + row.extra
    parts = [
        f"{name} {f'{low:g} to {high:g} m' if math.isfinite(high) else f'beyond {low:g} m'} {missing} and {extra}"
        for (name, low, high), (missing, extra) in counts.items()
        if missing or extra
    ]
    return f"; missing and extra by class and range: {', '.join(parts)}" if parts else ""


def _counted(word: str, excuses: Sequence[np.ndarray]) -> str:
    """Like "3 missing (2 excused: 1 at the score threshold, 1 by NMS)"."""
    kinds = np.concatenate(excuses or [np.empty(0)])
    counts = {name: int(np.count_nonzero(kinds == kind)) for kind, name in enumerate(EXCUSES)}
    parts = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{len(kinds)} {word} ({sum(counts.values())} excused{': ' if parts else ''}{parts})"


def _accused(frames: Sequence[_Frame], tolerance: BoxTolerance) -> list[str]:
    """Every pair too far apart and every lone box without an excuse, in words, the highest score first."""
    accused: list[tuple[float, str]] = []
    for number, frame in enumerate(frames):
        a, b, matching = frame.a, frame.b, frame.matching
        for pair in np.flatnonzero(~_within(matching, tolerance)):
            index = int(matching.pairs[pair, 0])
            deltas = {limit: getattr(matching, name)[pair] for name, limit in LIMIT_OF.items()}
            over = {limit: delta for limit, delta in deltas.items() if not delta <= getattr(tolerance, limit)}
            text = ", ".join(f"{limit} {delta:.4g}" for limit, delta in over.items())
            accused.append((float(a.scores[index]), f"frame {number}: {_named(a, index)} differs: {text}"))
        for index in matching.missing[frame.excuses[0] < 0]:
            accused.append((float(a.scores[index]), f"frame {number}: missing {_described(a, int(index), b)}"))
        for index in matching.extra[frame.excuses[1] < 0]:
            accused.append((float(b.scores[index]), f"frame {number}: extra {_described(b, int(index), a)}"))
    return [text for _, text in sorted(accused, key=lambda entry: -entry[0])]


def _named(side: Detections, index: int) -> str:
    x, y, z = (float(value) for value in side.boxes.centre[index])
    return f"{side.class_names[side.labels[index]]} {side.scores[index]:.4f} at ({x:.2f}, {y:.2f}, {z:.2f}) m"


def _described(side: Detections, index: int, other: Detections) -> str:
    """One box in words, with the distance to the nearest box of its class on the other side."""
    text = _named(side, index)
    same = other.boxes.centre[other.labels == side.labels[index]]
    if not len(same):
        return f"{text}; the other side has none of its class"
    nearest = np.linalg.norm(same - side.boxes.centre[index], axis=1).min()
    return f"{text}; the nearest of its class lies {nearest:.4g} m away"


def _centre_numbers(frames: Sequence[_Frame]) -> tuple[float, float, float]:
    """Largest absolute and relative difference, and cosine, of the matched centres; NaN without any."""
    if not any(len(frame.matching.pairs) for frame in frames):
        return math.nan, math.nan, math.nan
    a = np.concatenate([frame.a.boxes.centre[frame.matching.pairs[:, 0]] for frame in frames])
    b = np.concatenate([frame.b.boxes.centre[frame.matching.pairs[:, 1]] for frame in frames])
    centres = Tolerance(max_relative=-1.0, min_cosine=1.0)  # passes nothing: the judgement is not made here
    numbers = compare_arrays("centres", a, b, names=("", ""), tolerance=centres)
    return numbers.max_abs, numbers.max_relative, numbers.cosine
