"""Average precision as ONCE counts it: 3D overlap, heading within a quarter turn, by distance (its once_eval)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int64

from dm3d_deploy.errors import InternalError
from dm3d_deploy.evaluation.curves import ABSENT, COUNTED, IGNORED, FlaggedFrame, precision_curve
from dm3d_deploy.evaluation.nuscenes import Truth
from dm3d_deploy.evaluation.rows import ALL, RANGES, ApRow
from dm3d_deploy.geometry.boxes import iou_3d_matrix, wrap_angle
from dm3d_deploy.pointcloud import Boxes3D, Detections

# The members of each class that is scored, and the overlap that a hit must exceed.
CLASSES = {
    "Pedestrian": (("Pedestrian",), 0.3),
    "Cyclist": (("Cyclist",), 0.5),
    "Vehicle": (("Car", "Bus", "Truck"), 0.7),
    "Car": (("Car",), 0.7),
    "Bus": (("Bus",), 0.7),
    "Truck": (("Truck",), 0.7),
}
MEAN_OVER = ("Vehicle", "Pedestrian", "Cyclist")
POSITIONS = 50
# ONCE's words for the classes of other data sets. Words that are not here count for no class.
ONCE_CLASS = {"car": "Car", "van": "Car", "bus": "Bus", "truck": "Truck", "pedestrian": "Pedestrian",
              "person_sitting": "Pedestrian", "cyclist": "Cyclist", "bicycle": "Cyclist",
              "motorcycle": "Cyclist"}  # fmt: skip


def once_rows(detections: Sequence[Detections], truths: Sequence[Truth]) -> tuple[ApRow, ...]:
    """AP of each class, over all ranges and within 0-30, 30-50 and 50+ m of the sensor (3D distance).

    Labels and detections carry ONCE's class names. Overlap counts as none where the headings differ by more than a
    quarter turn; what lies outside a range is neither a hit nor a mistake within it. Unlike the benchmark's code, which
    also ignores far objects of other classes, a class is compared with itself alone.
    """
    if len(detections) != len(truths) or not truths:
        raise InternalError(f"{len(detections)} frames of detections and {len(truths)} of labels cannot be compared")
    ious = [oriented_iou(truth.boxes, found.boxes) for found, truth in zip(detections, truths, strict=True)]
    subsets = {ALL: (0.0, np.inf), **RANGES}
    rows = []
    for name, (members, least) in CLASSES.items():
        for subset, limits in subsets.items():
            frames = [_flagged(d, t, iou, members, limits) for d, t, iou in zip(detections, truths, ious, strict=True)]
            curve = precision_curve(frames, min_iou=least, positions=POSITIONS, repeat_below=math.inf)
            rows.append(
                ApRow(
                    class_name=name,
                    subset=subset,
                    measure="3d",
                    objects=curve.objects,
                    ap_percent=curve.ap_percent(),
                    recall=tuple(curve.recall.tolist()),
                    precision=tuple(curve.precision.tolist()),
                )
            )
    return tuple(rows)


def once_mean(rows: Sequence[ApRow], subset: str) -> float | None:
    """MAP of a range in percent, over those of vehicle, pedestrian and cyclist that occur there."""
    values = [r.ap_percent for r in rows if r.subset == subset and r.class_name in MEAN_OVER]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def oriented_iou(objects: Boxes3D, found: Boxes3D) -> Float64[np.ndarray, "objects found"]:
    """3D overlap of every pair, 0 where the headings differ by more than a quarter turn."""
    turn = wrap_angle(objects.yaw.astype(np.float64)[:, None] - found.yaw.astype(np.float64)[None, :])
    return np.where(np.abs(turn) > np.pi / 2, 0.0, iou_3d_matrix(objects, found))


def _flagged(
    found: Detections,
    truth: Truth,
    iou: Float64[np.ndarray, "objects found"],
    members: tuple[str, ...],
    limits_m: tuple[float, float],
) -> FlaggedFrame:
    labels = [index for index, name in enumerate(found.class_names) if name in members]
    return FlaggedFrame(
        iou=iou,
        scores=found.scores.astype(np.float64),
        object_flag=_flag(truth.boxes, np.isin(truth.labels, labels), limits_m),
        found_flag=_flag(found.boxes, np.isin(found.labels, labels), limits_m),
        excused=np.zeros(len(found), dtype=bool),
    )


def _flag(
    boxes: Boxes3D, own: Bool[np.ndarray, " boxes"], limits_m: tuple[float, float]
) -> Int64[np.ndarray, " boxes"]:
    away = np.linalg.norm(boxes.centre.astype(np.float64), axis=1)
    inside = (away >= limits_m[0]) & (away < limits_m[1])
    return np.where(own, np.where(inside, COUNTED, IGNORED), ABSENT)
