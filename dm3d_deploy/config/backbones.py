"""The sparse 3D backbone, the way to the bird's-eye view, and the dense 2D backbone."""

from __future__ import annotations

import math
from typing import cast

from dm3d_deploy import yaml_reader
from dm3d_deploy.config.kinds import COUNT, COUNTS
from dm3d_deploy.config.schema import Backbone2dConfig, Backbone3dConfig, VoxelConfig
from dm3d_deploy.yaml_reader import Entry, Section

SPARSE_STRIDE = 8
VOXELNEXT = "VoxelResBackBone8xVoxelNeXt"
VOXELNEXT_CHANNELS: tuple[int, ...] = (16, 32, 64, 128, 128)
NO_2D = Backbone2dConfig(layer_nums=(), strides=(), filters=(), upsample_strides=(), upsample_filters=())
SPARSE_CHANNELS: dict[str, tuple[int, ...]] = {
    "VoxelResBackBone8x": (16, 16, 32, 64, 128, 128),
    "VoxelBackBone8x": (16, 16, 32, 64, 64, 128),
}
SPARSE_BLOCKS = 2


def backbone_3d_of(section: Section) -> Backbone3dConfig:
    """The sparse backbone."""
    name = section.kept["NAME"]
    if name == VOXELNEXT:
        return _voxelnext_of(section)
    section.only(("NAME", "CHANNELS", "NUM_BLOCKS"))
    channels = section.get_or("CHANNELS", yaml_reader.sequence(COUNT, 6), SPARSE_CHANNELS[name])
    return Backbone3dConfig(
        name=name,
        channels=cast("tuple[int, int, int, int, int, int]", channels),
        blocks=section.get_or("NUM_BLOCKS", yaml_reader.integer(1, 64), SPARSE_BLOCKS),
    )


def _voxelnext_of(section: Section) -> Backbone3dConfig:
    """OpenPCDet's five CHANNELS are those of conv1 to conv5; conv6 has as many as conv5."""
    section.only(("NAME", "CHANNELS", "OUT_CHANNEL", "NUM_BLOCKS"))
    first, c2, c3, c4, c5 = section.get_or("CHANNELS", yaml_reader.sequence(COUNT, 5), VOXELNEXT_CHANNELS)
    if c4 != c5:
        section.fail("CHANNELS", f"gives conv4 {c4} and conv5 {c5}, which are added up", fix="make the last two equal")
    last = section.get_or("OUT_CHANNEL", COUNT, 128)
    blocks = section.get_or("NUM_BLOCKS", yaml_reader.integer(1, 64), SPARSE_BLOCKS)
    return Backbone3dConfig(name=VOXELNEXT, channels=(first, first, c2, c3, c4, last), blocks=blocks)


def sparse_height(cells_z: int) -> int:
    """Cells along z after the sparse backbone: OpenPCDet pads the grid by one, then four strided convolutions.

    Kernel 3, stride 2 each; padding along z is 1, 1, 0 in conv2 to conv4 and 0 in conv_out, in both backbones.
    """
    height = cells_z + 1
    for padding in (1, 1, 0, 0):
        height = (height + 2 * padding - 3) // 2 + 1
    return height


def bev_channels_of(section: Section, made: int, words: str) -> int:
    """Channels of the bird's-eye view: what the file states must be the `made` ones, which come from `words`."""
    section.only(("NAME", "NUM_BEV_FEATURES"))
    stated = section.get("NUM_BEV_FEATURES", yaml_reader.integer(1, 1 << 16))
    if stated != made:
        section.fail(
            "NUM_BEV_FEATURES",
            f"is {stated}, but {words} are {made}",
            fix=f"write {made}, or change the grid along z" if made else "give the grid more cells along z",
        )
    return stated


def backbone_2d_of(section: Section, voxels: VoxelConfig, stride_3d: int) -> Backbone2dConfig:
    """The dense backbone, whose strides must fit the grid behind a `stride_3d` of what comes before."""
    section.only(("NAME", "LAYER_NUMS", "LAYER_STRIDES", "NUM_FILTERS", "UPSAMPLE_STRIDES", "NUM_UPSAMPLE_FILTERS"))
    blocks = section.get("LAYER_NUMS", COUNTS)
    each = yaml_reader.sequence(COUNT, len(blocks))
    config = Backbone2dConfig(
        layer_nums=blocks,
        strides=section.get("LAYER_STRIDES", each),
        filters=section.get("NUM_FILTERS", each),
        upsample_strides=section.get("UPSAMPLE_STRIDES", yaml_reader.sequence(_upsample_stride, len(blocks))),
        upsample_filters=section.get("NUM_UPSAMPLE_FILTERS", each),
    )
    strides = [math.prod(config.strides[: index + 1]) for index in range(len(blocks))]
    for stride, up in zip(strides, config.upsample_strides, strict=True):
        if stride != up * map_stride(config):
            section.fail(
                "UPSAMPLE_STRIDES",
                f"does not bring the blocks to one size: strides {strides}, upsampled {list(config.upsample_strides)}",
                fix=f"write {[one // strides[0] for one in strides]}",
            )
    whole = stride_3d * strides[-1]
    for axis, cells in zip("yx", voxels.grid_zyx[1:], strict=True):
        if cells % whole:
            behind = f" ({stride_3d} of the sparse backbone)" if stride_3d > 1 else ""
            section.fail(
                "LAYER_STRIDES",
                f"needs a multiple of {whole} cells along {axis}{behind}, the grid has {cells}",
                fix="change POINT_CLOUD_RANGE or VOXEL_SIZE",
            )
    return config


def map_stride(config: Backbone2dConfig) -> int:
    """Cells of the bird's-eye view per cell of the 2D backbone's output, along x and y."""
    if not config.strides:
        return 1
    return round(config.strides[0] / config.upsample_strides[0])


def _upsample_stride(entry: Entry, path: str) -> float:
    """A whole number, or one over a whole number."""
    value = yaml_reader.number(1 / 64, 64)(entry, path)
    if value >= 1 and value == round(value):
        return round(value)
    if value < 1 and 1 / value == round(1 / value):
        return value
    yaml_reader.refuse(entry, path, f"is {value:g}", fix="write a whole number, or one over a whole number: 0.5, 0.25")
