"""Simulated frames as a folder in KITTI's layout, and as labelled frames in memory."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64

from calib.dataset import CALIB, IMAGE_PX, LABELS, OBJECTS, POINTS, DatasetFrame
from calib.simulator import CLASS_NAMES, SENSORS, SimulatedFrame
from calib.simulator.sensor import Sensor
from dm3d_deploy.artifacts import write_bytes, write_json
from dm3d_deploy.evaluation.camera import Camera, camera_from_boxes, image_boxes, projected_boxes
from dm3d_deploy.evaluation.kitti import KittiTruth
from dm3d_deploy.evaluation.labels import FrameLabels
from dm3d_deploy.geometry.boxes import wrap_angle
from dm3d_deploy.pointcloud import Boxes3D

FOCAL_PX, MIDDLE_PX = 721.5377, (609.5593, 172.854)  # KITTI's P2
MIN_POINTS = 5
# Share of the rays through a box that came back from it, from which an object is taken as visible, partly visible.
VISIBLE_SHARES = (0.4, 0.15)
HIDDEN = 3


def camera_of(sensor: Sensor) -> Camera:
    """A camera like KITTI's at the origin of the LiDAR, looking where the car drives."""
    cos, sin = math.cos(sensor.forward_rad), math.sin(sensor.forward_rad)
    from_lidar = np.array([[sin, -cos, 0, 0], [0, 0, -1, 0], [cos, sin, 0, 0], [0, 0, 0, 1]], dtype=np.float64)
    projection = np.array([[FOCAL_PX, 0, MIDDLE_PX[0], 0], [0, FOCAL_PX, MIDDLE_PX[1], 0], [0, 0, 1, 0]])
    return Camera(projection=projection, from_lidar=from_lidar, width_px=IMAGE_PX[0], height_px=IMAGE_PX[1])


def labelled_frame(frame: SimulatedFrame) -> DatasetFrame:
    """A simulated frame with labels as KITTI's.

    Truncation is the share of the box's image that lies outside. Occlusion is 0, 1 or 2 by the share of the rays
    through the box that came back from it, and 3, which counts in no difficulty, below five points.
    """
    sensor = SENSORS[frame.sensor]
    camera = camera_of(sensor)
    pixels, whole = image_boxes(camera, frame.boxes), projected_boxes(camera, frame.boxes)
    areas = [(box[:, 2:] - box[:, :2]).prod(axis=1) for box in (pixels, whole)]
    truth = KittiTruth(
        boxes=frame.boxes,
        types=tuple(CLASS_NAMES[label] for label in frame.labels),
        image_px=pixels,
        truncation=1 - np.divide(areas[0], areas[1], out=np.zeros(len(pixels)), where=areas[1] > 0),
        occlusion=_occlusion(frame, sensor),
        dont_care_px=np.zeros((0, 4)),
    )
    labels = FrameLabels(truth=truth, num_points=frame.num_points, camera=camera, all_around=True)
    return DatasetFrame(name=f"{frame.sensor} seed {frame.seed}", cloud=frame.cloud, labels=labels)


def rays_through(sensor: Sensor, boxes: Boxes3D) -> Int64[np.ndarray, " boxes"]:
    """How many rays of one sweep pass through each box, with nothing else in the world."""
    slope, azimuth = sensor.tangent, sensor.azimuth
    counts = np.zeros(len(boxes), dtype=np.int64)
    for row in range(len(boxes)):
        x, y, z = boxes.centre[row].astype(np.float64)
        half = boxes.size[row].astype(np.float64) / 2
        away, reach = math.hypot(x, y), math.hypot(half[0], half[1])
        spread = math.asin(min(1.0, reach / away)) if away > 0 else math.pi
        near = np.abs(wrap_angle(azimuth - math.atan2(y, x))) <= spread if away > reach else np.ones(len(azimuth), bool)
        turn = azimuth[near] - float(boxes.yaw[row])
        start = _turned(-x, -y, -float(boxes.yaw[row]))
        enter, leave = _slab(start[0], np.cos(turn), half[0])
        other = _slab(start[1], np.sin(turn), half[1])
        enter, leave = np.maximum(np.maximum(enter, other[0]), 0.0), np.minimum(leave, other[1])
        # Along a ray of slope s the height at horizontal distance d is lift + s d.
        first, last = (sensor.lift_m[:, None] + slope[:, None] * d[None, :] - z for d in (enter, leave))
        hit = (np.minimum(first, last) <= half[2]) & (np.maximum(first, last) >= -half[2]) & (leave > enter)
        counts[row] = np.count_nonzero(hit)
    return counts


