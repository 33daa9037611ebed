"""What a detector is: OpenPCDet's YAML, read strictly into frozen values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from dm3d_deploy import yaml_reader
from dm3d_deploy.errors import UsageError, nearest
from dm3d_deploy.yaml_reader import Entry, Section

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


MODEL_FILES = Path(__file__).parent / "models" / "configs"
MODULES = {
    "VFE": "MeanVFE",
    "BACKBONE_3D": "VoxelResBackBone8x",
    "MAP_TO_BEV": "HeightCompression",
    "BACKBONE_2D": "BaseBEVBackbone",
    "DENSE_HEAD": "CenterHead",
}
SPARSE_STRIDE = 8
SPARSE_CHANNELS: tuple[int, ...] = (16, 16, 32, 64, 128, 128)
SPARSE_BLOCKS = 2
BRANCH_CHANNELS = {"center": 2, "center_z": 1, "dim": 3, "rot": 2, "vel": 2}
COLUMNS = ("x", "y", "z", "intensity", "timestamp")
MAX_CELLS_PER_AXIS = 8192
MAX_VOXELS = 10_000_000

WORD = yaml_reader.text
WORDS = yaml_reader.sequence(yaml_reader.text)
COUNT = yaml_reader.integer(1, 4096)
COUNTS = yaml_reader.sequence(COUNT)
METRES = yaml_reader.sequence(yaml_reader.number(-10_000, 10_000), 6)
SHARE = yaml_reader.number(0, 1)

# What training and evaluation read and inference does not.
IGNORED_TOP = ("OPTIMIZATION", "HOOK")
IGNORED_DATA = (
    *("DATA_PATH", "CLOUD_DATA_PATH", "VERSION", "MAX_SWEEPS", "PRED_VELOCITY", "SET_NAN_VELOCITY_TO_ZEROS"),
    *("FILTER_MIN_POINTS_IN_GT", "DATA_SPLIT", "INFO_PATH", "BALANCED_RESAMPLING", "DATA_AUGMENTOR"),
    *("GET_ITEM_LIST", "FOV_POINTS_ONLY", "INFO_WITH_FAKELIDAR"),
)
IGNORED_HEAD = ("CLASS_AGNOSTIC", "LOSS_CONFIG")
IGNORED_TARGETS = ("NUM_MAX_OBJS", "GAUSSIAN_OVERLAP", "MIN_RADIUS", "DENSE_REG")
IGNORED_POST = ("RECALL_THRESH_LIST", "EVAL_METRIC", "OUTPUT_RAW_SCORE")


def detector_names() -> tuple[str, ...]:
    """The names that `load_config` knows without a path."""
    return tuple(sorted(path.stem for path in MODEL_FILES.glob("*.yaml")))


def load_config(path_or_name: str | Path) -> DetectorConfig:
    """Read a detector by name, or from an OpenPCDet YAML file and its base; raises `UsageError` with file and line."""
    path = Path(path_or_name)
    if isinstance(path_or_name, str) and path.name == path_or_name and path.suffix not in (".yaml", ".yml"):
        if path_or_name not in detector_names():
            raise UsageError(
                f"there is no detector '{path_or_name}'.",
                fix=f"{nearest(path_or_name, detector_names())} (a YAML file is given by its path)",
            )
        path = MODEL_FILES / f"{path_or_name}.yaml"
    return _config_from_entry(yaml_reader.entry_from_file(path), path.stem)


def config_from_text(text: str, origin: str) -> DetectorConfig:
    """Read flattened YAML (`DetectorConfig.text`); `origin` is the file that held it, and its stem the name."""
    return _config_from_entry(yaml_reader.entry_from_text(text, origin), Path(origin).stem)


def _config_from_entry(entry: Entry, name: str) -> DetectorConfig:
    root = Section(entry, "")
    model = root.get("MODEL", Section)
    modules = _modules(model)
    root.only(("MODEL", "CLASS_NAMES", "DATA_CONFIG"), IGNORED_TOP)
    class_names = root.get("CLASS_NAMES", WORDS)
    data = root.get("DATA_CONFIG", Section)
    data.only(
        ("DATASET", "POINT_CLOUD_RANGE", "POINT_FEATURE_ENCODING", "DATA_PROCESSOR"),
        IGNORED_DATA,
    )
    voxels = _voxels(data)
    backbone_3d = _backbone_3d(modules["BACKBONE_3D"])
    backbone_2d = _backbone_2d(modules["BACKBONE_2D"], voxels)
    return DetectorConfig(
        name=name,
        dataset=data.get("DATASET", WORD),
        class_names=class_names,
        voxels=voxels,
        backbone_3d=backbone_3d,
        bev_channels=_bev_channels(modules["MAP_TO_BEV"], backbone_3d, voxels),
        backbone_2d=backbone_2d,
        head=_head(modules["DENSE_HEAD"], class_names, SPARSE_STRIDE * backbone_2d.strides[0]),
        post=_post(modules["DENSE_HEAD"].get("POST_PROCESSING", Section)),
        text=yaml_reader.text_from_section(root),
    )


def _modules(model: Section) -> dict[str, Section]:
    """Names first, so that an unsupported detector is refused for its modules and not for a key within them."""
    model.get("NAME", yaml_reader.choice(("CenterPoint",), "detector"))
    modules = {}
    for part, module in MODULES.items():
        modules[part] = model.get(part, Section)
        modules[part].get("NAME", yaml_reader.choice((module,), f"{part} module"))
    model.only(("NAME", *MODULES), ("POST_PROCESSING",))
    modules["VFE"].only(("NAME",))
    if "POST_PROCESSING" in model.entries:
        Section(model.entries["POST_PROCESSING"], "MODEL.POST_PROCESSING").only((), IGNORED_POST)
    return modules


def _range(section: Section, key: str) -> Six:
    limits = section.get(key, METRES)
    if any(low >= high for low, high in zip(limits[:3], limits[3:], strict=True)):
        section.fail(key, f"is not ordered: {list(limits)}", fix="write x0, y0, z0, x1, y1, z1 with each 0 below its 1")
    return cast(Six, limits)


def _voxels(data: Section) -> VoxelConfig:
    limits = _range(data, "POINT_CLOUD_RANGE")
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


def _backbone_3d(section: Section) -> Backbone3dConfig:
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


def _bev_channels(section: Section, backbone: Backbone3dConfig, voxels: VoxelConfig) -> int:
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


def _backbone_2d(section: Section, voxels: VoxelConfig) -> Backbone2dConfig:
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


def _head(section: Section, class_names: tuple[str, ...], stride: int) -> CenterHeadConfig:
    read = ("CLASS_NAMES_EACH_HEAD", "SHARED_CONV_CHANNEL", "USE_BIAS_BEFORE_NORM", "NUM_HM_CONV", "SEPARATE_HEAD_CFG")
    section.only(("NAME", *read, "TARGET_ASSIGNER_CONFIG", "POST_PROCESSING"), IGNORED_HEAD)
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
    heat_convs = section.get("NUM_HM_CONV", yaml_reader.integer(1, 16))
    branches = _branches(section.get("SEPARATE_HEAD_CFG", Section))
    return CenterHeadConfig(
        classes_by_task=tasks,
        shared_channels=shared,
        bias_before_norm=bias,
        branches=tuple((*branches, Branch(name="hm", channels=len(task), convs=heat_convs)) for task in tasks),
        stride=stride,
    )


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


def _post(section: Section) -> PostConfig:
    section.only(("SCORE_THRESH", "POST_CENTER_LIMIT_RANGE", "MAX_OBJ_PER_SAMPLE", "NMS_CONFIG"))
    nms = section.get("NMS_CONFIG", Section)
    nms.only(("NMS_TYPE", "NMS_THRESH", "NMS_PRE_MAXSIZE", "NMS_POST_MAXSIZE", "MULTI_CLASSES_NMS"))
    nms.get("NMS_TYPE", yaml_reader.choice(("nms_gpu",), "NMS"))
    if nms.get_or("MULTI_CLASSES_NMS", yaml_reader.flag, False):
        nms.fail("MULTI_CLASSES_NMS", "is True, which CenterHead does not do", fix="write False")
    most = yaml_reader.integer(1, 100_000)
    return PostConfig(
        score_threshold=section.get("SCORE_THRESH", SHARE),
        centre_limit_m=_range(section, "POST_CENTER_LIMIT_RANGE"),
        max_objects=section.get("MAX_OBJ_PER_SAMPLE", most),
        nms_threshold=nms.get("NMS_THRESH", SHARE),
        nms_pre=nms.get("NMS_PRE_MAXSIZE", most),
        nms_post=nms.get("NMS_POST_MAXSIZE", most),
    )
