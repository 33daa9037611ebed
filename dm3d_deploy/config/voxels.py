"""DATA_CONFIG: range, grid and point columns; and the point network of pillars."""

from __future__ import annotations

from typing import cast

from dm3d_deploy import yaml_reader
from dm3d_deploy.config.kinds import COUNT, COUNTS, limits_of
from dm3d_deploy.config.schema import PillarConfig, VoxelConfig
from dm3d_deploy.yaml_reader import Section

COLUMNS = ("x", "y", "z", "intensity", "timestamp")
MAX_CELLS_PER_AXIS = 8192
MAX_VOXELS = 10_000_000
MAX_POINTS = 1_000_000  # of a frame whose pillars take all points
MAKER = "transform_points_to_voxels"
DYNAMIC_MAKER = "transform_points_to_voxels_placeholder"


def voxels_of(data: Section, *, dynamic: bool) -> VoxelConfig:
    """The grid; `dynamic` pillars have no caps. UsageError names what does not fit, with its line."""
    limits = limits_of(data, "POINT_CLOUD_RANGE")
    columns = _columns(data.get("POINT_FEATURE_ENCODING", Section))
    processors = data.get("DATA_PROCESSOR", yaml_reader.sequence(Section))
    for processor in processors:
        _check_processor(processor)
    wanted = DYNAMIC_MAKER if dynamic else MAKER
    makers = [p for p in processors if p.kept["NAME"] in (MAKER, DYNAMIC_MAKER)]
    if [maker.kept["NAME"] for maker in makers] != [wanted]:
        found = ", ".join(maker.kept["NAME"] for maker in makers) or "nothing"
        data.fail("DATA_PROCESSOR", f"makes voxels by {found}", fix=f"list {wanted} once, as MODEL.VFE needs it")
    size = makers[0].get("VOXEL_SIZE", yaml_reader.sequence(yaml_reader.number(0.001, 100), 3))
    for axis, low, high, step in zip("xyz", limits[:3], limits[3:], size, strict=True):
        cells = (high - low) / step
        if abs(cells - round(cells)) > 1e-3 or not 1 <= round(cells) <= MAX_CELLS_PER_AXIS:
            makers[0].fail(
                "VOXEL_SIZE",
                f"cuts the range along {axis}, {high - low:g} m, into {cells:g} cells of {step:g} m",
                fix=f"choose a size that makes 1 to {MAX_CELLS_PER_AXIS} whole cells",
            )
    points, voxels = (MAX_POINTS, MAX_VOXELS) if dynamic else _caps(makers[0])
    return VoxelConfig(
        point_range_m=limits,
        voxel_size_m=cast("tuple[float, float, float]", size),
        max_points_per_voxel=points,
        max_voxels=voxels,
        columns=columns,
    )


def _caps(maker: Section) -> tuple[int, int]:
    """Points of a voxel and voxels of a frame, at most."""
    points = maker.get("MAX_POINTS_PER_VOXEL", COUNT)
    most = maker.get("MAX_NUMBER_OF_VOXELS", Section)
    most.only(("test",), ("train",))
    return points, most.get("test", yaml_reader.integer(1, MAX_VOXELS))


def pillars_of(section: Section, data: Section, voxels: VoxelConfig) -> PillarConfig:
    """The point network; UsageError where pillars would have more than one cell along z."""
    section.only(("NAME", "WITH_DISTANCE", "USE_ABSLOTE_XYZ", "USE_NORM", "NUM_FILTERS"))
    if voxels.grid_zyx[0] != 1:
        data.fail(
            "POINT_CLOUD_RANGE",
            f"makes {voxels.grid_zyx[0]} cells along z, and pillars have one",
            fix="make the third of VOXEL_SIZE the height of the range",
        )
    if not section.get("USE_NORM", yaml_reader.flag):
        section.fail("USE_NORM", "is False, which is not read here", fix="write True")
    dynamic = section.kept["NAME"] == "DynPillarVFE"
    filters = section.get("NUM_FILTERS", COUNTS)
    if len(filters) > 1 and not dynamic:
        section.fail(
            "NUM_FILTERS", f"names {len(filters)} layers, and PillarVFE is read with one", fix="use DynPillarVFE"
        )
    if any(count % 2 for count in filters[:-1]):
        section.fail(
            "NUM_FILTERS", f"is {list(filters)}", fix="use even numbers: half of a layer is the pillar's maximum"
        )
    return PillarConfig(
        dynamic=dynamic,
        filters=filters,
        absolute_xyz=section.get("USE_ABSLOTE_XYZ", yaml_reader.flag),
        with_distance=section.get("WITH_DISTANCE", yaml_reader.flag),
    )


def _check_processor(processor: Section) -> None:
    # OpenPCDet shuffles at inference; voxelize() is independent of the order, so the switch changes nothing here.
    keys = {
        "mask_points_and_boxes_outside_range": ((), ("REMOVE_OUTSIDE_BOXES",)),
        "shuffle_points": ((), ("SHUFFLE_ENABLED",)),
        MAKER: (("VOXEL_SIZE", "MAX_POINTS_PER_VOXEL", "MAX_NUMBER_OF_VOXELS"), ()),
        DYNAMIC_MAKER: (("VOXEL_SIZE",), ()),
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
