"""DATA_CONFIG: range, grid and point columns."""

from __future__ import annotations

from typing import cast

from dm3d_deploy import yaml_reader
from dm3d_deploy.config.kinds import COUNT, limits_of
from dm3d_deploy.config.schema import VoxelConfig
from dm3d_deploy.yaml_reader import Section

COLUMNS = ("x", "y", "z", "intensity", "timestamp")
MAX_CELLS_PER_AXIS = 8192
MAX_VOXELS = 10_000_000


def voxels_of(data: Section) -> VoxelConfig:
    """The grid; UsageError names what does not fit, with its line."""
    limits = limits_of(data, "POINT_CLOUD_RANGE")
    columns = _columns(data.get("POINT_FEATURE_ENCODING", Section))
    processors = data.get("DATA_PROCESSOR", yaml_reader.sequence(Section))
    for processor in processors:
        _check_processor(processor)
    makers = [p for p in processors if p.kept["NAME"] == "transform_points_to_voxels"]
    if len(makers) != 1:
        data.fail("DATA_PROCESSOR", f"makes voxels {len(makers)} times", fix="list transform_points_to_voxels once")
    size = makers[0].get("VOXEL_SIZE", yaml_reader.sequence(yaml_reader.number(0.001, 100), 3))
    most = makers[0].get("MAX_NUMBER_OF_VOXELS", Section)
    most.only(("test",), ("train",))
    for axis, low, high, step in zip("xyz", limits[:3], limits[3:], size, strict=True):
        cells = (high - low) / step
        if abs(cells - round(cells)) > 1e-3 or not 1 <= round(cells) <= MAX_CELLS_PER_AXIS:
            makers[0].fail(
                "VOXEL_SIZE",
                f"cuts the range along {axis}, {high - low:g} m, into {cells:g} cells of {step:g} m",
                fix=f"choose a size that makes 1 to {MAX_CELLS_PER_AXIS} whole cells",
            )
    return VoxelConfig(
        point_range_m=limits,
        voxel_size_m=cast("tuple[float, float, float]", size),
        max_points_per_voxel=makers[0].get("MAX_POINTS_PER_VOXEL", COUNT),
        max_voxels=most.get("test", yaml_reader.integer(1, MAX_VOXELS)),
        columns=columns,
    )


def _check_processor(processor: Section) -> None:
    # OpenPCDet shuffles at inference; voxelize() is independent of the order, so the switch changes nothing here.
    keys = {
        "mask_points_and_boxes_outside_range": ((), ("REMOVE_OUTSIDE_BOXES",)),
        "shuffle_points": ((), ("SHUFFLE_ENABLED",)),
        "transform_points_to_voxels": (("VOXEL_SIZE", "MAX_POINTS_PER_VOXEL", "MAX_NUMBER_OF_VOXELS"), ()),
    }
    known, ignored = keys[processor.get("NAME", yaml_reader.choice(tuple(keys), "step"))]
    processor.only(("NAME", *known), ignored)


def _columns(encoding: Section) -> tuple[str, ...]:
    encoding.only(("encoding_type", "used_feature_list", "src_feature_list"))
    encoding.get("encoding_type", yaml_reader.choice(("absolute_coordinates_encoding",), "encoding"))
    column = yaml_reader.choice(COLUMNS, "point column")
    used = encoding.get("used_feature_list", yaml_reader.sequence(column))
    source = encoding.get("src_feature_list", yaml_reader.sequence(column))
    if used[:3] != ("x", "y", "z") or len(set(used)) != len(used) or not set(used) <= set(source):
        encoding.fail(
            "used_feature_list",
            f"is {', '.join(used)}, from {', '.join(source)}",
            fix="start with x, y, z and name each column of src_feature_list at most once",
        )
    return used
