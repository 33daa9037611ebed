"""Average precision as KITTI's object evaluation counts it (devkit_object, evaluate_object; R11 and R40)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from dm3d_deploy.errors import InternalError
from dm3d_deploy.evaluation.camera import Camera, image_boxes
from dm3d_deploy.evaluation.curves import ABSENT, COUNTED, IGNORED, FlaggedFrame, precision_curve
from dm3d_deploy.evaluation.rows import RANGES, ApRow
from dm3d_deploy.geometry.boxes import iou_3d_matrix, iou_bev_matrix, select_boxes
from dm3d_deploy.pointcloud import Boxes3D, Detections

MIN_IOU = {"Pedestrian": 0.5, "Cyclist": 0.5, "Car": 0.7}
# Objects that are neither a hit nor a miss for a class.
NEIGHBOUR = {"Car": "Van", "Pedestrian": "Person_sitting"}
DONT_CARE = "DontCare"
OVERLAPS = {"3d": iou_3d_matrix, "bev": iou_bev_matrix}
POSITIONS = 40
HARD = "hard"
# KITTI's words for the classes of nuScenes, ONCE and the simulator. Others keep their name and count for no class.
KITTI_TYPE = {"car": "Car", "van": "Van", "truck": "Truck", "pedestrian": "Pedestrian", "cyclist": "Cyclist",
              "bicycle": "Cyclist"}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Difficulty:
    """What an object must fulfil to count: more than a height in the image, at most an occlusion and a truncation."""

    name: str
    height_px: float
    occlusion: int
    truncation: float


DIFFICULTIES = (
    Difficulty(name="easy", height_px=40, occlusion=0, truncation=0.15),
    Difficulty(name="moderate", height_px=25, occlusion=1, truncation=0.3),
    Difficulty(name=HARD, height_px=25, occlusion=2, truncation=0.5),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KittiTruth:
    """The labels of a frame: boxes in the LiDAR frame, their types, and what the image shows of them (px)."""

    boxes: Boxes3D
    types: tuple[str, ...]
    image_px: Float64[np.ndarray, "boxes 4"]
    truncation: Float64[np.ndarray, " boxes"]
    occlusion: Int64[np.ndarray, " boxes"]
    dont_care_px: Float64[np.ndarray, "areas 4"]

    def __post_init__(self) -> None:
        lengths = {len(self.boxes), len(self.types), len(self.image_px), len(self.truncation), len(self.occlusion)}
        if len(lengths) != 1:
            raise InternalError(f"the labels of a frame differ in number: {sorted(lengths)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KittiFound:
    """The detections of a frame that the image shows."""

    boxes: Boxes3D
    types: tuple[str, ...]
    scores: Float[np.ndarray, " boxes"]
    image_px: Float64[np.ndarray, "boxes 4"]


def found_in_view(detections: Detections, camera: Camera) -> KittiFound:
    """The detections that the camera sees, in KITTI's words."""
    pixels = image_boxes(camera, detections.boxes)
    seen = np.flatnonzero(pixels[:, 3] > pixels[:, 1])
    names = [detections.class_names[label] for label in detections.labels[seen]]
    return KittiFound(
        boxes=select_boxes(detections.boxes, seen),
        types=tuple(KITTI_TYPE.get(name.lower(), name) for name in names),
        scores=detections.scores[seen],
        image_px=pixels[seen],
    )


