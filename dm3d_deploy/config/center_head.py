"""CenterHead and what comes after it."""

from __future__ import annotations

from dm3d_deploy import yaml_reader
from dm3d_deploy.config.kinds import COUNT, SHARE, WORDS, limits_of
from dm3d_deploy.config.schema import Branch, CenterHeadConfig, PostConfig
from dm3d_deploy.yaml_reader import Section

IGNORED_SPARSE = ("INPUT_FEATURES", "GAUSSIAN_RATIO", "GAUSSIAN_TYPE")
DEFAULT_KERNEL = 3  # OpenPCDet's
BRANCH_CHANNELS = {"center": 2, "center_z": 1, "dim": 3, "rot": 2, "vel": 2}
IGNORED_HEAD = ("CLASS_AGNOSTIC", "LOSS_CONFIG")
IGNORED_TARGETS = ("NUM_MAX_OBJS", "GAUSSIAN_OVERLAP", "MIN_RADIUS", "DENSE_REG")


def center_head_of(section: Section, class_names: tuple[str, ...], stride: int) -> CenterHeadConfig:
    """CenterHead or VoxelNeXtHead; `stride` is that of its map, in voxel cells."""
    sparse = section.kept["NAME"] == "VoxelNeXtHead"
    read = ("CLASS_NAMES_EACH_HEAD", "SHARED_CONV_CHANNEL", "USE_BIAS_BEFORE_NORM", "NUM_HM_CONV", "SEPARATE_HEAD_CFG")
    own = ("KERNEL_SIZE_HEAD", "IOU_BRANCH", "DOUBLE_FLIP") if sparse else ()
    ignored = (*IGNORED_HEAD, *(IGNORED_SPARSE if sparse else ()))
    section.only(("NAME", *read, *own, "TARGET_ASSIGNER_CONFIG", "POST_PROCESSING"), ignored)
    if sparse:
        _check_sparse(section)
    tasks = section.get("CLASS_NAMES_EACH_HEAD", yaml_reader.sequence(WORDS))
    named = [name for task in tasks for name in task]
    if sorted(named) != sorted(set(class_names)) or len(class_names) != len(named):
        section.fail(
            "CLASS_NAMES_EACH_HEAD",
            f"names {', '.join(named)}, but CLASS_NAMES {', '.join(class_names)}",
            fix="name each class of CLASS_NAMES in exactly one task",
        )
    targets = section.get("TARGET_ASSIGNER_CONFIG", Section)
    targets.only(("FEATURE_MAP_STRIDE",), IGNORED_TARGETS)
    stated = targets.get("FEATURE_MAP_STRIDE", COUNT)
    if stated != stride:
        targets.fail("FEATURE_MAP_STRIDE", f"is {stated}, but the backbones make {stride}", fix=f"write {stride}")
    shared = section.get("SHARED_CONV_CHANNEL", COUNT)
    bias = section.get("USE_BIAS_BEFORE_NORM", yaml_reader.flag)
    if sparse and not bias:
        section.fail("USE_BIAS_BEFORE_NORM", "is False, which is not read for VoxelNeXtHead", fix="write True")
    heat_convs = section.get("NUM_HM_CONV", yaml_reader.integer(1, 16))
    branches = _branches(section.get("SEPARATE_HEAD_CFG", Section))
    return CenterHeadConfig(
        classes_by_task=tasks,
        shared_channels=shared,
        bias_before_norm=bias,
        branches=tuple((*branches, Branch(name="hm", channels=len(task), convs=heat_convs)) for task in tasks),
        stride=stride,
        sparse=sparse,
    )


def _check_sparse(section: Section) -> None:
    """A head of pointwise convolutions that says boxes, and nothing else."""
    kernel = section.get_or("KERNEL_SIZE_HEAD", COUNT, DEFAULT_KERNEL)
    if kernel != 1:
        section.fail("KERNEL_SIZE_HEAD", f"is {kernel}, and a sparse head is read with 1", fix="write 1")
    for key in ("IOU_BRANCH", "DOUBLE_FLIP"):
        if section.get_or(key, yaml_reader.flag, False):
            section.fail(key, "is True, which is not read here", fix="write False")


def _branches(section: Section) -> tuple[Branch, ...]:
    section.only(("HEAD_ORDER", "HEAD_DICT"))
    order = section.get("HEAD_ORDER", yaml_reader.sequence(yaml_reader.choice(tuple(BRANCH_CHANNELS), "branch")))
    needed = set(BRANCH_CHANNELS) - {"vel"}
    if len(set(order)) != len(order) or not needed <= set(order):
        section.fail("HEAD_ORDER", f"is {', '.join(order)}", fix="name center, center_z, dim, rot (and vel) once each")
    table = section.get("HEAD_DICT", Section)
    table.only(order)
    branches = []
    for name in order:
        branch = table.get(name, Section)
        branch.only(("out_channels", "num_conv"))
        channels, convs = branch.get("out_channels", COUNT), branch.get("num_conv", yaml_reader.integer(1, 16))
        if channels != BRANCH_CHANNELS[name]:
            branch.fail(
                "out_channels", f"is {channels}", fix=f"write {BRANCH_CHANNELS[name]}: decoding reads that many"
            )
        branches.append(Branch(name=name, channels=channels, convs=convs))
    return tuple(branches)


def center_post_of(section: Section) -> PostConfig:
    """Decoding and NMS."""
    section.only(("SCORE_THRESH", "POST_CENTER_LIMIT_RANGE", "MAX_OBJ_PER_SAMPLE", "NMS_CONFIG"))
    nms = section.get("NMS_CONFIG", Section)
    nms.only(("NMS_TYPE", "NMS_THRESH", "NMS_PRE_MAXSIZE", "NMS_POST_MAXSIZE", "MULTI_CLASSES_NMS"))
    nms.get("NMS_TYPE", yaml_reader.choice(("nms_gpu",), "NMS"))
    if nms.get_or("MULTI_CLASSES_NMS", yaml_reader.flag, False):
        nms.fail("MULTI_CLASSES_NMS", "is True, which CenterHead does not do", fix="write False")
    most = yaml_reader.integer(1, 100_000)
    return PostConfig(
        score_threshold=section.get("SCORE_THRESH", SHARE),
        centre_limit_m=limits_of(section, "POST_CENTER_LIMIT_RANGE"),
        max_objects=section.get("MAX_OBJ_PER_SAMPLE", most),
        nms_threshold=nms.get("NMS_THRESH", SHARE),
        nms_pre=nms.get("NMS_PRE_MAXSIZE", most),
        nms_post=nms.get("NMS_POST_MAXSIZE", most),
    )
