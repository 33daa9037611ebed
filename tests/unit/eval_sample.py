"""Boxes in a row, as labels and as detections."""

import numpy as np

from dm3d_deploy.evaluation.camera import Camera
from dm3d_deploy.evaluation.kitti import KittiFound, KittiTruth
from dm3d_deploy.evaluation.nuscenes import Truth
from dm3d_deploy.pointcloud import Boxes3D, Detections

CAR, WALKER = (4.0, 2.0, 1.5), (0.8, 0.8, 1.8)
TALL_PX = (100.0, 100.0, 180.0, 160.0)


def boxes(rows):
    """Rows of x, y, z, l, w, h, yaw and perhaps velocity."""
    table = np.array([(*row, *[0.0] * (9 - len(row))) for row in rows], dtype=np.float32).reshape(-1, 9)
    return Boxes3D(centre=table[:, :3], size=table[:, 3:6], yaw=table[:, 6], velocity=table[:, 7:9])


def kitti_truth(rows, types, *, px=None, truncation=None, occlusion=None, areas=()):
    count = len(rows)
    return KittiTruth(
        boxes=boxes(rows),
        types=tuple(types),
        image_px=np.array(px if px is not None else [TALL_PX] * count, dtype=np.float64).reshape(-1, 4),
        truncation=np.array(truncation if truncation is not None else [0.0] * count),
        occlusion=np.array(occlusion if occlusion is not None else [0] * count, dtype=np.int64),
        dont_care_px=np.array(areas, dtype=np.float64).reshape(-1, 4),
    )


def kitti_found(rows, types, scores, *, px=None):
    pixels = px if px is not None else [TALL_PX] * len(rows)
    return KittiFound(
        boxes=boxes(rows),
        types=tuple(types),
        scores=np.array(scores, dtype=np.float64),
        image_px=np.array(pixels, dtype=np.float64).reshape(-1, 4),
    )


def detections(rows, labels, scores, names):
    return Detections(
        boxes=boxes(rows),
        scores=np.array(scores, dtype=np.float32),
        labels=np.array(labels, dtype=np.int64),
        class_names=tuple(names),
    )


def truth(rows, labels):
    return Truth(boxes=boxes(rows), labels=np.array(labels, dtype=np.int64))


def forward_camera(f=700.0, width=1200, height=400):
    """At the LiDAR's origin, looking along x."""
    from_lidar = np.array([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=np.float64)
    projection = np.array([[f, 0, width / 2, 0], [0, f, height / 2, 0], [0, 0, 1, 0]])
    return Camera(projection=projection, from_lidar=from_lidar, width_px=width, height_px=height)