def kitti_rows(
    truths: Sequence[KittiTruth], founds: Sequence[KittiFound], *, min_iou: Mapping[str, float] = MIN_IOU
) -> tuple[ApRow, ...]:
    """AP of each class of `min_iou`: 3D and bird's-eye view, R40 and R11, by difficulty, and by range for all counted.

    As in the devkit vans and sitting persons are ignored beside cars and pedestrians, and so are objects too small,
    too occluded or too truncated in the image, and detections too low in it. Two things differ from it: a detection
    that matches nothing and lies in a DontCare area (by the class's overlap, over its own image area) is no false
    positive in 3D and bird's-eye view as in the image, and with fewer than 41 objects, where the devkit cannot give
    100, one score may serve several steps of recall. Ranges are horizontal.
    """
    if len(truths) != len(founds) or not truths:
        raise InternalError(f"{len(founds)} frames of detections and {len(truths)} of labels cannot be compared")
    rows: list[ApRow] = []
    for measure, overlaps in OVERLAPS.items():
        ious = [overlaps(truth.boxes, found.boxes) for truth, found in zip(truths, founds, strict=True)]
        for name, least in min_iou.items():
            for difficulty in DIFFICULTIES:
                frames = [_flagged(*frame, name, difficulty, least) for frame in zip(truths, founds, ious, strict=True)]
                rows += _rows(frames, name, difficulty.name, measure, least)
                if difficulty.name == HARD:
                    for subset, limits in RANGES.items():
                        near = [_between(*f, limits) for f in zip(frames, truths, founds, strict=True)]
                        rows += _rows(near, name, subset, measure, least)
    return tuple(rows)


def _rows(frames: Sequence[FlaggedFrame], name: str, subset: str, measure: str, least: float) -> list[ApRow]:
    curve = precision_curve(frames, min_iou=least, positions=POSITIONS, repeat_below=POSITIONS + 1)
    values = {"R40": curve.ap_percent(), "R11": curve.ap_percent(every=4, first=0)}
    return [
        ApRow(
            class_name=name,
            subset=subset,
            measure=f"{measure} {kind}",
            objects=curve.objects,
            ap_percent=value,
            recall=tuple(curve.recall.tolist()),
            precision=tuple(curve.precision.tolist()),
        )
        for kind, value in values.items()
    ]


def _flagged(
    truth: KittiTruth, found: KittiFound, iou: np.ndarray, name: str, difficulty: Difficulty, least: float
) -> FlaggedFrame:
    types = np.array([word.lower() for word in truth.types], dtype=np.str_)
    own, neighbour = types == name.lower(), types == NEIGHBOUR.get(name, name).lower()
    hidden = (
        (truth.occlusion > difficulty.occlusion)
        | (truth.truncation > difficulty.truncation)
        | (_height(truth.image_px) <= difficulty.height_px)
    )
    object_flag = np.where(own & ~hidden, COUNTED, np.where(own | neighbour, IGNORED, ABSENT))
    detected = np.array([word.lower() for word in found.types], dtype=np.str_) == name.lower()
    # The devkit ignores every low detection, also of other classes: it may then take an object from the count.
    low = _height(found.image_px) < difficulty.height_px
    return FlaggedFrame(
        iou=iou,
        scores=found.scores.astype(np.float64),
        object_flag=object_flag,
        found_flag=np.where(low, IGNORED, np.where(detected, COUNTED, ABSENT)),
        excused=inside_areas(found.image_px, truth.dont_care_px, least),
    )


def _between(frame: FlaggedFrame, truth: KittiTruth, found: KittiFound, limits_m: tuple[float, float]) -> FlaggedFrame:
    """The frame with all that counts outside the range ignored instead."""
    flags = []
    for boxes, flag in ((truth.boxes, frame.object_flag), (found.boxes, frame.found_flag)):
        away = np.hypot(boxes.centre[:, 0], boxes.centre[:, 1])
        outside = (away < limits_m[0]) | (away >= limits_m[1])
        flags.append(np.where((flag == COUNTED) & outside, IGNORED, flag))
    return FlaggedFrame(
        iou=frame.iou, scores=frame.scores, object_flag=flags[0], found_flag=flags[1], excused=frame.excused
    )


def _height(image_px: Float64[np.ndarray, "boxes 4"]) -> Float64[np.ndarray, " boxes"]:
    height: np.ndarray = image_px[:, 3] - image_px[:, 1]
    return height


def inside_areas(
    boxes: Float64[np.ndarray, "boxes 4"], areas: Float64[np.ndarray, "areas 4"], share: float
) -> Bool[np.ndarray, " boxes"]:
    """Which image boxes lie with more than `share` of themselves in one of the areas."""
    low = np.maximum(boxes[:, None, :2], areas[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], areas[None, :, 2:])
    shared = np.maximum(high - low, 0.0).prod(axis=2)
    whole = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    inside: np.ndarray = (shared > share * whole[:, None]).any(axis=1)
    return inside
