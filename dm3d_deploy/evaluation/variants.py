"""AP of variants of one detector on the same labelled frames: dense beside pruned, by class and range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dm3d_deploy.errors import UsageError
from dm3d_deploy.evaluation.benchmarks import in_words, scored_classes
from dm3d_deploy.evaluation.labels import FrameLabels
from dm3d_deploy.evaluation.nds import NUSCENES_CLASS, nuscenes_rows
from dm3d_deploy.evaluation.nuscenes import DEFAULT_RANGE_M, Truth
from dm3d_deploy.evaluation.paired import Change, draw_frames, paired_changes
from dm3d_deploy.evaluation.rows import ALL, RANGES, VULNERABLE
from dm3d_deploy.geometry.boxes import select_boxes
from dm3d_deploy.pointcloud import Detections

METRIC = "nuscenes"
MEASURE = "nuScenes centre distance, mean of 0.5, 1, 2 and 4 m"
VULNERABLE_MEAN, EVERY_MEAN = "vulnerable road users", "all classes"
LIMITS_M = {ALL: (0.0, np.inf), **{name: limits for name, limits in RANGES.items() if limits[0] < DEFAULT_RANGE_M}}


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantRow:
    """AP in percent of every variant, of a class within a range or as the mean over `classes`; None without objects.

    `changes` holds how far other variants are from the first; it is empty for a single range.
    """

    name: str
    classes: tuple[str, ...]
    subset: str
    objects: int
    ap_percent: Mapping[str, float | None]
    changes: Mapping[str, Change]


def variant_rows(
    found: Mapping[str, Sequence[Detections]],
    labels: Sequence[FrameLabels],
    point_range_m: Sequence[float],
    *,
    compared: Sequence[str],
) -> tuple[VariantRow, ...]:
    """The means over vulnerable road users and over all classes, then each class by range, vulnerable ones first.

    The variants `compared` get an interval of their difference from the first one in `found`. A mean is over the
    classes that occur. Objects outside the model's point range (x, y, z from, then to) are not asked for. Raises
    UsageError for a model that shares no class with the metric and for frames without an object that it could find.
    """
    first = next(iter(found))
    scored = scored_classes(METRIC, found[first][0].class_names)
    pairs = {variant: in_words(own, labels, NUSCENES_CLASS, scored) for variant, own in found.items()}
    detections = {variant: pair[0] for variant, pair in pairs.items()}
    truths = [_within(truth, point_range_m) for truth in pairs[first][1]]
    groups = {VULNERABLE_MEAN: tuple(name for name in scored if name in VULNERABLE), EVERY_MEAN: scored}
    members = {**groups, **{name: (name,) for name in scored}}
    times = draw_frames(len(truths))
    told = {
        variant: paired_changes(detections[first], detections[variant], truths, members, times=times)
        for variant in compared
    }
    rows = _class_rows(detections, truths, told)
    if not any(row.objects for row in rows):
        raise UsageError(
            f"the {len(truths)} frames hold no object of {', '.join(scored)} within the model's range.",
            fix="use more frames",
        )
    return (*(_mean_row(name, own, rows, told) for name, own in groups.items() if own), *rows)


def _within(truth: Truth, point_range_m: Sequence[float]) -> Truth:
    low, high = np.array(point_range_m[:2]), np.array(point_range_m[3:5])
    kept = np.flatnonzero(((truth.boxes.centre[:, :2] >= low) & (truth.boxes.centre[:, :2] < high)).all(axis=1))
    return Truth(boxes=select_boxes(truth.boxes, kept), labels=truth.labels[kept])


def _class_rows(
    detections: Mapping[str, list[Detections]], truths: list[Truth], told: Mapping[str, Mapping[str, Change]]
) -> list[VariantRow]:
    tables = {
        (variant, subset): {row.class_name: row for row in nuscenes_rows(found, truths, subset, limits)}
        for variant, found in detections.items()
        for subset, limits in LIMITS_M.items()
    }
    rows = []
    for name in next(iter(detections.values()))[0].class_names:
        for subset in LIMITS_M:
            own = {variant: tables[variant, subset][name] for variant in detections}
            rows.append(
                VariantRow(
                    name=name,
                    classes=(name,),
                    subset=subset,
                    objects=next(iter(own.values())).objects,
                    ap_percent={variant: row.ap_percent for variant, row in own.items()},
                    changes=_changes(name, told) if subset == ALL else {},
                )
            )
    return rows


def _mean_row(
    name: str, members: Sequence[str], rows: Sequence[VariantRow], told: Mapping[str, Mapping[str, Change]]
) -> VariantRow:
    own = [row for row in rows if row.subset == ALL and row.name in members and row.objects]
    values = {variant: [row.ap_percent[variant] for row in own] for variant in rows[0].ap_percent}
    return VariantRow(
        name=name,
        classes=tuple(row.name for row in own),
        subset=ALL,
        objects=sum(row.objects for row in own),
        ap_percent={v: float(np.mean([a for a in ap if a is not None])) if own else None for v, ap in values.items()},
        changes=_changes(name, told),
    )


def _changes(name: str, told: Mapping[str, Mapping[str, Change]]) -> dict[str, Change]:
    return {variant: known[name] for variant, known in told.items() if name in known}
