"""A grown detector answers what the small one answers; what cannot grow is refused."""

import numpy as np
import pytest
import torch

from calib.simulator.objects import SIZES
from dm3d_deploy.config import load_config
from dm3d_deploy.errors import CheckpointError
from dm3d_deploy.models.detector import build_detector
from dm3d_deploy.training.grow import grow_weights, is_smaller
from dm3d_deploy.training.start import start_weights

MEANS = {name: (length[0], width[0], height[0]) for name, (length, width, height) in SIZES.items()}


def started(name, seed):
    detector = build_detector(load_config(name))
    start_weights(detector, MEANS, seed=seed)
    return detector


@pytest.fixture(scope="module")
def small():
    detector = started("centerpoint-slim", 1)
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():  # norms that have seen something
        for name, value in detector.state_dict().items():
            if name.endswith(("running_mean", "bias")):
                value.copy_(0.1 * torch.randn(value.shape, generator=random))
            elif name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=random))
    return detector


def test_the_same_answers_from_a_wider_and_deeper_detector(small):
    large = started("centerpoint", 3)
    before = {name: value.clone() for name, value in large.state_dict().items()}
    grow_weights(large, small.state_dict())
    random = np.random.default_rng(0)
    cells = np.unique(random.integers((0, 500, 500), (40, 560, 560), (3000, 3)), axis=0)
    coords = torch.from_numpy(np.concatenate([np.zeros((len(cells), 1), np.int64), cells], axis=1))
    features = torch.from_numpy(random.standard_normal((len(cells), 5)).astype(np.float32))
    with torch.inference_mode():
        wanted, found = small(features, coords), large(features, coords)
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        assert value.std() > 0
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    after = large.state_dict()
    new = after["backbone_2d.blocks.0.4.weight"][64:]
    assert torch.equal(new, before["backbone_2d.blocks.0.4.weight"][64:]), "new channels keep their random weights"
    assert int(after["global_step"]) == 0


def test_only_a_smaller_detector_counts_as_smaller(small):
    state, large = small.state_dict(), started("centerpoint", 0)
    assert is_smaller(large, state)
    assert not is_smaller(small, state)
    assert not is_smaller(small, large.state_dict())
    assert not is_smaller(large, {**state, "a.weight": torch.zeros(1)})
    assert not is_smaller(large, {**state, "dense_head.shared_conv.0.weight": torch.zeros(32, 256)})
    with pytest.raises(CheckpointError, match="second has no CenterHead, and only such detectors grow"):
        grow_weights(build_detector(load_config("second")), state)


def test_what_is_wider_or_of_another_family_is_refused(small):
    with pytest.raises(CheckpointError, match=r"is wider, \(\d+"):
        grow_weights(started("centerpoint-slim", 0), {
            name: value for name, value in started("centerpoint", 0).state_dict().items() if name in small.state_dict()
        })  # fmt: skip
    state = dict(small.state_dict())
    with pytest.raises(CheckpointError, match=r"a\.weight and 0 more tensors have no place to grow\."):
        grow_weights(started("centerpoint", 0), {**state, "a.weight": torch.zeros(1)})
    del state["dense_head.shared_conv.0.weight"]
    with pytest.raises(CheckpointError, match=r"shared_conv\.0\.weight and 0 more tensors have nothing to grow from\."):
        grow_weights(started("centerpoint", 0), state)
    state["dense_head.shared_conv.0.weight"] = torch.zeros(32, 256, 5, 5)
    with pytest.raises(CheckpointError, match=r"is \(32, 256, 5, 5\) and would be \(64, 512, 3, 3\)\."):
        grow_weights(started("centerpoint", 0), state)
    state["dense_head.shared_conv.0.weight"] = torch.zeros(32, 255, 3, 3)
    with pytest.raises(CheckpointError, match=r"reads 255 channels, which 2 maps cannot share\."):
        grow_weights(started("centerpoint", 0), state)
