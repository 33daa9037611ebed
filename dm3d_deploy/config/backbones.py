"""The sparse 3D backbone, the way to the bird's-eye view, and the dense 2D backbone."""

from __future__ import annotations

import math
from typing import cast

from dm3d_deploy import yaml_reader
from dm3d_deploy.config.kinds import COUNT, COUNTS
from dm3d_deploy.config.schema import Backbone2dConfig, Backbone3dConfig, VoxelConfig
from dm3d_deploy.yaml_reader import Section

SPARSE_STRIDE = 8
SPARSE_CHANNELS: tuple[int, ...] = (16, 16, 32, 64, 128, 128)
SPARSE_BLOCKS = 2


def backbone_3d_of(section: Section) -> Backbone3dConfig:
    """The sparse backbone."""
    section.only(("NAME", "CHANNELS", "NUM_BLOCKS"))
    channels = section.get_or("CHANNELS", yaml_reader.sequence(COUNT, 6), SPARSE_CHANNELS)
    return Backbone3dConfig(
        name=section.kept["NAME"],
        channels=cast("tuple[int, int, int, int, int, int]", channels),
        blocks=section.get_or("NUM_BLOCKS", yaml_reader.integer(1, 64), SPARSE_BLOCKS),
    )


def sparse_height(cells_z: int) -> int:
    """Cells along z after the sparse backbone: OpenPCDet pads the grid by one, then four strided convolutions.

    Kernel 3, stride 2 each; padding along z is 1, 1, 0 in conv2 to conv4 and 0 in conv_out (VoxelResBackBone8x).
    """
    height = cells_z + 1
    for padding in (1, 1, 0, 0):
        height = (height + 2 * padding - 3) // 2 + 1
    return height


def bev_channels_of(section: Section, backbone: Backbone3dConfig, voxels: VoxelConfig) -> int:
    """Channels of the bird's-eye view, which the file states and the backbone makes."""
    section.only(("NAME", "NUM_BEV_FEATURES"))
    stated = section.get("NUM_BEV_FEATURES", yaml_reader.integer(1, 1 << 16))
    height = sparse_height(voxels.grid_zyx[0])
    made = backbone.channels[5] * height
    if stated != made:
        section.fail(
            "NUM_BEV_FEATURES",
            f"is {stated}, but {backbone.channels[5]} channels x {height} cells left along z are {made}",
            fix=f"write {made}, or change the grid along z" if made else "give the grid more cells along z",
        )
    return stated


def backbone_2d_of(section: Section, voxels: VoxelConfig) -> Backbone2dConfig:
    """The dense backbone, whose strides must fit the grid."""
    section.only(("NAME", "LAYER_NUMS", "LAYER_STRIDES", "NUM_FILTERS", "UPSAMPLE_STRIDES", "NUM_UPSAMPLE_FILTERS"))
    blocks = section.get("LAYER_NUMS", COUNTS)
    each = yaml_reader.sequence(COUNT, len(blocks))
    config = Backbone2dConfig(
        layer_nums=blocks,
        strides=section.get("LAYER_STRIDES", each),
        filters=section.get("NUM_FILTERS", each),
        upsample_strides=section.get("UPSAMPLE_STRIDES", each),
        upsample_filters=section.get("NUM_UPSAMPLE_FILTERS", each),
    )
    strides = [math.prod(config.strides[: index + 1]) for index in range(len(blocks))]
    for stride, up in zip(strides, config.upsample_strides, strict=True):
        if stride != up * strides[0]:
            section.fail(
                "UPSAMPLE_STRIDES",
                f"does not bring the blocks to one size: strides {strides}, upsampled {list(config.upsample_strides)}",
                fix=f"write {[one // strides[0] for one in strides]}",
            )
    whole = SPARSE_STRIDE * strides[-1]
    for axis, cells in zip("yx", voxels.grid_zyx[1:], strict=True):
        if cells % whole:
            section.fail(
                "LAYER_STRIDES",
                f"needs a multiple of {whole} cells along {axis} (8 of the sparse backbone), the grid has {cells}",
                fix="change POINT_CLOUD_RANGE or VOXEL_SIZE",
            )
    return config
