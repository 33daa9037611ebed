"""Labelled frames from a folder in KITTI's layout (velodyne, label_2, calib), real or written by `simulate`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calib.readers import SUFFIXES, read_points
from dm3d_deploy.errors import FrameError, UsageError, nearest
from dm3d_deploy.evaluation.camera import Camera, boxes_from_camera
from dm3d_deploy.evaluation.kitti import DONT_CARE, KittiTruth
from dm3d_deploy.evaluation.labels import FrameLabels
from dm3d_deploy.geometry.boxes import points_in_boxes
from dm3d_deploy.pointcloud import Boxes3D, PointCloud

SCHEMA = 1
INFO_NAME = "dataset.json"
INFO_KEYS = frozenset({"schema", "sensor", "seed", "frames", "columns", "classes", "objects"})
OBJECT_KEYS = frozenset({"seed", "num_points", "velocity_mps"})
POINTS, LABELS, CALIB, OBJECTS = "velodyne", "label_2", "calib", "objects"
KITTI_TYPES = ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc", DONT_CARE)
OTHER_TYPES = ("bus", "trailer", "construction_vehicle", "barrier", "motorcycle", "bicycle", "traffic_cone")
LABEL_WORDS = 15
IMAGE_PX = (1242, 375)  # KITTI's usual image; its sizes differ by a few pixels and stand in no text file
NAMES_CHOOSE = "name the frames that have them (evaluate --names)"
IMAGES = {b"\x89PNG": "a PNG image", b"\xff\xd8\xff": "a JPEG image"}


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetInfo:
    """What `simulate` wrote beside the frames; `seed` is that of frame 000000, the others count up."""

    sensor: str
    seed: int
    frames: int
    columns: tuple[str, ...]
    classes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data for dataset.json."""
        return {
            "schema": SCHEMA,
            "sensor": self.sensor,
            "seed": self.seed,
            "frames": self.frames,
            "columns": list(self.columns),
            "classes": list(self.classes),
            "objects": f"{OBJECTS}/NAME.json: points in each box and velocity (m/s), in the order of {LABELS}",
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFrame:
    """Points and labels of one frame."""

    name: str
    cloud: PointCloud
    labels: FrameLabels


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledFolder:
    """A folder whose frames all have points, labels and calibration; `info` is None where people labelled it."""

    root: Path
    paths: Mapping[str, Path]
    info: DatasetInfo | None

    @property
    def names(self) -> tuple[str, ...]:
        """The frames in order."""
        return tuple(self.paths)

    def read(self, name: str) -> DatasetFrame:
        """One frame. Raises FrameError for points and UsageError for labels that cannot be read."""
        path = self.paths[name]
        refuse_image(path)
        cloud = read_points(path, columns=self.info.columns if self.info else None)
        camera, truth = self.read_truth(name)
        if self.info is None:
            counts = points_in_boxes(cloud.points[:, :3], truth.boxes).sum(axis=1)
        else:
            counts, truth = _with_objects(truth, self.root / OBJECTS / f"{name}.json")
        labels = FrameLabels(truth=truth, num_points=counts, camera=camera, all_around=self.info is not None)
        return DatasetFrame(name=name, cloud=cloud, labels=labels)

    def read_truth(self, name: str) -> tuple[Camera, KittiTruth]:
        """Camera and labels of one frame, its points left alone."""
        camera = read_camera(self.root / CALIB / f"{name}.txt")
        known = (*KITTI_TYPES, *OTHER_TYPES, *(self.info.classes if self.info else ()))
        return camera, read_labels(self.root / LABELS / f"{name}.txt", camera, known)


def refuse_image(path: Path) -> None:
    """Raise FrameError for a picture that was put where points should be, whatever its ending."""
    with path.open("rb") as file:
        start = file.read(4)
    for mark, what in IMAGES.items():
        if start.startswith(mark):
            raise FrameError(f"{path} is {what}, not points.", fix=f"put the LiDAR frames into {POINTS}")


def open_dataset(
    path: str | Path, names: Sequence[str] | None = None, *, otherwise: str = NAMES_CHOOSE
) -> LabelledFolder:
    """The frames of `path` or `path`/training, all of them or those named, without reading points.

    `otherwise` is what a caller offers, beside adding the files, where frames have no labels or calibration.
    Raises UsageError for a folder of another layout and for names it does not hold, FrameError for frames without
    labels or calibration, for images among the points, and for a simulated set that was not written to its end.
    """
    root = next((base for base in (Path(path), Path(path) / "training") if (base / POINTS).is_dir()), None)
    if root is None:
        raise UsageError(
            f"{path} is no labelled data set: there is no folder {POINTS} in it.",
            fix=f"give a folder with {POINTS}, {LABELS} and {CALIB}, or write one: dm3d-deploy simulate OUT",
        )
    files = sorted(p for p in (root / POINTS).iterdir() if p.is_file() and not p.name.startswith("."))
    strange = [p for p in files if p.suffix.lower() not in SUFFIXES and p.suffix != ".partial"]
    if strange:
        raise FrameError(
            f"{strange[0]} is no point cloud: {POINTS} holds files that end in {', '.join(SUFFIXES)}.",
            fix=f"put images elsewhere and the LiDAR frames into {POINTS}",
        )
    paths = {p.stem: p for p in files if p.suffix != ".partial"}
    info = read_info(root / INFO_NAME) if (root / INFO_NAME).is_file() else None
    chosen = tuple(paths) if names is None else tuple(names)
    unknown = [name for name in chosen if name not in paths]
    if unknown:
        raise UsageError(f"{root} has no frame '{unknown[0]}'.", fix=nearest(unknown[0], paths))
    if not chosen:
        raise FrameError(f"{root / POINTS} holds no frame.", fix="copy the LiDAR frames into it")
    for part in (LABELS, CALIB):
        _check_complete(root, part, chosen, otherwise)
    if info is not None and names is None and len(chosen) < info.frames:
        raise FrameError(
            f"{root} holds {len(chosen)} of its {info.frames} simulated frames.",
            fix="run the same dm3d-deploy simulate again: it goes on from there",
        )
    return LabelledFolder(root=root, paths={name: paths[name] for name in chosen}, info=info)


def _check_complete(root: Path, part: str, names: Sequence[str], otherwise: str) -> None:
    missing = [name for name in names if not (root / part / f"{name}.txt").is_file()]
    if missing:
        what = "labels" if part == LABELS else "calibration"
        raise FrameError(
            f"{len(missing)} of {len(names)} frames of {root} have no {what}, first {part}/{missing[0]}.txt.",
            fix=f"add the files, or {otherwise}",
        )


def read_info(path: Path) -> DatasetInfo:
    """The dataset.json of a simulated set."""
    data = _json_object(path, INFO_KEYS)
    if data["schema"] != SCHEMA:
        raise UsageError(f"{path} has the schema {data['schema']!r}; this version reads {SCHEMA}.", fix="simulate anew")
    try:
        info = DatasetInfo(
            sensor=str(data["sensor"]),
            seed=int(data["seed"]),
            frames=int(data["frames"]),
            columns=tuple(map(str, data["columns"])),
            classes=tuple(map(str, data["classes"])),
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path} cannot be understood: {error}.", fix="simulate the set anew") from None
    return info


def read_camera(path: Path) -> Camera:
    """The left colour camera (P2) of a KITTI calibration file."""
    rows: dict[str, np.ndarray] = {}
    for number, line in enumerate(_lines(path), start=1):
        key, _, values = line.partition(":")
        if key in ("P2", "R0_rect", "Tr_velo_to_cam"):
            rows[key] = _numbers(values.split(), f"{path}, line {number}")
    wanted = {"P2": 12, "R0_rect": 9, "Tr_velo_to_cam": 12}
    bad = [key for key, count in wanted.items() if key not in rows or len(rows[key]) != count]
    if bad:
        raise UsageError(f"{path} has no line {bad[0]} of {wanted[bad[0]]} numbers.", fix="copy KITTI's file again")
    rectify, move = np.eye(4), np.eye(4)
    rectify[:3, :3] = rows["R0_rect"].reshape(3, 3)
    move[:3] = rows["Tr_velo_to_cam"].reshape(3, 4)
    if abs(np.linalg.det((rectify @ move)[:3, :3]) - 1) > 0.01:
        raise UsageError(f"{path}: R0_rect and Tr_velo_to_cam are no rotation.", fix="copy KITTI's file again")
    return Camera(
        projection=rows["P2"].reshape(3, 4), from_lidar=rectify @ move, width_px=IMAGE_PX[0], height_px=IMAGE_PX[1]
    )


def read_labels(path: Path, camera: Camera, known: Sequence[str]) -> KittiTruth:
    """A KITTI label file, its boxes in the LiDAR frame; `known` are the words it may use, in any case."""
    spelling = {word.lower() for word in known}
    types: list[str] = []
    rows: list[np.ndarray] = []
    areas: list[np.ndarray] = []
    for number, line in enumerate(_lines(path), start=1):
        words = line.split()
        if not words:
            continue
        where = f"{path}, line {number}"
        if len(words) != LABEL_WORDS:
            raise UsageError(
                f"{where} has {len(words)} words; a label has {LABEL_WORDS}.",
                fix="give KITTI's label_2 files: type truncated occluded alpha box(4) size(3) place(3) rotation_y",
            )
        if words[0].lower() not in spelling:
            raise UsageError(
                f"{where} has the class '{words[0]}', which nothing here knows.",
                fix=f"{nearest(words[0], dict.fromkeys(known))}; rename it, or remove the line",
            )
        values = _numbers(words[1:], where)
        if words[0].lower() == DONT_CARE.lower():
            areas.append(values[3:7])
            continue
        if not (values[7:10] > 0).all():
            raise UsageError(f"{where} has a size that is not positive.", fix="correct the label, or remove the line")
        types.append(words[0])
        rows.append(values)
    table = np.array(rows, dtype=np.float64).reshape(-1, LABEL_WORDS - 1)
    return KittiTruth(
        boxes=boxes_from_camera(camera, table[:, 7:14]),
        types=tuple(types),
        image_px=table[:, 3:7],
        truncation=table[:, 0],
        occlusion=table[:, 1].astype(np.int64),
        dont_care_px=np.array(areas, dtype=np.float64).reshape(-1, 4),
    )


def _with_objects(truth: KittiTruth, path: Path) -> tuple[np.ndarray, KittiTruth]:
    """The counts of points and the labels with their velocities."""
    data = _json_object(path, OBJECT_KEYS)
    try:
        counts = np.array(data["num_points"], dtype=np.int64).reshape(-1)
        velocity = np.array(data["velocity_mps"], dtype=np.float32).reshape(-1, 2)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path} cannot be understood: {error}.", fix="simulate the set anew") from None
    if not len(counts) == len(velocity) == len(truth.boxes) or not np.isfinite(velocity).all():
        raise UsageError(
            f"{path} describes {len(counts)} objects and {len(velocity)} velocities; {LABELS} has {len(truth.boxes)}.",
            fix="simulate the set anew",
        )
    old = truth.boxes
    boxes = Boxes3D(centre=old.centre, size=old.size, yaw=old.yaw, velocity=velocity)
    return counts, KittiTruth(
        boxes=boxes,
        types=truth.types,
        image_px=truth.image_px,
        truncation=truth.truncation,
        occlusion=truth.occlusion,
        dont_care_px=truth.dont_care_px,
    )


def _json_object(path: Path, keys: frozenset[str]) -> dict[str, Any]:
    try:
        data = json.loads("\n".join(_lines(path)))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON: {error}.", fix="simulate the set anew") from None
    if not isinstance(data, dict) or data.keys() != keys:
        raise UsageError(f"{path} does not have the keys {', '.join(sorted(keys))}.", fix="simulate the set anew")
    return data


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as text: {error}.", fix="copy the file again") from None


def _numbers(words: Sequence[str], where: str) -> np.ndarray:
    try:
        values = np.array([float(word) for word in words])
    except ValueError as error:
        raise UsageError(f"{where}: {error}.", fix="correct the line, or copy the file again") from None
    if not np.isfinite(values).all():
        raise UsageError(f"{where} holds a value that is not finite.", fix="correct the line")
    return values
