# ruff: noqa: E501 - one wrong entry per line, however long
"""Configs that are refused: each wrong value with its path and line, and YAML that was made to do harm."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dm3d_deploy.config import DetectorConfig, config_from_text, load_config
from dm3d_deploy.errors import Dm3dError, UsageError
from dm3d_deploy.yaml_reader import MAX_DEPTH, MAX_NODES

TEXT = (Path(__file__).parents[1] / "fixtures" / "centerpoint-tiny.yaml").read_text()

# What is written instead of what, and what must be said about it.
WRONG = [
    ("NAME: CenterPoint", "NAME: CenterPont", "MODEL.NAME is 'CenterPont', which is no supported detector", "CenterPoint'?"),
    ("NAME: MeanVFE", "NAME: ImageVFE", "MODEL.VFE.NAME is 'ImageVFE', which is no supported VFE module", "MeanVFE"),
    ("NAME: VoxelResBackBone8x", "NAME: VoxelResBackBone4x", "MODEL.BACKBONE_3D.NAME is 'VoxelResBackBone4x'", "did you mean 'VoxelResBackBone8x'?"),
    ("NAME: HeightCompression", "NAME: PointPillarScatter", "MODEL.MAP_TO_BEV.NAME is 'PointPillarScatter'", "HeightCompression"),
    ("NAME: BaseBEVBackbone", "NAME: BaseBEVBackboneV1", "MODEL.BACKBONE_2D.NAME is 'BaseBEVBackboneV1'", "did you mean 'BaseBEVBackbone'?"),
    ("NAME: CenterHead", "NAME: AnchorHeadSingle", "MODEL.DENSE_HEAD.NAME is 'AnchorHeadSingle'", "CenterHead"),
    ("nms_gpu", "circle_nms", "NMS_CONFIG.NMS_TYPE is 'circle_nms', which is no supported NMS", "nms_gpu"),
    ("absolute_coordinates_encoding", "polar", "encoding_type is 'polar', which is no supported encoding", "absolute_coordinates_encoding"),
    ("NAME: shuffle_points", "NAME: sample_points", "DATA_PROCESSOR[1].NAME is 'sample_points', which is no supported step", "shuffle_points"),
    ("SHARED_CONV_CHANNEL", "SHARED_CONV_CHANEL", "unknown entry MODEL.DENSE_HEAD.SHARED_CONV_CHANEL", "'SHARED_CONV_CHANNEL'?"),
    ("SHARED_CONV_CHANNEL: 16", "SHARED_CONV_CHANNEL: 0", "SHARED_CONV_CHANNEL must be a whole number, not 0", "1 to 4096"),
    ("SHARED_CONV_CHANNEL: 16", "SHARED_CONV_CHANNEL: 16.0", "must be a whole number, not 16.0", "1 to 4096"),
    ("SHARED_CONV_CHANNEL: 16", "SHARED_CONV_CHANNEL: yes", "must be a whole number, not True", "1 to 4096"),
    ("USE_BIAS_BEFORE_NORM: True", "USE_BIAS_BEFORE_NORM: 1", "USE_BIAS_BEFORE_NORM must be True or False, not 1", "True or False"),
    ("SCORE_THRESH: 0.1", "SCORE_THRESH: 1e-1", "SCORE_THRESH must be a number, not '1e-1'", "one of 0 to 1"),
    ("SCORE_THRESH: 0.1", "SCORE_THRESH: .nan", "SCORE_THRESH must be a number, not nan", "one of 0 to 1"),
    ("SCORE_THRESH: 0.1", "SCORE_THRESH: 1.5", "SCORE_THRESH must be a number, not 1.5", "one of 0 to 1"),
    ("VOXEL_SIZE: [0.2, 0.2, 0.2]", "VOXEL_SIZE: [-0.2, 0.2, 0.2]", "VOXEL_SIZE[0] must be a number, not -0.2", "0.001 to 100"),
    ("VOXEL_SIZE: [0.2, 0.2, 0.2]", "VOXEL_SIZE: [0.2, 0.2]", "VOXEL_SIZE must be a list of 3, not a list of 2", "give 3"),
    ("VOXEL_SIZE: [0.2, 0.2, 0.2]", "VOXEL_SIZE: [0.2, 0.3, 0.2]", "along y, 25.6 m, into 85.3333 cells of 0.3 m", "whole cells"),
    ("VOXEL_SIZE: [0.2, 0.2, 0.2]", "VOXEL_SIZE: [0.001, 0.2, 0.2]", "along x, 25.6 m, into 25600 cells", "1 to 8192 whole cells"),
    ("[-12.8, -12.8, -5.0, 12.8", "[12.8, -12.8, -5.0, -12.8", "POINT_CLOUD_RANGE is not ordered", "each 0 below its 1"),
    ("{test: 4000}", "{train: 4000}", "MAX_NUMBER_OF_VOXELS.test is missing", "add test"),
    ("{test: 4000}", "4000", "MAX_NUMBER_OF_VOXELS must be a section of keys, not 4000", "indent its keys"),
    ("NUM_BEV_FEATURES: 32", "NUM_BEV_FEATURES: 64", "is 64, but 16 channels x 2 cells left along z are 32", "write 32"),
    ("CHANNELS: [4, 4, 8, 8, 16, 16]", "CHANNELS: [4, 4, 8, 8, 16]", "CHANNELS must be a list of 6, not a list of 5", "give 6"),
    ("UPSAMPLE_STRIDES: [1, 2]", "UPSAMPLE_STRIDES: [1, 1]", "strides [1, 2], upsampled [1, 1]", "write [1, 2]"),
    ("UPSAMPLE_STRIDES: [1, 2]", "UPSAMPLE_STRIDES: [0.7, 1]", "UPSAMPLE_STRIDES[0] is 0.7", "one over a whole number"),
    ("LAYER_STRIDES: [1, 2]", "LAYER_STRIDES: [1]", "LAYER_STRIDES must be a list of 2, not a list of 1", "give 2"),
    ("FEATURE_MAP_STRIDE: 8", "FEATURE_MAP_STRIDE: 4", "FEATURE_MAP_STRIDE is 4, but the backbones make 8", "write 8"),
    ("- [motorcycle, bicycle]", "- [motorcycle]", "but CLASS_NAMES car, truck", "exactly one task"),
    ("- [motorcycle, bicycle]", "- [motorcycle, bicycle, car]", "CLASS_NAMES_EACH_HEAD names car,", "exactly one task"),
    ("rot, vel]", "rot, iou]", "HEAD_ORDER[4] is 'iou', which is no supported branch", "vel"),
    ("[center, center_z, dim, rot, vel]", "[center, dim, rot, vel, vel]", "HEAD_ORDER is center, dim, rot, vel, vel", "once each"),
    ("HEAD_ORDER: [center, center_z, dim, rot, vel]", "HEAD_ORDER: [center, center_z, dim, rot]", "unknown entry MODEL.DENSE_HEAD.SEPARATE_HEAD_CFG.HEAD_DICT.vel", "known: center"),
    ("dim: {out_channels: 3", "dim: {out_channels: 4", "HEAD_DICT.dim.out_channels is 4", "write 3"),
    ("used_feature_list: [x, y, z, intensity, timestamp]", "used_feature_list: [x, y, intensity]", "used_feature_list is x, y, intensity", "start with x, y, z"),
    ("used_feature_list: [x, y, z, intensity, timestamp]", "used_feature_list: [x, y, z, elongation]", "is 'elongation', which is no supported point column", "known: x, y, z"),
    ("- NAME: shuffle_points", "- NAME: transform_points_to_voxels", "DATA_PROCESSOR makes voxels by transform_points_to_voxels, transform_points_to_voxels", "once"),
    ("NMS_THRESH: 0.2", "NMS_THRESH: 0.2\n                MULTI_CLASSES_NMS: True", "MULTI_CLASSES_NMS is True", "write False"),
    ("DATASET: NuScenesDataset", "DATASET: 7", "DATA_CONFIG.DATASET must be text, not 7", "write a word"),
    ("DATASET: NuScenesDataset", "DATASET: [a]", "DATA_CONFIG.DATASET must be text, not a list of 1", "write a word"),
    ("DATASET: NuScenesDataset", "CLASSES: 7", "unknown entry DATA_CONFIG.CLASSES", "known"),
    ("        FEATURE", "        NAME: CenterHead\n            FEATURE", "unknown entry MODEL.DENSE_HEAD.TARGET_ASSIGNER_CONFIG.NAME", "NUM_MAX_OBJS"),
    ("    MAP_TO_BEV:", "    ROI_HEAD: {NAME: PVRCNNHead}\n    MAP_TO_BEV:", "unknown entry MODEL.ROI_HEAD", "known"),
    ("MODEL:", "MODELL:", "MODEL is missing", "add MODEL"),
    ("    VFE:", "    VFE: {NAME: MeanVFE}\n    VFE:", "'VFE' was given before, on line", "keep one of the two"),
    ("DATASET: NuScenesDataset", "DATASET: 2020-01-01", "has the YAML type 'tag:yaml.org,2002:timestamp'", "quotes around dates"),
    ("DATASET: NuScenesDataset", "DATASET: !!python/object/apply:os.system [ls]", "has the YAML type 'tag:yaml.org,2002:python/", "without tags"),
    ("DATASET: NuScenesDataset", "DATASET: !!int twelve", "has the YAML type 'tag:yaml.org,2002:int'", "without tags"),
    ("DATASET: NuScenesDataset", "DATASET: 0x_", "'0x_' is not a number", "correct the number"),
    ("DATASET: NuScenesDataset", "DATASET: " + "9" * 5000, "has the YAML type 'tag:yaml.org,2002:int'", "without tags"),
    ("DATASET: NuScenesDataset", '<<: {a: b}', "a key is not plain text (merge keys", "every key as a word"),
    ("DATASET: NuScenesDataset", "7: a", "a key is not plain text", "every key as a word"),
    ("DATASET: NuScenesDataset", 'DATASET: "\\UFFFFFFFF"', "this is not YAML", "correct the"),
    ("DATASET: NuScenesDataset", "DATASET: [", "this is not YAML", "correct the line"),
    ("DATASET: NuScenesDataset", "DATASET: a\x00b", "this is not YAML", "correct the line"),
    ("MODEL:", "---\nMODEL:", "this is not YAML: but found another document", "correct the line"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "what", "fix"), WRONG, ids=[f"{c[1][:40]!r}" for c in WRONG])
def test_wrong_entries_are_named_with_their_line(old, new, what, fix):
    assert TEXT.count(old) >= 1
    with pytest.raises(UsageError) as refusal:
        config_from_text(TEXT.replace(old, new, 1), "folder/mine.yaml")
    assert what in refusal.value.what
    assert fix in refusal.value.fix
    assert "mine.yaml" in refusal.value.what


@pytest.mark.parametrize(("old", "new"), [(case[0], case[1]) for case in WRONG[:30]])
def test_the_line_is_that_of_the_entry(old, new):
    with pytest.raises(UsageError) as refusal:
        config_from_text(TEXT.replace(old, new, 1), "mine.yaml")
    line = int(refusal.value.what.split("line ")[1].split(")")[0].split(":")[0])
    if " is missing" not in refusal.value.what:
        assert new.split(":")[0].split(",")[0].strip(" -[]") in TEXT.replace(old, new, 1).splitlines()[line - 1]


def test_the_grid_must_fit_the_strides():
    text = TEXT.replace("[-12.8, -12.8, -5.0, 12.8, 12.8, 3.0]", "[-12.8, -12.8, -5.0, 12.8, 14.4, 3.0]")
    with pytest.raises(UsageError, match=r"needs a multiple of 16 cells along y \(8 of the sparse .* the grid has 136"):
        config_from_text(text, "mine.yaml")


def test_a_grid_too_low_for_the_backbone_leaves_nothing():
    text = TEXT.replace("-5.0, 12.8, 12.8, 3.0]", "-5.0, 12.8, 12.8, -3.0]")
    with pytest.raises(UsageError, match=r"16 channels x 0 cells left along z are 0 .* Fix: give the grid more cells"):
        config_from_text(text, "mine.yaml")


def test_names_and_paths_that_do_not_exist(tmp_path):
    with pytest.raises(UsageError, match=r"there is no detector 'centerpiont'. Fix: did you mean 'centerpoint'\?"):
        load_config("centerpiont")
    for path in (tmp_path / "mine", tmp_path / "mine.yaml", str(tmp_path / "mine"), "mine.yaml", tmp_path):
        with pytest.raises(UsageError, match="there is no config file"):
            load_config(path)
    with pytest.raises(UsageError, match="there is no detector ''"):
        load_config("")


def test_files_that_are_no_yaml_of_a_detector(tmp_path):
    path = tmp_path / "a.yaml"
    cases = [
        (b"", "a.yaml is not a mapping of sections"),
        (b"- a\n- b\n", "a.yaml is not a mapping of sections"),
        (b"\xff\xfe\x00", "a.yaml is not text: byte 0 is no UTF-8"),
        (b"a: b\n" * 300_000, r"a.yaml holds \d+ characters of YAML; the limit is 1048576"),
        (b"a: \t@\n", r"a.yaml, line 1: this is not YAML: "),
    ]
    for content, message in cases:
        path.write_bytes(content)
        with pytest.raises(UsageError, match=message):
            load_config(path)


def bomb(levels, width):
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


BOMBS = {
    "aliases": (bomb(9, 9), f"more than {MAX_NODES} values once aliases are expanded"),
    "aliases of mappings": ("x: &x {a: 1, b: 2}\n" + "".join(
        f"y{n}: &y{n} {{a: *{'x' if n == 0 else f'y{n - 1}'}, b: *{'x' if n == 0 else f'y{n - 1}'}}}\n" for n in range(25)
    ), "once aliases are expanded"),
    "alias of itself": ("a: &a [*a]", f"deeper than {MAX_DEPTH} levels"),
    "flow depth": ("a: " + "[" * 100_000, f"deeper than {MAX_DEPTH} levels"),
    "block depth": ("- " * 50_000 + "a", f"deeper than {MAX_DEPTH} levels"),
    "key depth": ("? " * 50_000 + "a", f"deeper than {MAX_DEPTH} levels"),
    "many values": ("a: [" + "1," * 200_000 + "]", f"more than {MAX_NODES} values"),
    "long number": ("a: 1" + ":00" * 100_000, "has the YAML type"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_yaml_bombs_end_in_a_sentence(name):
    content, message = BOMBS[name]
    with pytest.raises(UsageError, match=message):
        config_from_text(content, "bomb.yaml")


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_mutated_yaml_ends_in_a_config_or_in_a_sentence(data):
    text = TEXT
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        piece = data.draw(
            st.one_of(
                st.sampled_from(["&a ", "*a", "!!", "!x ", "- ", "? ", ": ", "[", "{", "}", "|", "<<", "%", '"', "\t", "~", "=", "0x_", ".inf"]),
                st.text(max_size=5),
            )
        )  # fmt: skip
        text = text[:at] + piece + text[at + data.draw(st.integers(0, 12)) :]
    try:
        config = config_from_text(text, "mine.yaml")
    except Dm3dError as error:
        assert isinstance(error, UsageError)  # noqa: PT017 - either ending is right
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert isinstance(config, DetectorConfig)
        assert config_from_text(config.text, "mine.yaml") == config
