# ruff: noqa: E501 - one replacement per line, however long
"""Small variants of the anchor-head and pillar models, as a user's YAML would make them."""

from pathlib import Path

import numpy as np

from dm3d_deploy.config import config_from_text, load_config

CONFIGS = Path(load_config.__code__.co_filename).parents[1] / "models" / "configs"
# Other ranges, voxel sizes, widths and classes than OpenPCDet's files: (what stands there, what is written instead).
SMALL_2D = (
    ("LAYER_NUMS: [5, 5]", "LAYER_NUMS: [1, 1]"),
    ("NUM_FILTERS: [128, 256]", "NUM_FILTERS: [8, 12]"),
    ("NUM_UPSAMPLE_FILTERS: [256, 256]", "NUM_UPSAMPLE_FILTERS: [8, 8]"),
)
PILLARS_2D = (
    ("LAYER_NUMS: [3, 5, 5]", "LAYER_NUMS: [1, 1, 1]"),
    ("NUM_FILTERS: [64, 128, 256]", "NUM_FILTERS: [8, 12, 16]"),
    ("NUM_UPSAMPLE_FILTERS: [128, 128, 128]", "NUM_UPSAMPLE_FILTERS: [8, 8, 8]"),
    ("NUM_BEV_FEATURES: 64", "NUM_BEV_FEATURES: 8"),
)
VARIANTS = {
    "second": (
        *SMALL_2D,
        ("POINT_CLOUD_RANGE: [0.0, -40.0, -3.0, 70.4, 40.0, 1.0]", "POINT_CLOUD_RANGE: [0.0, -6.4, -3.0, 12.8, 6.4, 1.0]"),
        ("VOXEL_SIZE: [0.05, 0.05, 0.1]", "VOXEL_SIZE: [0.1, 0.1, 0.1]"),
        ("CHANNELS: [16, 16, 32, 64, 64, 128]", "CHANNELS: [4, 4, 6, 8, 8, 8]"),
        ("NUM_BEV_FEATURES: 256", "NUM_BEV_FEATURES: 16"),
        ("MAX_NUMBER_OF_VOXELS: {test: 40000}", "MAX_NUMBER_OF_VOXELS: {test: 4000}"),
    ),
    "pointpillars": (
        *PILLARS_2D,
        ("POINT_CLOUD_RANGE: [0.0, -39.68, -3.0, 69.12, 39.68, 1.0]", "POINT_CLOUD_RANGE: [0.0, -6.4, -3.0, 12.8, 6.4, 1.0]"),
        ("VOXEL_SIZE: [0.16, 0.16, 4.0]", "VOXEL_SIZE: [0.2, 0.2, 4.0]"),
        ("MAX_POINTS_PER_VOXEL: 32", "MAX_POINTS_PER_VOXEL: 4"),
        ("MAX_NUMBER_OF_VOXELS: {test: 40000}", "MAX_NUMBER_OF_VOXELS: {test: 2000}"),
        ("NUM_FILTERS: [64]", "NUM_FILTERS: [8]"),
    ),
    "centerpoint-pillar": (
        *PILLARS_2D,
        ("POINT_CLOUD_RANGE: [-51.2, -51.2, -5.0, 51.2, 51.2, 3.0]", "POINT_CLOUD_RANGE: [-6.4, -6.4, -5.0, 6.4, 6.4, 3.0]"),
        ("NUM_FILTERS: [64, 64]", "NUM_FILTERS: [8, 8]"),
        ("SHARED_CONV_CHANNEL: 64", "SHARED_CONV_CHANNEL: 8"),
    ),
    "voxelnext": (
        ("POINT_CLOUD_RANGE: [-54.0, -54.0, -5.0, 54.0, 54.0, 3.0]", "POINT_CLOUD_RANGE: [-6.4, -6.4, -3.0, 6.4, 6.4, 1.0]"),
        ("VOXEL_SIZE: [0.075, 0.075, 0.2]", "VOXEL_SIZE: [0.1, 0.1, 0.1]"),
        ("MAX_NUMBER_OF_VOXELS: {test: 160000}", "MAX_NUMBER_OF_VOXELS: {test: 4000}"),
        ("CHANNELS: [16, 32, 64, 128, 128]", "CHANNELS: [4, 6, 8, 12, 12]"),
        ("OUT_CHANNEL: 128", "OUT_CHANNEL: 16"),
        ("NUM_BLOCKS: 2", "NUM_BLOCKS: 1"),
        ("SHARED_CONV_CHANNEL: 128", "SHARED_CONV_CHANNEL: 16"),
    ),
}  # fmt: skip


def variant_text(name):
    """The YAML of a small variant."""
    text = (CONFIGS / f"{name}.yaml").read_text()
    for there, instead in VARIANTS[name]:
        assert there in text, there
        text = text.replace(there, instead, 1)
    return text


def variant(name):
    """The configuration of a small variant."""
    return config_from_text(variant_text(name), f"small-{name}.yaml")


def small_cloud_points(columns, count=3000, seed=0):
    """Points around the sensor, thicker near it: some pillars hold many, some one; some lie above every range."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 1, (count, columns)).astype(np.float32)
    points[:, :2] = (rng.normal(0, 1, (count, 2)) * rng.choice([0.4, 4.0], (count, 1)) + (5, 0)).astype(np.float32)
    points[:, 2] = rng.uniform(-2.9, 0.9, count)
    points[:20, 2] = 9.0
    return points
