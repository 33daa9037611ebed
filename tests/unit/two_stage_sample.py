"""Small variants of the detectors with two stages, as a user's YAML would make them."""

from zoo_sample import CONFIGS

from dm3d_deploy.artifacts import digest_of_file
from dm3d_deploy.config import config_from_text
from dm3d_deploy.detect_two_stage import TwoStageDeployed
from engines.onnx_runtime import open_session
from exporters.backbone3d import export_backbone3d
from exporters.bev_head import export_bev_head
from exporters.second_stage import export_second_stage

FIRST = (
    ("[0.0, -40.0, -3.0, 70.4, 40.0, 1.0]", "[0.0, -6.4, -3.0, 12.8, 6.4, 1.0]"),
    ("VOXEL_SIZE: [0.05, 0.05, 0.1]", "VOXEL_SIZE: [0.1, 0.1, 0.1]"),
    ("CHANNELS: [16, 16, 32, 64, 64, 128]", "CHANNELS: [4, 4, 6, 8, 8, 8]"),
    ("NUM_BEV_FEATURES: 256", "NUM_BEV_FEATURES: 16"),
    ("MAX_NUMBER_OF_VOXELS: {test: 40000}", "MAX_NUMBER_OF_VOXELS: {test: 4000}"),
    ("LAYER_NUMS: [5, 5]", "LAYER_NUMS: [1, 1]"),
    ("GRID_SIZE: 6", "GRID_SIZE: 2"),
    ("SHARED_FC: [256, 256]", "SHARED_FC: [12, 8]"),
    ("CLS_FC: [256, 256]", "CLS_FC: [8, 8]"),
    ("REG_FC: [256, 256]", "REG_FC: [8, 8]"),
    ("NMS_POST_MAXSIZE: 100", "NMS_POST_MAXSIZE: 12"),
)
VARIANTS = {
    "voxel-rcnn": (
        *FIRST,
        ("NUM_FILTERS: [64, 128]", "NUM_FILTERS: [8, 12]"),
        ("NUM_UPSAMPLE_FILTERS: [128, 128]", "NUM_UPSAMPLE_FILTERS: [8, 8]"),
        ("[32, 32]", "[6, 7]"),
    ),
    "pv-rcnn": (
        *FIRST,
        ("NUM_FILTERS: [128, 256]", "NUM_FILTERS: [8, 12]"),
        ("NUM_UPSAMPLE_FILTERS: [256, 256]", "NUM_UPSAMPLE_FILTERS: [8, 8]"),
        ("NUM_KEYPOINTS: 2048", "NUM_KEYPOINTS: 64"),
        ("[64, 64]", "[8, 8]"),
        ("[32, 32]", "[6, 6]"),
        ("- [16, 16]", "- [4, 4]"),
    ),
}


def variant_text(name):
    """The YAML of a small variant; what stands there several times is replaced everywhere."""
    text = (CONFIGS / f"{name}.yaml").read_text()
    for there, instead in VARIANTS[name]:
        assert there in text, there
        text = text.replace(there, instead)
    return text


def variant(name):
    """The configuration of a small variant."""
    return config_from_text(variant_text(name), f"small-{name}.yaml")


def deployed_from(detector, folder):
    """The graphs of a detector, opened; what a run's manifest would check is left out."""
    export_bev_head(detector, folder / "head.onnx", precision="fp32")
    export_backbone3d(detector, folder / "backbone.onnx", max_voxels=detector.config.voxels.max_voxels)
    export_second_stage(detector, folder / "second.onnx")
    sessions = {
        name: open_session(folder / f"{name}.onnx", digest=digest_of_file(folder / f"{name}.onnx"), threads=1)
        for name in ("backbone", "head", "second")
    }
    return TwoStageDeployed(config=detector.config, manifest=None, variant="dense", **sessions)
