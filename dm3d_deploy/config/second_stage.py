"""The second stage: VoxelSetAbstraction and PointHeadSimple, and the RoI heads of PV-RCNN and Voxel R-CNN."""

from __future__ import annotations

from typing import cast

from dm3d_deploy import yaml_reader
from dm3d_deploy.config.kinds import COUNT, COUNTS, SHARE
from dm3d_deploy.config.schema import (
    Backbone3dConfig,
    Grouping,
    KeypointConfig,
    PoolSource,
    SecondStageConfig,
)
from dm3d_deploy.yaml_reader import Section

STAGES = ("x_conv1", "x_conv2", "x_conv3", "x_conv4")
RAW, BEV, KEYPOINTS = "raw_points", "bev", "keypoints"
POINT_COLUMNS = 3  # x, y, z; the others are features
MOST_GRID, MOST_SAMPLES, MOST_REACH = 16, 256, 32
IGNORED_HEAD = ("LOSS_CONFIG",)
IGNORED_NMS = ("USE_FAST_NMS", "SCORE_THRESH")
GROUPING_KEYS = ("MLPS", "POOL_RADIUS", "NSAMPLE")
RADIUS_M = yaml_reader.number(0.001, 1000)


def second_stage_of(
    modules: dict[str, Section], backbone: Backbone3dConfig | None, columns: int, bev_channels: int, bev_stride: int
) -> SecondStageConfig | None:
    """What MODEL.ROI_HEAD pools from, after MODEL.PFE and MODEL.POINT_HEAD where there are any; None without it."""
    if backbone is None or "ROI_HEAD" not in modules:
        return None
    section = modules["ROI_HEAD"]
    widths = dict(zip(STAGES, backbone.channels[1:5], strict=True))
    read = ("NAME", "CLASS_AGNOSTIC", "SHARED_FC", "CLS_FC", "REG_FC", "DP_RATIO", "NMS_CONFIG", "ROI_GRID_POOL")
    section.only((*read, "TARGET_CONFIG"), IGNORED_HEAD)
    _agnostic(section)
    targets = section.get("TARGET_CONFIG", Section)
    targets.get("BOX_CODER", yaml_reader.choice(("ResidualCoder",), "box coder"))
    nms = section.get("NMS_CONFIG", Section).get("TEST", Section)
    nms.only(("NMS_TYPE", "NMS_THRESH", "NMS_PRE_MAXSIZE", "NMS_POST_MAXSIZE", "MULTI_CLASSES_NMS"), IGNORED_NMS)
    nms.get("NMS_TYPE", yaml_reader.choice(("nms_gpu",), "NMS"))
    if nms.get_or("MULTI_CLASSES_NMS", yaml_reader.flag, False):
        nms.fail("MULTI_CLASSES_NMS", "is True, and proposals of all classes suppress each other", fix="write False")
    pool = section.get("ROI_GRID_POOL", Section)
    keypoints = None
    if "PFE" in modules:
        keypoints = _keypoints_of(modules, widths, columns, bev_channels, bev_stride)
        pool.only(("GRID_SIZE", *GROUPING_KEYS, "POOL_METHOD"))
        fused = PoolSource(
            name=KEYPOINTS, stride=1, channels=keypoints.fused, groupings=_groupings(pool, reach=False)
        )  # fmt: skip
        sources: tuple[PoolSource, ...] = (fused,)
    else:
        sources = _voxel_sources(pool, widths)
    most = yaml_reader.integer(1, 100_000)
    return SecondStageConfig(
        keypoints=keypoints,
        sources=sources,
        grid=pool.get("GRID_SIZE", yaml_reader.integer(1, MOST_GRID)),
        shared=section.get("SHARED_FC", COUNTS),
        cls_widths=section.get("CLS_FC", COUNTS),
        reg_widths=section.get("REG_FC", COUNTS),
        dropout=section.get("DP_RATIO", SHARE),
        nms_threshold=nms.get("NMS_THRESH", SHARE),
        nms_pre=nms.get("NMS_PRE_MAXSIZE", most),
        nms_post=nms.get("NMS_POST_MAXSIZE", most),
    )


def _agnostic(section: Section) -> None:
    if not section.get("CLASS_AGNOSTIC", yaml_reader.flag):
        section.fail("CLASS_AGNOSTIC", "is False, and one score for all classes is read here", fix="write True")


