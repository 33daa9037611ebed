"""What a detector is: OpenPCDet's YAML, read strictly into frozen values."""

from dm3d_deploy.config.backbones import VOXELNEXT, sparse_height
from dm3d_deploy.config.reader import config_from_text, detector_names, load_config
from dm3d_deploy.config.schema import (
    AnchorHeadConfig,
    AnchorPostConfig,
    Backbone2dConfig,
    Backbone3dConfig,
    Branch,
    CenterHeadConfig,
    ClassAnchors,
    DetectorConfig,
    DirectionConfig,
    Grouping,
    KeypointConfig,
    PillarConfig,
    PoolSource,
    PostConfig,
    SecondStageConfig,
    VoxelConfig,
)

__all__ = [
    "VOXELNEXT",
    "AnchorHeadConfig",
    "AnchorPostConfig",
    "Backbone2dConfig",
    "Backbone3dConfig",
    "Branch",
    "CenterHeadConfig",
    "ClassAnchors",
    "DetectorConfig",
    "DirectionConfig",
    "Grouping",
    "KeypointConfig",
    "PillarConfig",
    "PoolSource",
    "PostConfig",
    "SecondStageConfig",
    "VoxelConfig",
    "config_from_text",
    "detector_names",
    "load_config",
    "sparse_height",
]
