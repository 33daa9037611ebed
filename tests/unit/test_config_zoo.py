# ruff: noqa: E501 - one wrong entry per line, however long
"""Anchor heads, pillars and the plain backbone in configs: what is read, and what is refused with its path and line."""

import math
from pathlib import Path

import pytest

from dm3d_deploy.config import (
    AnchorPostConfig,
    ClassAnchors,
    DirectionConfig,
    PillarConfig,
    config_from_text,
    detector_names,
    load_config,
)
from dm3d_deploy.errors import UsageError

CONFIGS = Path(load_config.__code__.co_filename).parents[1] / "models" / "configs"


def text_of(name):
    return (CONFIGS / f"{name}.yaml").read_text()


def test_second_is_read():
    config = load_config("second")
    assert not config.estimates_velocity
    assert (config.backbone_3d.name, config.backbone_3d.channels, config.backbone_3d.blocks, config.pillars) == (
        "VoxelBackBone8x", (16, 16, 32, 64, 64, 128), 2, None,
    )  # fmt: skip
    assert config.head.anchors[1] == ClassAnchors(
        class_name="Pedestrian", sizes_m=((0.8, 0.6, 1.73),), rotations_rad=(0.0, 1.57), bottom_m=-0.6,
        align_center=False, matched=0.5, unmatched=0.35,
    )  # fmt: skip
    assert config.head.direction == DirectionConfig(bins=2, offset_rad=0.78539, limit_offset=0.0)
    assert (config.head.stride, config.head.per_cell) == (8, 6)
    assert config.post == AnchorPostConfig(
        score_threshold=0.1, multi_class=False, nms_threshold=0.01, nms_pre=4096, nms_post=500
    )
    assert config.nms_groups == (("Car", "Pedestrian", "Cyclist"),)
    assert config_from_text(config.text.replace("MULTI_CLASSES_NMS: false", "MULTI_CLASSES_NMS: true"), "x").nms_groups == (
        ("Car",), ("Pedestrian",), ("Cyclist",),
    )  # fmt: skip


def test_pillars_are_read():
    config = load_config("pointpillars")
    assert config.pillars == PillarConfig(dynamic=False, filters=(64,), absolute_xyz=True, with_distance=False)
    assert (config.backbone_3d, config.bev_channels, config.head.stride) == (None, 64, 2)
    assert config.pillars.features(4) == 10
    dynamic = load_config("centerpoint-pillar")
    assert dynamic.pillars == PillarConfig(dynamic=True, filters=(64, 64), absolute_xyz=True, with_distance=False)
    assert dynamic.pillars.features(5) == 11
    assert PillarConfig(dynamic=True, filters=(4,), absolute_xyz=False, with_distance=True).features(4) == 8
    assert dynamic.backbone_2d.upsample_strides == (0.5, 1, 2)
    assert dynamic.head.stride == 4


@pytest.mark.parametrize("name", detector_names())
def test_every_model_reads_back_from_its_flattened_text(name):
    config = load_config(name)
    assert config_from_text(config.text, name) == config
    assert math.prod(config.voxels.grid_zyx) > 0


