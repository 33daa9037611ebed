"""A detector by its name or from OpenPCDet's YAML, read strictly: what is not known is refused with its line."""

from __future__ import annotations

from pathlib import Path

from dm3d_deploy import yaml_reader
from dm3d_deploy.config.anchor_head import anchor_head_of, anchor_post_of
from dm3d_deploy.config.backbones import (
    NO_2D,
    SPARSE_STRIDE,
    VOXELNEXT,
    backbone_2d_of,
    backbone_3d_of,
    bev_channels_of,
    map_stride,
    sparse_height,
)
from dm3d_deploy.config.center_head import center_head_of, center_post_of
from dm3d_deploy.config.kinds import WORD, WORDS
from dm3d_deploy.config.schema import (
    AnchorHeadConfig,
    AnchorPostConfig,
    Backbone3dConfig,
    CenterHeadConfig,
    DetectorConfig,
    PillarConfig,
    PostConfig,
    VoxelConfig,
)
from dm3d_deploy.config.second_stage import second_stage_of
from dm3d_deploy.config.voxels import pillars_of, voxels_of
from dm3d_deploy.errors import UsageError, nearest
from dm3d_deploy.yaml_reader import Entry, Section

MODEL_FILES = Path(__file__).parents[1] / "models" / "configs"
# What each detector of OpenPCDet may be made of.
FAMILIES: dict[str, dict[str, tuple[str, ...]]] = {
    "CenterPoint": {
        "VFE": ("MeanVFE", "DynPillarVFE", "PillarVFE"),
        "BACKBONE_3D": ("VoxelResBackBone8x", "VoxelBackBone8x"),
        "DENSE_HEAD": ("CenterHead",),
    },
    "SECONDNet": {
        "VFE": ("MeanVFE",),
        "BACKBONE_3D": ("VoxelBackBone8x", "VoxelResBackBone8x"),
        "DENSE_HEAD": ("AnchorHeadSingle",),
    },
    "PointPillar": {
        "VFE": ("PillarVFE", "DynPillarVFE"),
        "DENSE_HEAD": ("AnchorHeadSingle",),
    },
    "VoxelNeXt": {
        "VFE": ("MeanVFE",),
        "BACKBONE_3D": (VOXELNEXT,),
        "DENSE_HEAD": ("VoxelNeXtHead",),
    },
    "PVRCNN": {
        "VFE": ("MeanVFE",),
        "BACKBONE_3D": ("VoxelBackBone8x", "VoxelResBackBone8x"),
        "DENSE_HEAD": ("AnchorHeadSingle",),
        "PFE": ("VoxelSetAbstraction",),
        "POINT_HEAD": ("PointHeadSimple",),
        "ROI_HEAD": ("PVRCNNHead",),
    },
    "VoxelRCNN": {
        "VFE": ("MeanVFE",),
        "BACKBONE_3D": ("VoxelBackBone8x", "VoxelResBackBone8x"),
        "DENSE_HEAD": ("AnchorHeadSingle",),
        "ROI_HEAD": ("VoxelRCNNHead",),
    },
}
PARTS = ("VFE", "BACKBONE_3D", "MAP_TO_BEV", "BACKBONE_2D", "DENSE_HEAD")
SECOND_PARTS = ("PFE", "POINT_HEAD", "ROI_HEAD")

