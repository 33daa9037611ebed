"""A detector by its name or from OpenPCDet's YAML, read strictly: what is not known is refused with its line."""

from __future__ import annotations

from pathlib import Path

from dm3d_deploy import yaml_reader
from dm3d_deploy.config.backbones import SPARSE_STRIDE, backbone_2d_of, backbone_3d_of, bev_channels_of
from dm3d_deploy.config.center_head import center_head_of, center_post_of
from dm3d_deploy.config.kinds import WORD, WORDS
from dm3d_deploy.config.schema import DetectorConfig
from dm3d_deploy.config.voxels import voxels_of
from dm3d_deploy.errors import UsageError, nearest
from dm3d_deploy.yaml_reader import Entry, Section

MODEL_FILES = Path(__file__).parents[1] / "models" / "configs"
MODULES = {
    "VFE": "MeanVFE",
    "BACKBONE_3D": "VoxelResBackBone8x",
    "MAP_TO_BEV": "HeightCompression",
    "BACKBONE_2D": "BaseBEVBackbone",
    "DENSE_HEAD": "CenterHead",
}

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
    voxels = voxels_of(data)
    backbone_3d = backbone_3d_of(modules["BACKBONE_3D"])
    backbone_2d = backbone_2d_of(modules["BACKBONE_2D"], voxels)
    return DetectorConfig(
        name=name,
        dataset=data.get("DATASET", WORD),
        class_names=class_names,
        voxels=voxels,
        backbone_3d=backbone_3d,
        bev_channels=bev_channels_of(modules["MAP_TO_BEV"], backbone_3d, voxels),
        backbone_2d=backbone_2d,
        head=center_head_of(modules["DENSE_HEAD"], class_names, SPARSE_STRIDE * backbone_2d.strides[0]),
        post=center_post_of(modules["DENSE_HEAD"].get("POST_PROCESSING", Section)),
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