WRONG = [
    ("second", "NAME: AnchorHeadSingle", "NAME: AnchorHeadMulti", "MODEL.DENSE_HEAD.NAME is 'AnchorHeadMulti', which is no supported DENSE_HEAD module", "did you mean 'AnchorHeadSingle'?"),
    ("second", "NAME: MeanVFE", "NAME: PillarVFE", "MODEL.VFE.NAME is 'PillarVFE', which is no supported VFE module", "known: MeanVFE"),
    ("pointpillars", "NAME: PointPillarScatter", "NAME: HeightCompression", "MODEL.MAP_TO_BEV.NAME is 'HeightCompression'", "known: PointPillarScatter"),
    ("second", "AxisAlignedTargetAssigner", "ATSS", "TARGET_ASSIGNER_CONFIG.NAME is 'ATSS', which is no supported target assigner", "known: AxisAlignedTargetAssigner"),
    ("second", "ResidualCoder", "PreviousResidualDecoder", "BOX_CODER is 'PreviousResidualDecoder', which is no supported box coder", "did you mean 'ResidualCoder'?"),
    ("second", "class_name: Cyclist", "class_name: Car", "has anchors for Car, Pedestrian, Car, but CLASS_NAMES are Car, Pedestrian, Cyclist", "give each class one entry"),
    ("second", "class_name: Cyclist", "class_name: Tram", "class_name is 'Tram', but CLASS_NAMES are", "name one of them"),
    ("second", "anchor_rotations: [0.0, 1.57]", "anchor_rotations: [0.0]", "gives the classes different numbers of rotations", "as many rotations"),
    ("second", "unmatched_threshold: 0.45", "unmatched_threshold: 0.65", "unmatched_threshold is 0.65, above the 0.6 of a match", "write a lower one"),
    ("second", "feature_map_stride: 8", "feature_map_stride: 4", "feature_map_stride is 4, but the backbones make 8", "write 8"),
    ("second", "anchor_bottom_heights: [-1.78]", "anchor_bottom_heights: [-1.78, 0.0]", "anchor_bottom_heights must be a list of 1", "give 1"),
    ("second", "NUM_DIR_BINS: 2", "NUM_DIR_BINS: 1", "NUM_DIR_BINS must be a whole number, not 1", "write one of 2 to 16"),
    ("second", "nms_gpu", "nms_normal_gpu", "NMS_TYPE is 'nms_normal_gpu', which is no supported NMS", "nms_gpu"),
    ("pointpillars", "NUM_FILTERS: [64]", "NUM_FILTERS: [64, 64]", "NUM_FILTERS names 2 layers, and PillarVFE is read with one", "DynPillarVFE"),
    ("pointpillars", "USE_NORM: true", "USE_NORM: false", "USE_NORM is False, which is not read here", "write True"),
    ("pointpillars", "VOXEL_SIZE: [0.16, 0.16, 4.0]", "VOXEL_SIZE: [0.16, 0.16, 2.0]", "makes 2 cells along z, and pillars have one", "height of the range"),
    ("pointpillars", "NUM_BEV_FEATURES: 64", "NUM_BEV_FEATURES: 32", "NUM_BEV_FEATURES is 32, but the channels of the pillars are 64", "write 64"),
    ("pointpillars", "NAME: PillarVFE", "NAME: DynPillarVFE", "makes voxels by transform_points_to_voxels", "transform_points_to_voxels_placeholder once, as MODEL.VFE needs it"),
    ("centerpoint-pillar", "NUM_FILTERS: [64, 64]", "NUM_FILTERS: [63, 64]", "NUM_FILTERS is [63, 64]", "even numbers"),
    ("centerpoint-pillar", "UPSAMPLE_STRIDES: [0.5, 1, 2]", "UPSAMPLE_STRIDES: [0.7, 1, 2]", "UPSAMPLE_STRIDES[0] is 0.7", "one over a whole number: 0.5, 0.25"),
    ("centerpoint-pillar", "UPSAMPLE_STRIDES: [0.5, 1, 2]", "UPSAMPLE_STRIDES: [0.5, 2, 2]", "does not bring the blocks to one size", "write ["),
    ("voxelnext", "KERNEL_SIZE_HEAD: 1", "KERNEL_SIZE_HEAD: 3", "MODEL.DENSE_HEAD.KERNEL_SIZE_HEAD is 3, and a sparse head is read with 1", "write 1"),
    ("voxelnext", "KERNEL_SIZE_HEAD: 1", "IOU_BRANCH: true", "KERNEL_SIZE_HEAD is 3, and a sparse head is read with 1", "write 1"),
    ("voxelnext", "KERNEL_SIZE_HEAD: 1", "KERNEL_SIZE_HEAD: 1\n        IOU_BRANCH: true", "IOU_BRANCH is True, which is not read here", "write False"),
    ("voxelnext", "USE_BIAS_BEFORE_NORM: true", "USE_BIAS_BEFORE_NORM: false", "USE_BIAS_BEFORE_NORM is False, which is not read for VoxelNeXtHead", "write True"),
    ("voxelnext", "CHANNELS: [16, 32, 64, 128, 128]", "CHANNELS: [16, 32, 64, 64, 128]", "CHANNELS gives conv4 64 and conv5 128, which are added up", "make the last two equal"),
    ("voxelnext", "SHARED_CONV_CHANNEL: 128", "SHARED_CONV_CHANNEL: 64", "SHARED_CONV_CHANNEL is 64, but OUT_CHANNEL of the backbone is 128", "write 128"),
    ("voxelnext", "FEATURE_MAP_STRIDE: 8", "FEATURE_MAP_STRIDE: 4", "FEATURE_MAP_STRIDE is 4, but the backbones make 8", "write 8"),
    ("voxelnext", "OUT_CHANNEL: 128", "OUT_CHANNEL: 128\n        SPCONV_KERNEL_SIZES: [5, 5, 3, 3]", "unknown entry MODEL.BACKBONE_3D.SPCONV_KERNEL_SIZES", "known: NAME, CHANNELS, OUT_CHANNEL, NUM_BLOCKS"),
    ("pv-rcnn", "NAME: PVRCNNHead", "NAME: PartA2FCHead", "MODEL.ROI_HEAD.NAME is 'PartA2FCHead', which is no supported ROI_HEAD module", "known: PVRCNNHead"),
    ("voxel-rcnn", "NAME: VoxelRCNNHead", "NAME: VoxelRCNNHeads", "MODEL.ROI_HEAD.NAME is 'VoxelRCNNHeads', which is no supported ROI_HEAD module", "did you mean 'VoxelRCNNHead'?"),
    ("pv-rcnn", "NAME: PointHeadSimple", "NAME: PointHeadBox", "MODEL.POINT_HEAD.NAME is 'PointHeadBox', which is no supported POINT_HEAD module", "PointHeadSimple"),
    ("pv-rcnn", "SAMPLE_METHOD: FPS", "SAMPLE_METHOD: SPC", "MODEL.PFE.SAMPLE_METHOD is 'SPC', which is no supported way to sample", "FPS"),
    ("pv-rcnn", "POINT_SOURCE: raw_points", "POINT_SOURCE: voxel_centers", "POINT_SOURCE is 'voxel_centers', which is no supported source of keypoints", "raw_points"),
    ("pv-rcnn", "FEATURES_SOURCE: [bev, ", "FEATURES_SOURCE: [bev, bev, ", "FEATURES_SOURCE is bev, bev,", "name each source once"),
    ("pv-rcnn", "DOWNSAMPLE_FACTOR: 4", "DOWNSAMPLE_FACTOR: 2", "SA_LAYER.x_conv3.DOWNSAMPLE_FACTOR is 2, but x_conv3 has 4", "write 4"),
    ("pv-rcnn", "USE_POINT_FEATURES_BEFORE_FUSION: true", "USE_POINT_FEATURES_BEFORE_FUSION: false", "is False, which is not read here", "write True"),
    ("voxel-rcnn", "CLASS_AGNOSTIC: true", "CLASS_AGNOSTIC: false", "MODEL.ROI_HEAD.CLASS_AGNOSTIC is False, and one score for all classes is read", "write True"),
    ("voxel-rcnn", "POOL_METHOD: max_pool", "POOL_METHOD: avg_pool", "POOL_LAYERS.x_conv2.POOL_METHOD is 'avg_pool', which is no supported way to pool", "max_pool"),
    ("voxel-rcnn", "- [32, 32]", "- [32]", "POOL_LAYERS.x_conv2.MLPS has a grouping without two widths", "within and behind the maximum"),
    ("voxel-rcnn", "FEATURES_SOURCE: [x_conv2, ", "FEATURES_SOURCE: [x_conv2, x_conv2, ", "ROI_GRID_POOL.FEATURES_SOURCE is x_conv2, x_conv2,", "name each source once"),
    ("voxel-rcnn", "{NMS_TYPE: nms_gpu, MULTI_CLASSES_NMS: false, NMS_THRESH: 0.7", "{NMS_TYPE: nms_gpu, MULTI_CLASSES_NMS: true, NMS_THRESH: 0.7", "NMS_CONFIG.TEST.MULTI_CLASSES_NMS is True, and proposals of all classes suppress each other", "write False"),
    ("voxel-rcnn", "POOL_RADIUS: [0.4]", "POOL_RADIUS: [0.4, 0.8]", "POOL_RADIUS must be a list of 1, not a list of 2", "give 1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "right", "wrong", "what", "fix"), WRONG)
def test_a_wrong_entry_is_named_with_its_path_line_and_remedy(name, right, wrong, what, fix):
    text = text_of(name)
    assert right in text
    with pytest.raises(UsageError) as refusal:
        config_from_text(text.replace(right, wrong, 1), "mine.yaml")
    assert what in str(refusal.value)
    assert "(mine.yaml, line " in str(refusal.value)
    assert fix in refusal.value.fix


def test_what_only_a_center_head_has_is_refused_for_anchors():
    with pytest.raises(UsageError, match="second has an anchor head, and this needs a CenterHead"):
        load_config("second").center_head  # noqa: B018
    assert load_config("centerpoint").center_head.stride == 8
