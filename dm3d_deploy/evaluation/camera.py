"""KITTI's camera: where boxes of the LiDAR frame lie in the image, and boxes of its label files in the LiDAR frame."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64

from dm3d_deploy.errors import InternalError
from dm3d_deploy.geometry.boxes import bev_from_boxes, corners_bev, wrap_angle
from dm3d_deploy.pointcloud import Boxes3D

NEAR_M = 0.1  # what is nearer to the plane of the camera than this is not seen
EDGES = np.array([(i, (i + 1) % 4) for i in range(4)] + [(i + 4, (i + 1) % 4 + 4) for i in range(4)]
                 + [(i, i + 4) for i in range(4)])  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Camera:
    """A pinhole camera: pixels from its rectified frame (x right, y down, z forward), and that from the LiDAR's."""

    projection: Float64[np.ndarray, "3 4"]
    from_lidar: Float64[np.ndarray, "4 4"]
    width_px: int
    height_px: int

    def __post_init__(self) -> None:
        if self.projection.shape != (3, 4) or self.from_lidar.shape != (4, 4):
            raise InternalError(f"camera matrices of {self.projection.shape} and {self.from_lidar.shape}")

    @property
    def heading(self) -> float:
        """Where the camera looks in the LiDAR's horizontal plane (rad)."""
        return math.atan2(self.from_lidar[2, 1], self.from_lidar[2, 0])


def image_boxes(camera: Camera, boxes: Boxes3D) -> Float64[np.ndarray, "boxes 4"]:
    """Left, top, right, bottom (px) of the part of each box that the image shows; zeros where it shows nothing."""
    whole = projected_boxes(camera, boxes)
    limits = np.array([camera.width_px - 1, camera.height_px - 1] * 2, dtype=np.float64)
    shown = whole.clip(0, limits)
    shown[(shown[:, 2:] <= shown[:, :2]).any(axis=1)] = 0.0
    return shown


def projected_boxes(camera: Camera, boxes: Boxes3D) -> Float64[np.ndarray, "boxes 4"]:
    """As `image_boxes` for an image without borders; boxes behind the camera give zeros."""
    seen = _transformed(camera.from_lidar, _corners(boxes))
    start, end = seen[:, EDGES[:, 0]], seen[:, EDGES[:, 1]]
    crossing = (start[..., 2] < NEAR_M) != (end[..., 2] < NEAR_M)
    rise = np.where(crossing, end[..., 2] - start[..., 2], 1.0)
    cuts = start + ((NEAR_M - start[..., 2]) / rise)[..., None] * (end - start)
    points = np.concatenate([seen, cuts], axis=1)
    shown = np.concatenate([seen[..., 2] >= NEAR_M, crossing], axis=1)
    points[~shown] = (0.0, 0.0, NEAR_M)
    pixels = _transformed(camera.projection, points)
    flat = pixels[..., :2] / pixels[..., 2:]
    low = np.where(shown[..., None], flat, np.inf).min(axis=1)
    high = np.where(shown[..., None], flat, -np.inf).max(axis=1)
    result = np.concatenate([low, high], axis=1)
    result[~shown.any(axis=1)] = 0.0
    return result


def points_in_view(camera: Camera, xyz: Float[np.ndarray, "points 3"]) -> Bool[np.ndarray, " points"]:
    """Which points of the LiDAR frame the image shows, whatever stands before them."""
    seen = _transformed(camera.from_lidar, xyz.astype(np.float64))
    ahead = seen[:, 2] >= NEAR_M
    seen[~ahead, 2] = NEAR_M
    pixels = _transformed(camera.projection, seen)
    flat = pixels[:, :2] / pixels[:, 2:]
    inside: np.ndarray = ahead & ((flat >= 0) & (flat <= (camera.width_px - 1, camera.height_px - 1))).all(axis=1)
    return inside


def boxes_from_camera(camera: Camera, rows: Float64[np.ndarray, "boxes 7"]) -> Boxes3D:
    """Boxes at rest in the LiDAR frame from h, w, l, x, y, z, rotation_y of a label line (KITTI's devkit, readme).

    A label gives the middle of the bottom face in the rectified camera frame; both frames' vertical axes are taken as
    one, as OpenPCDet does.
    """
    height, width, length = rows[:, 0], rows[:, 1], rows[:, 2]
    centre = _transformed(np.linalg.inv(camera.from_lidar), rows[:, None, 3:6])[:, 0, :3]
    centre[:, 2] += height / 2
    return Boxes3D(
        centre=centre.astype(np.float32),
        size=np.stack([length, width, height], axis=1).astype(np.float32),
        yaw=wrap_angle(camera.heading - rows[:, 6] - np.pi / 2).astype(np.float32),
        velocity=np.zeros((len(rows), 2), dtype=np.float32),
    )


def camera_from_boxes(camera: Camera, boxes: Boxes3D) -> Float64[np.ndarray, "boxes 7"]:
    """The inverse of `boxes_from_camera`: h, w, l, x, y, z, rotation_y; velocity is lost."""
    size, bottom = boxes.size.astype(np.float64), boxes.centre.astype(np.float64)
    bottom[:, 2] -= size[:, 2] / 2
    place = _transformed(camera.from_lidar, bottom[:, None])[:, 0, :3]
    turn = wrap_angle(camera.heading - boxes.yaw.astype(np.float64) - np.pi / 2)
    return np.concatenate([size[:, ::-1], place, turn[:, None]], axis=1)


def _corners(boxes: Boxes3D) -> Float64[np.ndarray, "boxes 8 3"]:
    """The four corners of the bottom, then those of the top."""
    flat = corners_bev(bev_from_boxes(boxes))
    z, half = boxes.centre[:, 2].astype(np.float64), boxes.size[:, 2].astype(np.float64) / 2
    faces = [
        np.concatenate([flat, np.repeat(level[:, None, None], 4, axis=1)], axis=2) for level in (z - half, z + half)
    ]
    return np.concatenate(faces, axis=1)


def _transformed(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """`points` [..., 3] as homogeneous coordinates through a matrix of four columns, without its last row of four."""
    moved: np.ndarray = points @ matrix[:3, :3].T + matrix[:3, 3]
    return moved