def _turned(x: float, y: float, angle: float) -> tuple[float, float]:
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * x - sin * y, sin * x + cos * y


def _slab(start: float, step: Float64[np.ndarray, " rays"], half: float) -> tuple[np.ndarray, np.ndarray]:
    """Where start + t step enters and leaves [-half, half]."""
    safe = np.where(np.abs(step) < 1e-12, 1e-12, step)
    a, b = (-half - start) / safe, (half - start) / safe
    return np.minimum(a, b), np.maximum(a, b)


def _occlusion(frame: SimulatedFrame, sensor: Sensor) -> Int64[np.ndarray, " boxes"]:
    sweeps = _sweeps_of(frame)
    share = frame.num_points / np.maximum(sweeps * rays_through(sensor, frame.boxes), 1)
    level = sum((share < limit).astype(np.int64) for limit in VISIBLE_SHARES)
    return np.where(frame.num_points < MIN_POINTS, HIDDEN, level)


def _sweeps_of(frame: SimulatedFrame) -> int:
    if "timestamp" not in frame.cloud.columns:
        return 1
    return len(np.unique(frame.cloud.column("timestamp")))


def write_frame(root: Path, name: str, frame: SimulatedFrame) -> None:
    """Points, calibration, objects and last the labels of a frame: whoever finds labels finds the rest."""
    labelled = labelled_frame(frame)
    write_bytes(root / POINTS / f"{name}.bin", frame.cloud.points.astype("<f4").tobytes())
    write_bytes(root / CALIB / f"{name}.txt", _calibration_text(labelled.labels.camera).encode())
    objects = {
        "seed": frame.seed,
        "num_points": frame.num_points.tolist(),
        "velocity_mps": [[float(str(v)) for v in row] for row in frame.boxes.velocity],
    }
    write_json(root / OBJECTS / f"{name}.json", objects)
    write_bytes(root / LABELS / f"{name}.txt", _label_text(labelled).encode())


def _label_text(frame: DatasetFrame) -> str:
    truth = frame.labels.truth
    rows = camera_from_boxes(frame.labels.camera, truth.boxes)
    alpha = wrap_angle(rows[:, 6] - np.arctan2(rows[:, 3], rows[:, 5]))
    lines = []
    for index, word in enumerate(truth.types):
        pixels = " ".join(f"{v:.2f}" for v in truth.image_px[index])
        place = " ".join(f"{v:.4f}" for v in rows[index])
        lines.append(
            f"{word} {truth.truncation[index]:.2f} {truth.occlusion[index]} {alpha[index]:.4f} {pixels} {place}\n"
        )
    return "".join(lines)


def _calibration_text(camera: Camera) -> str:
    identity = "1 0 0 0 1 0 0 0 1"
    projection = " ".join(f"{v:.12e}" for v in camera.projection.ravel())
    move = " ".join(f"{v:.12e}" for v in camera.from_lidar[:3].ravel())
    cameras = "".join(f"P{index}: {projection}\n" for index in range(4))
    return f"{cameras}R0_rect: {identity}\nTr_velo_to_cam: {move}\nTr_imu_to_velo: 1 0 0 0 0 1 0 0 0 0 1 0\n"
