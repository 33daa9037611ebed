"""Checkpoints of each family: both spconv layouts, half precision, and what does not fit, both sides named."""

import pytest
import torch
import yaml
from zoo_sample import VARIANTS, variant, variant_text

from dm3d_deploy.config import config_from_text
from dm3d_deploy.errors import CheckpointError
from dm3d_deploy.models.checkpoints import load_checkpoint
from dm3d_deploy.models.detector import build_detector, prunable_layers
from dm3d_deploy.models.naming import made_of
from dm3d_deploy.models.seeded import seed_weights
from dm3d_deploy.steps.inputs import changes_of

MADE_OF = {
    "second": "a plain 3D backbone, an anchor head of 18 scores a cell",
    "pointpillars": "pillars, an anchor head of 18 scores a cell",
    "voxelnext": "a VoxelNeXt backbone, a centre head with 1, 2, 2, 1, 2, 2 classes per task",
    "centerpoint-pillar": "pillars of several layers, a centre head with 1, 2, 2, 1, 2, 2 classes per task",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A seeded checkpoint of every family as OpenPCDet writes it."""
    folder = tmp_path_factory.mktemp("zoo")
    for name in VARIANTS:
        detector = build_detector(variant(name))
        seed_weights(detector, 7)
        torch.save({"epoch": 80, "it": 9, "model_state": detector.state_dict()}, folder / f"{name}.pth")
    return folder


def state_of(path):
    return torch.load(path, weights_only=True)["model_state"]


@pytest.mark.parametrize("name", VARIANTS)
def test_half_precision_and_the_old_layout_load(name, files, tmp_path):
    state = state_of(files / f"{name}.pth")
    target = build_detector(variant(name))
    layers = [layer for layer in prunable_layers(target) if layer.kind == "sparse"]
    sparse = {f"{layer.name}.weight" for layer in layers}
    old = {key: torch.movedim(v, 0, -1).contiguous() if key in sparse else v for key, v in state.items()}
    for key in (f"{layer.name}.weight" for layer in layers if layer.pointwise):  # spconv 1 and 2 read these alike
        old[key] = state[key].reshape(1, 1, state[key].shape[-1], state[key].shape[0])
    torch.save({key: v.half() if v.is_floating_point() else v for key, v in old.items()}, tmp_path / "a.pth")
    info = load_checkpoint(target, tmp_path / "a.pth")
    assert info.spconv_layout == ("1.x" if sparse else "2.x")
    assert info.cast == sum(v.is_floating_point() for v in state.values())
    old_order = ", spconv 1.x's weights brought into 2.x's order" if sparse else ""
    assert changes_of(info) == f"{old_order}, {info.cast} tensors cast to float32"
    assert all(torch.equal(v, state[key].half().to(v.dtype)) for key, v in target.state_dict().items())


@pytest.mark.parametrize("name", VARIANTS)
def test_another_family_is_refused_with_both_named(name, files):
    target = build_detector(variant(name))
    before = {key: v.clone() for key, v in target.state_dict().items()}
    for other in VARIANTS:
        if other == name:
            continue
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(target, files / f"{other}.pth")
        assert f"it holds {MADE_OF[other]}, and small-{name} is {MADE_OF[name]}; " in str(caught.value)
        assert " missing: " in caught.value.what
        assert " unexpected: " in caught.value.what
        assert len(caught.value.what.split("small-")[1]) < 600  # of each kind one name, not five
    assert all(torch.equal(v, before[key]) for key, v in target.state_dict().items())


@pytest.mark.parametrize("name", VARIANTS)
def test_another_class_count_is_refused_with_both_named(name, files):
    entries = yaml.safe_load(variant_text(name))
    head, gone = entries["MODEL"]["DENSE_HEAD"], entries["CLASS_NAMES"].pop()
    if "ANCHOR_GENERATOR_CONFIG" in head:
        assert head["ANCHOR_GENERATOR_CONFIG"].pop()["class_name"] == gone
        there, here = "an anchor head of 18 scores a cell", "an anchor head of 8 scores a cell"
    else:
        assert head["CLASS_NAMES_EACH_HEAD"][-1].pop() == gone
        there, here = "1, 2, 2, 1, 2, 2 classes per task", "1, 2, 2, 1, 2, 1 classes per task"
    target = build_detector(config_from_text(yaml.safe_dump(entries), "fewer.yaml"))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(target, files / f"{name}.pth")
    assert there in caught.value.what
    assert here in caught.value.what
    assert " misshapen: dense_head." in caught.value.what


@pytest.mark.parametrize("name", VARIANTS)
def test_a_width_that_disagrees_is_refused_with_both_shapes(name, files, tmp_path):
    state = state_of(files / f"{name}.pth")
    target = build_detector(variant(name))
    key = next(key for key in state if key.endswith(".weight"))
    torch.save({**state, key: torch.cat([state[key], state[key]])}, tmp_path / "a.pth")
    shape = tuple(state[key].shape)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(target, tmp_path / "a.pth")
    assert f"1 misshapen: {key} float {(2 * shape[0], *shape[1:])} for float {shape}" in caught.value.what


def test_what_a_file_is_made_of_is_read_from_its_names():
    assert made_of({"head.weight": (3,)}) == "head"
    assert made_of({"dense_head.other": (3,)}) == "nothing known here"
    assert made_of({"roi_head.a": (1,), "vfe.pfn_layers.0.linear.weight": (8, 10)}) == "pillars, roi_head"
