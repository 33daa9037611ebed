"""A build that prunes voxels beside weights: what is counted, what runs, and what says no."""

import json

import numpy as np
import pytest
from run_sample import Noted, tiny_recipe
from safetensors.numpy import load_file

from dm3d_deploy.build import build
from dm3d_deploy.errors import EngineError, UsageError
from dm3d_deploy.steps.layers import read_layers
from engines.sparse3d.onnx_reader import read_backbone


@pytest.fixture(scope="module")
def pruned(tiny_frames, tmp_path_factory):
    root, watch = tmp_path_factory.mktemp("voxels") / "run", Noted()
    build(tiny_recipe(tiny_frames, target=0.6, voxel_keep=0.5, voxel_stages="1,3", score_frames=0), root, watch=watch)
    return root, watch


def told(root, name):
    return json.loads((root / name).read_text())


def test_voxels_count_in_the_same_macs(pruned, tiny_run):
    root, _ = pruned
    layers = {layer.name: layer for layer in read_layers(root / "work" / "layers.json")}
    before = {layer.name: layer for layer in read_layers(tiny_run / "work" / "layers.json")}
    spared = {name for name, layer in layers.items() if layer.spared_macs > 0}
    assert spared == {name for name in layers if name.startswith(("backbone_3d.conv1.", "backbone_3d.conv3.")) and
                      not name.startswith("backbone_3d.conv3.0")}  # fmt: skip
    assert all(layer.dense_macs == pytest.approx(before[name].macs) for name, layer in layers.items())
    budget = told(root, "report.json")["budget"]
    assert 0.57 < budget["kept"] <= 0.6
    rows = told(root, "work/masks.json")
    part = {name: layer.part for name, layer in layers.items()}
    kept = sum(row["kept_macs"] for row in rows if part[row["layer"]] != "head")
    assert kept / sum(before[name].macs for name in before if part[name] != "head") == pytest.approx(budget["kept"])


def test_the_dense_detector_keeps_all_voxels_and_onnx_agrees_with_torch(pruned):
    root, _ = pruned
    shares = load_file(root / "weights" / "pruned.safetensors")["backbone_3d.voxel_permille"]
    assert shares.tolist() == [500, 1000, 500, 1000]
    assert "backbone_3d.voxel_permille" not in load_file(root / "weights" / "dense.safetensors")
    parity = told(root, "work/verification.json")["parity"]
    assert all(row["passed"] for row in parity)
    assert b"ChooseVoxels_500" in (root / "onnx" / "backbone3d.onnx").read_bytes()
    assert b"ChooseVoxels" not in (root / "onnx" / "dense" / "backbone3d.onnx").read_bytes()


def test_there_is_no_plan_and_the_report_says_why(pruned):
    root, watch = pruned
    assert not (root / "engines" / "backbone3d" / "backbone3d.plan").exists()
    skipped = [row["reason"] for row in told(root, "report.json")["skipped"]]
    assert any("it chooses voxels by their features" in reason for reason in skipped)
    assert any("it chooses voxels by their features" in note for note in watch.notes)
    with pytest.raises(EngineError, match="build with --voxel-keep 1"):
        read_backbone(root / "onnx" / "backbone3d.onnx")


def test_the_refit_leaves_out_layers_that_run_on_other_voxels(pruned):
    root, _ = pruned
    masks = load_file(root / "weights" / "masks.safetensors")
    dense, found = (load_file(root / "weights" / f"{name}.safetensors") for name in ("dense", "pruned"))
    steps = told(root, "work/recovery.json")["steps"]
    assert steps[0]["method"] == "layer-wise reconstruction"
    for name, keep in masks.items():
        if name.startswith(("backbone_3d.conv1.", "backbone_3d.conv3.1", "backbone_3d.conv3.2")):
            np.testing.assert_array_equal(found[f"{name}.weight"], dense[f"{name}.weight"] * keep)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"voxel_keep": 0.0}, "--voxel-keep 0 is no share of voxels"),
        ({"voxel_keep": 1.5}, "--voxel-keep 1.5 is no share of voxels"),
        (
            {"voxel_keep": 0.5, "cost": "latency"},
            "--voxel-keep 0.5 is no share of voxels that --cost latency",
        ),
    ],
)
def test_impossible_shares_are_refused(tiny_frames, changes, said):
    with pytest.raises(UsageError, match=said):
        tiny_recipe(tiny_frames, **changes)


def test_an_unknown_stage_is_refused(tiny_frames, tmp_path):
    with pytest.raises(UsageError, match="--voxel-stages names 5, and the backbone has 4 stages"):
        build(tiny_recipe(tiny_frames, voxel_keep=0.5, voxel_stages="2,5"), tmp_path / "run", last="load")
