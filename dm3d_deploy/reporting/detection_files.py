"""Detections on disk: strict JSON that loses nothing, and KITTI-style text lines; readers for both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dm3d_deploy.artifacts import write_bytes, write_json
from dm3d_deploy.errors import UsageError, nearest
from dm3d_deploy.pointcloud import Boxes3D, Detections

SCHEMA = 1
KITTI_COLUMNS = ("class", "x", "y", "z", "l", "w", "h", "yaw", "score")
FILE_KEYS = frozenset({"schema", "frame", "class_names", "boxes"})
BOX_KEYS = frozenset({"class", "score", "centre_m", "size_m", "yaw_rad", "velocity_mps"})


def detections_to_json(detections: Detections, *, frame: str, moving: bool = True) -> dict[str, Any]:
    """Plain data: sensor frame, x forward, y left, z up; centre and size (length, width, height) in m, yaw about z.

    Of a detector that estimates no velocities (`moving` is False) they are null.
    """
    boxes = detections.boxes
    return {
        "schema": SCHEMA,
        "frame": frame,
        "class_names": list(detections.class_names),
        "boxes": [
            {
                "class": detections.class_names[detections.labels[i]],
                "score": _shortest(detections.scores[i]),
                "centre_m": [_shortest(v) for v in boxes.centre[i]],
                "size_m": [_shortest(v) for v in boxes.size[i]],
                "yaw_rad": _shortest(boxes.yaw[i]),
                "velocity_mps": [_shortest(v) for v in boxes.velocity[i]] if moving else None,
            }
            for i in range(len(detections))
        ],
    }


def _shortest(value: np.float32) -> float:
    """The shortest decimal that reads back as the same float32."""
    return float(str(value))


def write_detections(path: Path, detections: Detections, *, frame: str, moving: bool = True) -> None:
    """Write `detections_to_json` whole."""
    write_json(path, detections_to_json(detections, frame=frame, moving=moving))


def read_detections(path: Path) -> tuple[Detections, str]:
    """The detections and the frame's name of a file that `write_detections` wrote."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_int=float, parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} cannot be read as detections: {error}.", fix="give a file written by dm3d-deploy detect"
        ) from None
    return detections_from_json(data, source=str(path))


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def detections_from_json(data: Any, *, source: str) -> tuple[Detections, str]:
    """The inverse of `detections_to_json`, null being at rest; UsageError names the box and the key that do not fit."""
    _check_keys(data, FILE_KEYS, source)
    if data["schema"] != SCHEMA:
        raise _refusal(source, f"has the schema {data['schema']!r}; this version reads {SCHEMA}")
    names, boxes = data["class_names"], data["boxes"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise _refusal(source, "has class_names that are not a list of distinct words")
    if not isinstance(data["frame"], str) or not isinstance(boxes, list):
        raise _refusal(source, "has a frame that is no text or boxes that are no list")
    rows = [_row(box, f"{source}, box {index}") for index, box in enumerate(boxes)]
    labels = [_label(box["class"], names, f"{source}, box {index}") for index, box in enumerate(boxes)]
    return _detections(rows, labels, tuple(names), source), data["frame"]


def _check_keys(data: Any, known: frozenset[str], source: str) -> None:
    if not isinstance(data, dict):
        raise _refusal(source, f"is a {type(data).__name__} where an object was expected")
    missing, unknown = sorted(known - data.keys()), sorted(data.keys() - known)
    if missing:
        raise _refusal(source, f"lacks {', '.join(missing)}")
    if unknown:
        raise _refusal(source, f"has the unknown key '{unknown[0]}' ({nearest(unknown[0], sorted(known))})")


def _row(box: Any, source: str) -> list[float]:
    """Centre, size, yaw, velocity, score."""
    _check_keys(box, BOX_KEYS, source)
    values: list[float] = []
    box = {**box, "velocity_mps": [0.0, 0.0]} if box["velocity_mps"] is None else box
    for key, count in (("centre_m", 3), ("size_m", 3), ("yaw_rad", 0), ("velocity_mps", 2), ("score", 0)):
        numbers = box[key] if count else [box[key]]
        if not isinstance(numbers, list) or len(numbers) != max(count, 1) or not all(map(_is_number, numbers)):
            raise _refusal(source, f"has a {key} that is not {f'{count} numbers' if count else 'a number'}")
        values.extend(map(float, numbers))
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _label(name: Any, names: Sequence[str], source: str) -> int:
    if name not in names:
        raise _refusal(source, f"has the class '{name}' ({nearest(str(name), names)})")
    return names.index(name)


def _detections(
    rows: Sequence[Sequence[float]], labels: Sequence[int], names: tuple[str, ...], source: str
) -> Detections:
    """Rows of centre, size, yaw, velocity, score."""
    exact = np.array(rows, dtype=np.float64).reshape(-1, 10)
    with np.errstate(over="ignore"):  # what overflows is refused in the next line
        values = exact.astype(np.float32)
    if not np.isfinite(values).all():
        box = int(np.argwhere(~np.isfinite(values))[0, 0])
        raise _refusal(f"{source}, box {box}", "holds a number that float32 cannot hold")
    boxes = Boxes3D(centre=values[:, :3], size=values[:, 3:6], yaw=values[:, 6], velocity=values[:, 7:9])
    return Detections(boxes=boxes, scores=values[:, 9], labels=np.array(labels, dtype=np.int64), class_names=names)


def _refusal(source: str, reason: str) -> UsageError:
    return UsageError(f"{source} {reason}.", fix="give a file written by dm3d-deploy detect")


def write_kitti_text(path: Path, detections: Detections) -> None:
    """One line per box: `class x y z l w h yaw score`, in the sensor frame: m, rad, centre at half height.

    KITTI's own result files stand in the camera frame and start with an image box; these do not. Velocity is lost.
    """
    spaced = [name for name in detections.class_names if name.split() != [name]]
    if spaced:
        raise UsageError(
            f"the class name '{spaced[0]}' holds a space, which separates the columns of KITTI text.",
            fix="write JSON, or rename the class",
        )
    boxes = detections.boxes
    numbers = np.concatenate([boxes.centre, boxes.size, boxes.yaw[:, None], detections.scores[:, None]], axis=1)
    lines = [
        " ".join([detections.class_names[label], *(str(value) for value in row)]) + "\n"
        for label, row in zip(detections.labels, numbers, strict=True)
    ]
    write_bytes(path, "".join(lines).encode())


def read_kitti_text(path: Path, class_names: tuple[str, ...]) -> Detections:
    """Read what `write_kitti_text` wrote; boxes are at rest, for the text holds no velocity."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as text: {error}.", fix="give a file of KITTI-style lines") from None
    rows, labels = [], []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        where = f"{path}, line {number}"
        try:
            values = [float(word) for word in words[1:]]
        except ValueError:
            values = []
        if len(values) != len(KITTI_COLUMNS) - 1:
            raise UsageError(
                f"{where} does not hold a class and {len(KITTI_COLUMNS) - 1} numbers.",
                fix=f"give lines of: {' '.join(KITTI_COLUMNS)}",
            )
        labels.append(_label(words[0], class_names, where))
        rows.append([*values[:7], 0.0, 0.0, values[7]])
    return _detections(rows, labels, class_names, str(path))
