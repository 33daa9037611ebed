"""Scenes of one block each for the small detector: batches that a training of seconds can learn from."""

import numpy as np
import torch
from models_sample import small_config

from dm3d_deploy.models.detector import build_detector
from dm3d_deploy.pointcloud import Boxes3D
from dm3d_deploy.training.batch import Batch
from dm3d_deploy.training.start import start_weights
from dm3d_deploy.training.targets import center_targets, collate

CONFIG = small_config()
SIZES = {"car": (1.0, 0.5, 0.5), "bus": (2.0, 1.0, 1.0), "trailer": (1.5, 1.5, 1.0)}


def detector():
    made = build_detector(CONFIG)
    start_weights(made, SIZES, seed=1)
    return made


def batches(step: int) -> Batch:
    """Two scenes of one class each: a block of points is the object, its place random."""
    random = np.random.default_rng(step)
    features, coords, frames = [], [], []
    for index in range(2):
        corner = random.integers((8, 8, 8), (24, 48, 32))
        block = np.stack(np.meshgrid(*[np.arange(6)] * 3, indexing="ij"), axis=-1).reshape(-1, 3) + corner
        places = (block[:, ::-1] + 0.5) * 0.1 + CONFIG.voxels.point_range_m[:3]
        features.append(np.concatenate([places, np.full((len(block), 1), 90.0)], axis=1))
        coords.append(np.concatenate([np.full((len(block), 1), index), block], axis=1))
        boxes = Boxes3D(
            centre=places.mean(axis=0, keepdims=True).astype(np.float32),
            size=np.array([SIZES["car"]], dtype=np.float32),
            yaw=np.zeros(1, np.float32),
            velocity=np.zeros((1, 2), np.float32),
        )
        frames.append(
            center_targets(boxes, np.zeros(1, np.int64), CONFIG, low_m=CONFIG.voxels.point_range_m[:2], shape=(8, 6))
        )
    return Batch(
        features=torch.from_numpy(np.concatenate(features).astype(np.float32)),
        coords=torch.from_numpy(np.concatenate(coords).astype(np.int64)),
        shape_zyx=(41, 64, 48),
        size=2,
        targets=collate(frames),
    )
