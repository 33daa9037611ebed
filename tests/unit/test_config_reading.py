"""Configs that load: the names, OpenPCDet's own files, the base merge, and the text that reads back."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from dm3d_deploy.config import (
    Backbone2dConfig,
    Backbone3dConfig,
    Branch,
    DetectorConfig,
    config_from_text,
    detector_names,
    load_config,
    sparse_height,
)
from dm3d_deploy.errors import UsageError

TINY = Path(__file__).parents[1] / "fixtures" / "centerpoint-tiny.yaml"
CENTERPOINT = Path(load_config.__code__.co_filename).parents[1] / "models/configs/centerpoint.yaml"


def without_name(config):
    return dataclasses.replace(config, name="")


def test_centerpoint_by_name():
    config = load_config("centerpoint")
    assert {"centerpoint", "centerpoint-slim", *NAMED} == set(detector_names())
    assert (config.name, config.dataset) == ("centerpoint", "NuScenesDataset")
    assert config.estimates_velocity
    assert config.voxels.grid_zyx == (40, 1024, 1024)
    assert (config.voxels.max_voxels, config.voxels.max_points_per_voxel) == (120_000, 10)
    assert config.voxels.columns == ("x", "y", "z", "intensity", "timestamp")
    assert config.backbone_3d == Backbone3dConfig(
        name="VoxelResBackBone8x", channels=(16, 16, 32, 64, 128, 128), blocks=2
    )
    assert config.bev_channels == 256
    assert config.backbone_2d == Backbone2dConfig(
        layer_nums=(5, 5), strides=(1, 2), filters=(128, 256), upsample_strides=(1, 2), upsample_filters=(256, 256)
    )
    assert config.head.classes_by_task[1] == ("truck", "construction_vehicle")
    assert [(b.name, b.channels) for b in config.head.branches[1]] == [
        *(("center", 2), ("center_z", 1), ("dim", 3), ("rot", 2), ("vel", 2), ("hm", 2))
    ]
    assert config.head.branches[0][-1] == Branch(name="hm", channels=1, convs=2)
    assert (config.head.shared_channels, config.head.bias_before_norm, config.head.stride) == (64, True, 8)
    assert (config.post.score_threshold, config.post.max_objects, config.post.nms_threshold) == (0.1, 500, 0.2)
    assert (config.post.nms_pre, config.post.nms_post) == (1000, 83)
    assert config.post.centre_limit_m == (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0)


def test_the_tiny_detector_has_own_channels():
    config = load_config(TINY)
    assert config.voxels.grid_zyx == (40, 128, 128)
    assert (config.backbone_3d.channels, config.backbone_3d.blocks) == ((4, 4, 8, 8, 16, 16), 1)
    assert config.bev_channels == 32


@pytest.mark.parametrize("source", ["centerpoint", TINY])
def test_the_text_reads_back_to_an_equal_config(source):
    config = load_config(source)
    assert config_from_text(config.text, f"somewhere/{config.name}.yaml") == config
    assert "_BASE_CONFIG_" not in config.text
    assert load_config(source).text == config.text


def test_every_field_of_the_config_comes_from_the_text():
    config = load_config(TINY)
    tree = yaml.safe_load(config.text)
    tree["DATA_CONFIG"]["DATASET"] = "KittiDataset"
    tree["MODEL"]["DENSE_HEAD"]["POST_PROCESSING"]["SCORE_THRESH"] = 1
    other = config_from_text(yaml.safe_dump(tree), "centerpoint-tiny")
    assert other.dataset == "KittiDataset"
    assert other.post.score_threshold == 1.0
    assert isinstance(other.post.score_threshold, float)
    changed = {f.name for f in dataclasses.fields(DetectorConfig) if getattr(other, f.name) != getattr(config, f.name)}
    assert changed == {"dataset", "post", "text"}


@pytest.mark.parametrize(("cells", "height"), [(40, 2), (8, 0), (16, 0), (24, 1), (41, 2), (80, 4)])
def test_height_after_the_sparse_backbone(cells, height):
    rows = cells + 1
    for padding in (1, 1, 0, 0):  # positions where a kernel of three fits, two apart
        rows = len(range(-padding, rows + padding - 2, 2))
    assert sparse_height(cells) == rows == height


def split(tmp_path, layout):
    """Our own config as OpenPCDet lays it out: a model file and a data set file that it names as its base."""
    tree = yaml.safe_load(CENTERPOINT.read_text())
    base = tree["DATA_CONFIG"]
    base["MAX_SWEEPS"] = 10
    tree["DATA_CONFIG"] = {
        "_BASE_CONFIG_": "cfgs/dataset_configs/nuscenes_dataset.yaml",
        "POINT_CLOUD_RANGE": base["POINT_CLOUD_RANGE"],
        "POINT_FEATURE_ENCODING": {"used_feature_list": ["x", "y", "z", "intensity"]},
    }
    base["POINT_CLOUD_RANGE"] = [0, 0, 0, 1, 1, 1]
    for path, content in (("nuscenes_models/mine.yaml", tree), ("dataset_configs/nuscenes_dataset.yaml", base)):
        (tmp_path / layout / path).parent.mkdir(parents=True)
        (tmp_path / layout / path).write_text(yaml.safe_dump(content))
    return tmp_path / layout / "nuscenes_models/mine.yaml"


@pytest.mark.parametrize("layout", ["tools/cfgs", "elsewhere"])
def test_bases_are_found_and_merged_as_openpcdet_does(tmp_path, monkeypatch, layout):
    monkeypatch.chdir("/")
    config = load_config(split(tmp_path, layout))
    assert config.name == "mine"
    assert config.voxels.columns == ("x", "y", "z", "intensity"), "lists are replaced, not joined"
    assert config.voxels.point_range_m[0] == -51.2
    assert config.voxels.max_voxels == 120_000, "what the model file leaves out comes from the base"
    assert config_from_text(config.text, "mine") == config


def test_errors_name_the_file_and_line_that_the_entry_came_from(tmp_path):
    path = split(tmp_path, "cfgs")
    base = path.parents[1] / "dataset_configs/nuscenes_dataset.yaml"
    lines = base.read_text().splitlines()
    base.write_text("\n".join([*lines, "MAX_SWEEP: 3"]))
    with pytest.raises(UsageError) as refusal:
        load_config(path)
    assert str(refusal.value) == (
        f"unknown entry DATA_CONFIG.MAX_SWEEP ({base}, line {len(lines) + 1}). Fix: did you mean 'MAX_SWEEPS'?"
    )


def test_bases_that_cannot_be_followed(tmp_path):
    path = split(tmp_path, "cfgs")
    base = path.parents[1] / "dataset_configs/nuscenes_dataset.yaml"
    base.write_text("_BASE_CONFIG_: other.yaml\n" + base.read_text())
    with pytest.raises(UsageError, match=r"has a _BASE_CONFIG_ itself, which OpenPCDet does not follow \(.*mine.yaml"):
        load_config(path)
    base.unlink()
    with pytest.raises(UsageError, match=r"nuscenes_dataset.yaml' was found in none of the folders above .*line 26"):
        load_config(path)
    path.write_text("DATA_CONFIG: {_BASE_CONFIG_: [a, b]}")
    with pytest.raises(UsageError, match="_BASE_CONFIG_ must name a file"):
        load_config(path)


@pytest.fixture(scope="module")
def openpcdet(shared):
    return shared / "data" / "openpcdet_cfgs"


@pytest.mark.data
def test_our_centerpoint_is_that_of_openpcdet_but_for_the_cap(openpcdet):
    theirs = load_config(openpcdet / "nuscenes_models/cbgs_voxel01_res3d_centerpoint.yaml")
    assert theirs.name == "cbgs_voxel01_res3d_centerpoint"
    assert theirs.voxels.max_voxels == 60_000
    voxels = dataclasses.replace(theirs.voxels, max_voxels=120_000)
    ours = load_config("centerpoint")
    assert dataclasses.replace(theirs, name="", voxels=voxels, text=ours.text) == without_name(ours)


NAMED = {
    "second": "kitti_models/second.yaml",
    "second-once": "once_models/second.yaml",
    "pointpillars": "kitti_models/pointpillar.yaml",
    "pv-rcnn": "kitti_models/pv_rcnn.yaml",
    "pv-rcnn-once": "once_models/pv_rcnn.yaml",
    "voxel-rcnn": "kitti_models/voxel_rcnn_car.yaml",
    "voxelnext": "nuscenes_models/cbgs_voxel0075_voxelnext.yaml",
    "centerpoint-pillar": "nuscenes_models/cbgs_dyn_pp_centerpoint.yaml",
    "centerpoint-once": "once_models/centerpoint.yaml",
    "centerpoint-0075": "nuscenes_models/cbgs_voxel0075_res3d_centerpoint.yaml",
}


@pytest.mark.data
@pytest.mark.parametrize("name", NAMED)
def test_our_other_models_are_those_of_openpcdet(openpcdet, name):
    theirs = load_config(openpcdet / NAMED[name])
    assert without_name(theirs) == without_name(load_config(name))


VERDICTS = {
    "nuscenes_models/cbgs_voxel01_res3d_centerpoint.yaml": (40, 1024, 1024),
    "nuscenes_models/cbgs_voxel0075_res3d_centerpoint.yaml": (40, 1440, 1440),
    "once_models/centerpoint.yaml": (40, 1504, 1504),
    "nuscenes_models/cbgs_dyn_pp_centerpoint.yaml": (1, 512, 512),
    "nuscenes_models/cbgs_voxel0075_voxelnext.yaml": (40, 1440, 1440),
    "kitti_models/second.yaml": (40, 1600, 1408),
    "kitti_models/pointpillar.yaml": (1, 496, 432),
    "kitti_models/pv_rcnn.yaml": (40, 1600, 1408),
    "kitti_models/voxel_rcnn_car.yaml": (40, 1600, 1408),
    "once_models/second.yaml": (40, 1504, 1504),
    "once_models/pv_rcnn.yaml": (40, 1504, 1504),
    "dataset_configs/nuscenes_dataset.yaml": "MODEL is missing",
    "dataset_configs/kitti_dataset.yaml": "MODEL is missing",
    "dataset_configs/once_dataset.yaml": "MODEL is missing",
}


@pytest.mark.data
def test_there_is_a_verdict_on_each_file_of_openpcdet(openpcdet):
    assert {str(path.relative_to(openpcdet)) for path in openpcdet.rglob("*.yaml")} == set(VERDICTS)


@pytest.mark.data
@pytest.mark.parametrize("name", VERDICTS)
def test_files_of_openpcdet_load_or_say_what_is_missing(openpcdet, name):
    verdict = VERDICTS[name]
    if not isinstance(verdict, str):
        config = load_config(openpcdet / name)
        assert config.voxels.grid_zyx == verdict
        assert config_from_text(config.text, config.name) == config
        return
    with pytest.raises(UsageError) as refusal:
        load_config(openpcdet / name)
    told = str(refusal.value)
    assert told.startswith(verdict)