# What training and evaluation read and inference does not.
IGNORED_TOP = ("OPTIMIZATION", "HOOK")
IGNORED_DATA = (
    *("DATA_PATH", "CLOUD_DATA_PATH", "VERSION", "MAX_SWEEPS", "PRED_VELOCITY", "SET_NAN_VELOCITY_TO_ZEROS"),
    *("FILTER_MIN_POINTS_IN_GT", "DATA_SPLIT", "INFO_PATH", "BALANCED_RESAMPLING", "DATA_AUGMENTOR"),
    *("GET_ITEM_LIST", "FOV_POINTS_ONLY", "INFO_WITH_FAKELIDAR"),
)
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
    voxels = voxels_of(data, dynamic=modules["VFE"].kept["NAME"] == "DynPillarVFE")
    pillars, backbone_3d, bev_channels = _to_bev(modules, data, voxels)
    stride_3d = SPARSE_STRIDE if backbone_3d is not None else 1
    flat = modules.get("BACKBONE_2D")
    backbone_2d = NO_2D if flat is None else backbone_2d_of(flat, voxels, stride_3d)
    stride = stride_3d * map_stride(backbone_2d)
    head: CenterHeadConfig | AnchorHeadConfig
    post: PostConfig | AnchorPostConfig
    if modules["DENSE_HEAD"].kept["NAME"] in ("CenterHead", "VoxelNeXtHead"):
        head = center_head_of(modules["DENSE_HEAD"], class_names, stride)
        if head.sparse and head.shared_channels + 1 != bev_channels:
            modules["DENSE_HEAD"].fail(
                "SHARED_CONV_CHANNEL",
                f"is {head.shared_channels}, but OUT_CHANNEL of the backbone is {bev_channels - 1}",
                fix=f"write {bev_channels - 1}",
            )
        post = center_post_of(modules["DENSE_HEAD"].get("POST_PROCESSING", Section))
        if "POST_PROCESSING" in model.entries:
            Section(model.entries["POST_PROCESSING"], "MODEL.POST_PROCESSING").only((), IGNORED_POST)
    else:
        head = anchor_head_of(modules["DENSE_HEAD"], class_names, stride)
        post = anchor_post_of(model.get("POST_PROCESSING", Section))
    return DetectorConfig(
        name=name,
        dataset=data.get("DATASET", WORD),
        class_names=class_names,
        voxels=voxels,
        pillars=pillars,
        backbone_3d=backbone_3d,
        bev_channels=bev_channels,
        backbone_2d=backbone_2d,
        head=head,
        post=post,
        second_stage=second_stage_of(modules, backbone_3d, len(voxels.columns), bev_channels, stride_3d),
        text=yaml_reader.text_from_section(root),
    )


def _to_bev(
    modules: dict[str, Section], data: Section, voxels: VoxelConfig
) -> tuple[PillarConfig | None, Backbone3dConfig | None, int]:
    """What stands between the points and the bird's-eye view, and the view's channels."""
    if "BACKBONE_3D" not in modules:
        pillars = pillars_of(modules["VFE"], data, voxels)
        made = pillars.filters[-1]
        return pillars, None, bev_channels_of(modules["MAP_TO_BEV"], made, "the channels of the pillars")
    modules["VFE"].only(("NAME",))
    backbone = backbone_3d_of(modules["BACKBONE_3D"])
    if backbone.name == VOXELNEXT:
        return None, backbone, backbone.channels[5] + 1
    channels, height = backbone.channels[5], sparse_height(voxels.grid_zyx[0])
    words = f"{channels} channels x {height} cells left along z"
    return None, backbone, bev_channels_of(modules["MAP_TO_BEV"], channels * height, words)


def _modules(model: Section) -> dict[str, Section]:
    """Names first, so that an unsupported detector is refused for its modules and not for a key within them."""
    family = FAMILIES[model.get("NAME", yaml_reader.choice(tuple(FAMILIES), "detector"))]
    vfe = model.get("VFE", Section).get("NAME", yaml_reader.choice(family["VFE"], "VFE module"))
    over_voxels = vfe == "MeanVFE"
    known = {
        **family,
        "MAP_TO_BEV": ("HeightCompression",) if over_voxels else ("PointPillarScatter",),
        "BACKBONE_2D": ("BaseBEVBackbone",),
    }
    modules = {}
    sparse = family["DENSE_HEAD"] == ("VoxelNeXtHead",)
    for part in (*PARTS, *(part for part in SECOND_PARTS if part in family)):
        if (part == "BACKBONE_3D" and not over_voxels) or (sparse and part in ("MAP_TO_BEV", "BACKBONE_2D")):
            continue
        modules[part] = model.get(part, Section)
        modules[part].get("NAME", yaml_reader.choice(known[part], f"{part} module"))
    model.only(("NAME", *modules, "POST_PROCESSING"))
    return modules