def _keypoints_of(
    modules: dict[str, Section], widths: dict[str, int], columns: int, bev_channels: int, bev_stride: int
) -> KeypointConfig:
    section, score = modules["PFE"], modules["POINT_HEAD"]
    read = ("NAME", "POINT_SOURCE", "NUM_KEYPOINTS", "NUM_OUTPUT_FEATURES", "SAMPLE_METHOD", "FEATURES_SOURCE")
    section.only((*read, "SA_LAYER"))
    section.get("POINT_SOURCE", yaml_reader.choice((RAW,), "source of keypoints"))
    section.get("SAMPLE_METHOD", yaml_reader.choice(("FPS",), "way to sample"))
    named = section.get("FEATURES_SOURCE", yaml_reader.sequence(yaml_reader.choice((BEV, RAW, *STAGES), "source")))
    if len(set(named)) != len(named):
        section.fail("FEATURES_SOURCE", f"is {', '.join(named)}", fix="name each source once")
    table = section.get("SA_LAYER", Section)
    table.only((RAW, *STAGES))
    sources = tuple(_point_source(table, name, columns, widths) for name in _in_order(named))
    score.only(
        ("NAME", "CLS_FC", "CLASS_AGNOSTIC", "USE_POINT_FEATURES_BEFORE_FUSION"), ("TARGET_CONFIG", "LOSS_CONFIG")
    )
    _agnostic(score)
    if not score.get("USE_POINT_FEATURES_BEFORE_FUSION", yaml_reader.flag):
        score.fail("USE_POINT_FEATURES_BEFORE_FUSION", "is False, which is not read here", fix="write True")
    return KeypointConfig(
        count=section.get("NUM_KEYPOINTS", yaml_reader.integer(1, 1 << 16)),
        bev_channels=bev_channels if BEV in named else 0,
        bev_stride=bev_stride,
        sources=sources,
        fused=section.get("NUM_OUTPUT_FEATURES", COUNT),
        score_widths=score.get("CLS_FC", COUNTS),
    )


def _in_order(named: tuple[str, ...]) -> list[str]:
    """Raw points stand before the stages, whatever the file's order: so OpenPCDet concatenates."""
    return [*(name for name in named if name == RAW), *(name for name in named if name in STAGES)]


def _point_source(table: Section, name: str, columns: int, widths: dict[str, int]) -> PoolSource:
    layer = table.get(name, Section)
    if name == RAW:
        layer.only(GROUPING_KEYS)
        groupings = _groupings(layer, reach=False)
        return PoolSource(name=name, stride=1, channels=columns - POINT_COLUMNS, groupings=groupings)
    layer.only(("DOWNSAMPLE_FACTOR", *GROUPING_KEYS))
    stride = 1 << STAGES.index(name)
    stated = layer.get("DOWNSAMPLE_FACTOR", COUNT)
    if stated != stride:
        layer.fail("DOWNSAMPLE_FACTOR", f"is {stated}, but {name} has {stride}", fix=f"write {stride}")
    return PoolSource(name=name, stride=stride, channels=widths[name], groupings=_groupings(layer, reach=False))


def _voxel_sources(pool: Section, widths: dict[str, int]) -> tuple[PoolSource, ...]:
    pool.only(("FEATURES_SOURCE", "GRID_SIZE", "POOL_LAYERS"), ("PRE_MLP",))
    named = pool.get("FEATURES_SOURCE", yaml_reader.sequence(yaml_reader.choice(STAGES, "source")))
    if len(set(named)) != len(named):
        pool.fail("FEATURES_SOURCE", f"is {', '.join(named)}", fix="name each source once")
    table = pool.get("POOL_LAYERS", Section)
    table.only(STAGES)
    sources = []
    for name in named:
        layer = table.get(name, Section)
        layer.only((*GROUPING_KEYS, "QUERY_RANGES", "POOL_METHOD"))
        groupings = _groupings(layer, reach=True)
        if any(len(grouping.widths) != 2 for grouping in groupings):
            layer.fail("MLPS", "has a grouping without two widths", fix="give each two: within and behind the maximum")
        stride = 1 << STAGES.index(name)
        sources.append(PoolSource(name=name, stride=stride, channels=widths[name], groupings=groupings))
    return tuple(sources)


def _groupings(layer: Section, *, reach: bool) -> tuple[Grouping, ...]:
    """Groupings of one source; `reach`: with a range of cells, and a way to pool that is always the maximum."""
    mlps = layer.get("MLPS", yaml_reader.sequence(COUNTS))
    radii = layer.get("POOL_RADIUS", yaml_reader.sequence(RADIUS_M, len(mlps)))
    samples = layer.get("NSAMPLE", yaml_reader.sequence(yaml_reader.integer(1, MOST_SAMPLES), len(mlps)))
    ranges: tuple[tuple[int, ...] | None, ...] = (None,) * len(mlps)
    if reach:
        cells = yaml_reader.sequence(yaml_reader.integer(0, MOST_REACH), 3)
        ranges = layer.get("QUERY_RANGES", yaml_reader.sequence(cells, len(mlps)))
    if "POOL_METHOD" in layer.entries:
        layer.get("POOL_METHOD", yaml_reader.choice(("max_pool",), "way to pool"))
    return tuple(
        Grouping(radius_m=radius, samples=count, widths=widths, reach_zyx=cast("tuple[int, int, int] | None", span))
        for widths, radius, count, span in zip(mlps, radii, samples, ranges, strict=True)
    )
