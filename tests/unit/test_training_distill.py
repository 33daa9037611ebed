"""Distillation: its loss is the distortion that pruning minimises; a pruned detector comes back, its zeros stay."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_sample import CONFIG, batches, detector
from zoo_sample import variant

from dm3d_deploy.errors import CheckpointError, UsageError
from dm3d_deploy.models.detector import build_detector, prunable_layers
from dm3d_deploy.pruning.normalisation import output_distortion, output_scale, top_cells
from dm3d_deploy.training.checkpoint import WEIGHTS_NAME
from dm3d_deploy.training.distill import DistillScale, distil, distillation_losses, estimate_scale, zeros_held
from dm3d_deploy.training.loop import TrainSettings, raw_maps, train_detector
from dm3d_deploy.training.schedule import OneCycle


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    made = detector()
    settings = TrainSettings(steps=40, half_2d=False)
    train_detector(made, batches, settings, out=tmp_path_factory.mktemp("teacher"))
    return made.state_dict()


def copy_of(state):
    made = build_detector(CONFIG)
    made.load_state_dict(state)
    return made


def maps_of(made, step):
    """Raw maps of a batch that no training here saw, a frame each."""
    with torch.no_grad():
        maps = raw_maps(made, batches(10_000 + step), half_2d=False)
    return [{name: value[row : row + 1].numpy() for name, value in maps.items()} for row in range(2)]


def masks_for(made, keep):
    """The largest weights of every layer but the last of each branch."""
    masks = {}
    for layer in prunable_layers(made):
        if not layer.final:
            size = layer.weight.detach().abs()
            masks[layer.name] = (size >= size.flatten().kthvalue(int((1 - keep) * size.numel())).values).numpy()
    return masks


def distortion(made, dense):
    """By the numpy functions that pruning uses."""
    pairs = [pair for step in range(3) for pair in zip(maps_of(dense, step), maps_of(made, step), strict=True)]
    scale = output_scale((wanted for wanted, _ in pairs), 20)
    return np.mean([output_distortion(wanted, own, scale, top_cells(wanted, 20)) for wanted, own in pairs])


def test_the_loss_of_one_frame_is_its_distortion(teacher) -> None:
    dense, other = copy_of(teacher), detector()
    frames, changed = maps_of(dense, 0), maps_of(other, 0)
    scale = output_scale(frames, 20)
    cells = frames[0]["0.hm"][0, 0].size
    for wanted, own in zip(frames, changed, strict=True):
        tensors = [{name: torch.from_numpy(value) for name, value in maps.items()} for maps in (own, wanted)]
        losses = distillation_losses(*tensors, DistillScale.of(scale, cells))
        expected = output_distortion(wanted, own, scale, top_cells(wanted, 20))
        assert float(losses["score"] + losses["box"]) == pytest.approx(expected, rel=1e-5)
        assert expected > 0.1
        same = distillation_losses(tensors[1], tensors[1], DistillScale.of(scale, cells))
        assert [float(value) for value in same.values()] == [0, 0]


def test_the_loss_of_an_anchor_head_is_its_distortion() -> None:
    random = np.random.default_rng(0)
    channels = {"cls": 3, "box": 7, "dir": 2}
    frames = [
        {
            f"{anchor}.{branch}": random.normal(0, 1, (1, count, 8, 6)).astype(np.float32)
            for anchor in range(4)
            for branch, count in channels.items()
        }
        for _ in range(2)
    ]
    scale = output_scale(frames, 20)
    tensors = [{name: torch.from_numpy(value) for name, value in maps.items()} for maps in frames]
    losses = distillation_losses(tensors[0], tensors[1], DistillScale.of(scale, 48))
    expected = output_distortion(frames[1], frames[0], scale, top_cells(frames[1], 20))
    assert float(losses["score"] + losses["box"]) == pytest.approx(expected, rel=1e-5)


def test_the_scale_is_of_the_first_crops_of_one_size(teacher) -> None:
    def mixed(step):
        batch = batches(step)
        return replace(batch, shape_zyx=(41, 64, 64)) if step % 2 else batch

    dense = copy_of(teacher)
    found = estimate_scale(dense, mixed)
    crops = []
    for step in (0, 2, 4, 6):
        with torch.no_grad():
            maps = raw_maps(dense, batches(step), half_2d=False)
        crops += [{name: value[row : row + 1].numpy() for name, value in maps.items()} for row in range(2)]
    expected = output_scale(crops, 1)  # 500 of 16384 cells are one of 48
    assert found.score_energy == pytest.approx(expected.score_energy / 48, rel=1e-5)
    np.testing.assert_allclose(found.box_deviation["0.dim"], expected.box_deviation["0.dim"], rtol=1e-5)
    assert found.box_share == 1 / 48


def test_a_pruned_detector_comes_back_and_keeps_every_zero(teacher, tmp_path) -> None:
    dense, pruned = copy_of(teacher), copy_of(teacher)
    masks = masks_for(pruned, keep=0.5)
    zeros_held(pruned, masks)
    before = distortion(pruned, dense)
    blind = replace_targets(batches)
    settings = TrainSettings(steps=40, half_2d=False, log_every=20, cycle=OneCycle(peak_rate=2e-3))
    distil(pruned, dense, blind, settings, out=tmp_path, masks=masks)
    after = distortion(pruned, dense)
    assert before > 0.05
    assert after < 0.6 * before, (before, after)
    saved = load_file(tmp_path / WEIGHTS_NAME)
    for name, keep in masks.items():
        weight = saved[f"{name}.weight"].numpy()
        assert not weight[~keep].any(), name
        assert np.count_nonzero(weight) > 0.9 * np.count_nonzero(keep), name
    for name, value in teacher.items():  # the teacher is what it was, and so are the statistics
        assert torch.equal(value, dense.state_dict()[name]), name
        assert "running" not in name or torch.equal(value, saved[name]), name


def replace_targets(source):
    """Batches whose targets would break any loss that looked at them."""
    return lambda step: replace(source(step), targets=())


def test_fine_tuning_on_labels_keeps_every_zero(teacher, tmp_path) -> None:
    """Also after a break, and in the state that resuming reads."""
    pruned = copy_of(teacher)
    masks = masks_for(pruned, keep=0.3)
    settings = TrainSettings(steps=6, half_2d=False, save_every_s=0.0)

    def interrupted(step):
        if step == 3:
            raise KeyboardInterrupt
        return batches(step)

    with pytest.raises(KeyboardInterrupt):
        train_detector(pruned, interrupted, settings, out=tmp_path, after_step=zeros_held(pruned, masks))
    resumed = build_detector(CONFIG)
    train_detector(resumed, batches, settings, out=tmp_path, resume=True, after_step=zeros_held(resumed, masks))
    saved = load_file(tmp_path / WEIGHTS_NAME)
    for name, keep in masks.items():
        assert not saved[f"{name}.weight"].numpy()[~keep].any(), name
        assert not torch.equal(saved[f"{name}.weight"], teacher[f"{name}.weight"] * torch.from_numpy(keep)), name


def test_what_does_not_fit_is_refused(teacher, tmp_path) -> None:
    made = copy_of(teacher)
    for masks in ({"nowhere": np.ones(3, bool)}, {"backbone_3d.conv_input.0": np.ones((2, 2), bool)}):
        with pytest.raises(CheckpointError, match=r"the mask of .* fits no layer of small"):
            zeros_held(made, masks)
    other = build_detector(replace(CONFIG, name="other", voxels=replace(CONFIG.voxels, max_voxels=1)))
    with pytest.raises(UsageError, match="small-second and its teacher small answer different questions"):
        distil(build_detector(variant("second")), made, batches, TrainSettings(steps=1), out=tmp_path)
    with pytest.raises(UsageError, match="small and its teacher other answer different questions"):
        distil(made, other, batches, TrainSettings(steps=1), out=tmp_path)
