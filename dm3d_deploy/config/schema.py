"""The frozen values that say what a detector is."""

from __future__ import annotations

from dataclasses import dataclass

Six = tuple[float, float, float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class VoxelConfig:
    """The grid. Range is x0, y0, z0, x1, y1, z1 in metres; voxel size is x, y, z in metres."""

    point_range_m: tuple[float, float, float, float, float, float]
    voxel_size_m: tuple[float, float, float]
    max_points_per_voxel: int
    max_voxels: int
    columns: tuple[str, ...]

    @property
    def grid_zyx(self) -> tuple[int, int, int]:
        """Cells along z, y, x (OpenPCDet's grid_size, reversed); the sparse tensor has one more along z."""
        low, high = self.point_range_m[:3], self.point_range_m[3:]
        x, y, z = (round((end - start) / step) for start, end, step in zip(low, high, self.voxel_size_m, strict=True))
        return z, y, x


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone3dConfig:
    """Sparse backbone. `channels` are those of conv_input, conv1 to conv4 and conv_out; `blocks` per residual stage.

    OpenPCDet fixes both in code (16, 16, 32, 64, 128, 128 and 2); the YAML keys CHANNELS and NUM_BLOCKS are ours.
    """

    name: str
    channels: tuple[int, int, int, int, int, int]
    blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone2dConfig:
    """BaseBEVBackbone: one entry per block."""

    layer_nums: tuple[int, ...]
    strides: tuple[int, ...]
    filters: tuple[int, ...]
    upsample_strides: tuple[int, ...]
    upsample_filters: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One regression or heat-map branch: its name, output channels and number of convolutions."""

    name: str
    channels: int
    convs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CenterHeadConfig:
    """CenterHead. `branches[i]` are those of task i in OpenPCDet's order: HEAD_ORDER, then hm."""

    classes_by_task: tuple[tuple[str, ...], ...]
    shared_channels: int
    bias_before_norm: bool
    branches: tuple[tuple[Branch, ...], ...]
    stride: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PostConfig:
    """Decoding and NMS of CenterHead; the limit range is in metres."""

    score_threshold: float
    centre_limit_m: tuple[float, float, float, float, float, float]
    max_objects: int
    nms_threshold: float
    nms_pre: int
    nms_post: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorConfig:
    """A whole detector. `text` is the flattened YAML (no `_BASE_CONFIG_`), which reads back to an equal config."""

    name: str
    dataset: str
    class_names: tuple[str, ...]
    voxels: VoxelConfig
    backbone_3d: Backbone3dConfig
    bev_channels: int
    backbone_2d: Backbone2dConfig
    head: CenterHeadConfig
    post: PostConfig
    text: str
