"""A small CenterPoint and a small scene for the tests of models."""

import numpy as np
import torch

from dm3d_deploy.config import (
    Backbone2dConfig,
    Backbone3dConfig,
    Branch,
    CenterHeadConfig,
    DetectorConfig,
    PostConfig,
    VoxelConfig,
)

TASKS = (("car",), ("bus", "trailer"))
BRANCHES = (("center", 2), ("center_z", 1), ("dim", 3), ("rot", 2))


def small_config(channels=(4, 4, 6, 8, 10, 12)):
    """40 x 64 x 48 cells; the bird's-eye view has 8 x 6."""
    return DetectorConfig(
        name="small",
        dataset="none",
        class_names=tuple(name for task in TASKS for name in task),
        voxels=VoxelConfig(
            point_range_m=(0.0, -3.2, -2.0, 4.8, 3.2, 2.0),
            voxel_size_m=(0.1, 0.1, 0.1),
            max_points_per_voxel=10,
            max_voxels=2000,
            columns=("x", "y", "z", "intensity"),
        ),
        backbone_3d=Backbone3dConfig(name="VoxelResBackBone8x", channels=channels, blocks=2),
        bev_channels=2 * channels[-1],
        backbone_2d=Backbone2dConfig(
            layer_nums=(1, 2), strides=(1, 2), filters=(8, 12), upsample_strides=(1, 2), upsample_filters=(8, 10)
        ),
        head=CenterHeadConfig(
            classes_by_task=TASKS,
            shared_channels=8,
            bias_before_norm=True,
            branches=tuple(
                (
                    *(Branch(name=name, channels=width, convs=2) for name, width in BRANCHES),
                    Branch(name="hm", channels=len(task), convs=3),
                )
                for task in TASKS
            ),
            stride=8,
        ),
        post=PostConfig(
            score_threshold=0.1,
            centre_limit_m=(0.0, -4.0, -3.0, 5.0, 4.0, 3.0),
            max_objects=50,
            nms_threshold=0.2,
            nms_pre=100,
            nms_post=20,
        ),
        text="",
    )


def small_scene(batch_size=1, count=300, seed=0):
    """Random voxels: features [N, 4] and coordinates [N, 4]."""
    rng = np.random.default_rng(seed)
    shape = (batch_size, 40, 64, 48)
    cells = np.sort(rng.choice(np.prod(shape), size=count * batch_size, replace=False))
    coords = np.stack(np.unravel_index(cells, shape), axis=1).astype(np.int64)
    features = rng.uniform(-3, 3, (len(coords), 4)).astype(np.float32)
    return torch.from_numpy(features), torch.from_numpy(coords)
