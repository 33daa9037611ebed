"""AnchorHeadSingle and what comes after it."""

from __future__ import annotations

from typing import cast

from dm3d_deploy import yaml_reader
from dm3d_deploy.config.kinds import COUNT, SHARE, WORD
from dm3d_deploy.config.schema import AnchorHeadConfig, AnchorPostConfig, ClassAnchors, DirectionConfig, Three
from dm3d_deploy.yaml_reader import Section

IGNORED_HEAD = ("CLASS_AGNOSTIC", "LOSS_CONFIG")
IGNORED_TARGETS = ("POS_FRACTION", "SAMPLE_SIZE", "NORM_BY_NUM_EXAMPLES", "MATCH_HEIGHT")
IGNORED_POST = ("RECALL_THRESH_LIST", "EVAL_METRIC", "OUTPUT_RAW_SCORE")
SIZE_M = yaml_reader.sequence(yaml_reader.number(0.01, 100), 3)
ANGLE = yaml_reader.number(-7, 7)


def anchor_head_of(section: Section, class_names: tuple[str, ...], stride: int) -> AnchorHeadConfig:
    """The head; `stride` is that of its map, in voxel cells."""
    read = ("NAME", "ANCHOR_GENERATOR_CONFIG", "TARGET_ASSIGNER_CONFIG")
    directed = ("USE_DIRECTION_CLASSIFIER", "DIR_OFFSET", "DIR_LIMIT_OFFSET", "NUM_DIR_BINS")
    section.only((*read, *directed), IGNORED_HEAD)
    targets = section.get("TARGET_ASSIGNER_CONFIG", Section)
    targets.only(("NAME", "BOX_CODER"), IGNORED_TARGETS)
    targets.get("NAME", yaml_reader.choice(("AxisAlignedTargetAssigner",), "target assigner"))
    targets.get("BOX_CODER", yaml_reader.choice(("ResidualCoder",), "box coder"))
    direction = None
    if section.get("USE_DIRECTION_CLASSIFIER", yaml_reader.flag):
        direction = DirectionConfig(
            bins=section.get("NUM_DIR_BINS", yaml_reader.integer(2, 16)),
            offset_rad=section.get("DIR_OFFSET", ANGLE),
            limit_offset=section.get("DIR_LIMIT_OFFSET", ANGLE),
        )
    rows = section.get("ANCHOR_GENERATOR_CONFIG", yaml_reader.sequence(Section))
    anchors = tuple(_class_anchors(row, class_names, stride) for row in rows)
    named = [of_class.class_name for of_class in anchors]
    if sorted(named) != sorted(class_names):
        section.fail(
            "ANCHOR_GENERATOR_CONFIG",
            f"has anchors for {', '.join(named)}, but CLASS_NAMES are {', '.join(class_names)}",
            fix="give each class one entry",
        )
    if len({len(of_class.rotations_rad) for of_class in anchors}) > 1:
        section.fail(
            "ANCHOR_GENERATOR_CONFIG",
            "gives the classes different numbers of rotations",
            fix="give each class as many rotations",
        )
    return AnchorHeadConfig(anchors=anchors, direction=direction, stride=stride)


def _class_anchors(row: Section, class_names: tuple[str, ...], stride: int) -> ClassAnchors:
    boxes = ("class_name", "anchor_sizes", "anchor_rotations", "anchor_bottom_heights", "align_center")
    row.only((*boxes, "feature_map_stride", "matched_threshold", "unmatched_threshold"))
    stated = row.get("feature_map_stride", COUNT)
    if stated != stride:
        row.fail("feature_map_stride", f"is {stated}, but the backbones make {stride}", fix=f"write {stride}")
    name = row.get("class_name", WORD)
    if name not in class_names:
        row.fail("class_name", f"is '{name}', but CLASS_NAMES are {', '.join(class_names)}", fix="name one of them")
    matched, unmatched = row.get("matched_threshold", SHARE), row.get("unmatched_threshold", SHARE)
    if unmatched > matched:
        row.fail("unmatched_threshold", f"is {unmatched:g}, above the {matched:g} of a match", fix="write a lower one")
    return ClassAnchors(
        class_name=name,
        sizes_m=cast("tuple[Three, ...]", row.get("anchor_sizes", yaml_reader.sequence(SIZE_M))),
        rotations_rad=row.get("anchor_rotations", yaml_reader.sequence(ANGLE)),
        bottom_m=row.get("anchor_bottom_heights", yaml_reader.sequence(yaml_reader.number(-100, 100), 1))[0],
        align_center=row.get_or("align_center", yaml_reader.flag, False),
        matched=matched,
        unmatched=unmatched,
    )


def anchor_post_of(section: Section) -> AnchorPostConfig:
    """Decoding and NMS, from MODEL.POST_PROCESSING."""
    section.only(("SCORE_THRESH", "NMS_CONFIG"), IGNORED_POST)
    nms = section.get("NMS_CONFIG", Section)
    nms.only(("NMS_TYPE", "NMS_THRESH", "NMS_PRE_MAXSIZE", "NMS_POST_MAXSIZE", "MULTI_CLASSES_NMS"))
    nms.get("NMS_TYPE", yaml_reader.choice(("nms_gpu",), "NMS"))
    most = yaml_reader.integer(1, 100_000)
    return AnchorPostConfig(
        score_threshold=section.get("SCORE_THRESH", SHARE),
        multi_class=nms.get_or("MULTI_CLASSES_NMS", yaml_reader.flag, False),
        nms_threshold=nms.get("NMS_THRESH", SHARE),
        nms_pre=nms.get("NMS_PRE_MAXSIZE", most),
        nms_post=nms.get("NMS_POST_MAXSIZE", most),
    )
