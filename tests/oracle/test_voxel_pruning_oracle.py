"""Voxel pruning against convolutions written out cell by cell, and its counts against pairs counted by hand."""

import itertools

import numpy as np
import pytest
import torch
from models_sample import small_config

from dm3d_deploy.errors import UsageError
from dm3d_deploy.models.checkpoints import load_checkpoint, save_weights
from dm3d_deploy.models.detector import build_detector, sparse_pair_counts
from dm3d_deploy.models.seeded import seed_weights
from dm3d_deploy.models.sparse import SparseTensor
from dm3d_deploy.models.voxel_pruning import KEY, kept_pair_counts, kept_rows, permille_of, prune_voxels

OFFSETS = list(itertools.product((-1, 0, 1), repeat=3))


@pytest.fixture(scope="module")
def detector():
    made = build_detector(small_config())
    seed_weights(made, 0)
    return made


@pytest.fixture(scope="module")
def frame(detector):
    random = np.random.default_rng(0)
    depth, height, width = detector.backbone_3d.shape_zyx
    cells = np.unique(random.integers(0, (depth, height // 3, width // 3), (900, 3)), axis=0)
    random.shuffle(cells)
    coords = torch.from_numpy(np.pad(cells, ((0, 0), (1, 0))).astype(np.int64))
    columns = len(detector.config.voxels.columns)
    return torch.from_numpy(random.normal(size=(len(cells), columns)).astype(np.float32)), coords


def stage_ends(detector, name, features, coords):
    """What goes into the blocks of a stage, and what its last one leaves, as the detector computes them."""
    seen = {}
    stage = detector.backbone_3d.get_submodule(name)
    before = stage[0].register_forward_hook(lambda module, args, out: seen.__setitem__("in", out))
    after = stage.register_forward_hook(lambda module, args, out: seen.__setitem__("out", out))
    with torch.no_grad():
        detector(features, coords)
    before.remove()
    after.remove()
    return seen["in"], seen["out"]


def convolved(conv, cells, rows):
    """Sub-manifold convolution, cell by cell: the neighbour at offset d meets the tap of d."""
    weight, bias = conv.weight.detach().double().numpy(), conv.bias.detach().double().numpy()
    found = np.tile(bias, (len(cells), 1))
    row_of = {tuple(cell): row for row, cell in enumerate(cells)}
    for row, cell in enumerate(cells):
        for offset in OFFSETS:
            other = row_of.get(tuple(np.add(cell, offset)))
            if other is not None:
                found[row] += weight[:, offset[0] + 1, offset[1] + 1, offset[2] + 1] @ rows[other]
    return found


def normed(norm, rows):
    mean, var, gain, shift = (
        value.detach().double().numpy() for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return (rows - mean) / np.sqrt(var + norm.eps) * gain + shift


def test_a_pruned_stage_is_its_blocks_on_the_voxels_of_greatest_magnitude(detector, frame):
    names = ["conv1", "conv2", "conv3", "conv4"]
    prune_voxels(detector, torch.tensor([1000, 600, 1000, 1000]))
    entered, left = stage_ends(detector, "conv2", *frame)
    rows, cells = entered.features.double().numpy(), entered.coords[:, 1:].numpy()
    importance = np.abs(rows).mean(axis=1)
    kept = np.sort(np.argsort(-importance, kind="stable")[: -(-len(rows) * 6 // 10)])
    made = rows[kept]
    for block in list(detector.backbone_3d.conv2)[1:]:
        hidden = np.maximum(normed(block.bn1, convolved(block.conv1, cells[kept], made)), 0)
        made = np.maximum(normed(block.bn2, convolved(block.conv2, cells[kept], hidden)) + made, 0)
    wanted = rows.copy()
    wanted[kept] = made
    assert 0 < len(kept) < len(rows)
    np.testing.assert_allclose(left.features.numpy(), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    assert permille_of(detector) == {"conv2": 600}
    assert len(names) == len(detector.backbone_3d.voxel_permille)

    counts = kept_pair_counts(detector, *frame)
    everything = sparse_pair_counts(detector, frame[1])
    chosen = {tuple(cell) for cell in cells[kept]}
    pairs = [sum(tuple(np.add(cell, offset)) in chosen for cell in chosen) for offset in OFFSETS]
    inside = [name for name in everything if ".conv2." in name and ".0." not in name]
    assert sorted(counts) == sorted(inside)
    for name in inside:
        assert counts[name].tolist() == pairs
        assert (counts[name] <= everything[name]).all()


def test_shares_are_part_of_the_weights(detector, frame, tmp_path):
    prune_voxels(detector, torch.tensor([1000, 1000, 1000, 1000]))
    save_weights(detector, tmp_path / "all.safetensors")
    with torch.no_grad():
        whole = detector(*frame)
        prune_voxels(detector, torch.tensor([700, 500, 500, 1000]))
        some = detector(*frame)
    save_weights(detector, tmp_path / "some.safetensors")
    assert any(not torch.equal(whole[name], some[name]) for name in whole)
    other = build_detector(small_config())
    for file, wanted in (("some", some), ("all", whole), ("some", some)):
        load_checkpoint(other, tmp_path / f"{file}.safetensors")
        with torch.no_grad():
            found = other(*frame)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    dense = {name: value for name, value in detector.state_dict().items() if name != KEY}
    torch.save(dense, tmp_path / "plain.pth")
    load_checkpoint(other, tmp_path / "plain.pth")
    assert permille_of(other) == {}


def test_every_frame_keeps_its_own_share_and_the_first_of_equals():
    features = torch.tensor([[1.0], [-3.0], [2.0], [2.0], [9.0], [8.0]])
    coords = torch.tensor([[0, 0, 0, 3], [0, 0, 0, 2], [0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 1]])
    x = SparseTensor(features, coords, (1, 1, 4), 2)
    assert kept_rows(x, 500).tolist() == [1, 3, 4]
    assert kept_rows(x, 501).tolist() == [1, 2, 3, 4, 5]
    assert kept_rows(x, 1).tolist() == [1, 4]


@pytest.mark.parametrize("shares", [[1000, 1000], [0, 1000, 1000, 1000], [1001, 1000, 1000, 1000]])
def test_impossible_shares_are_refused(detector, shares):
    with pytest.raises(UsageError, match="are no shares of the voxels of 4 stages"):
        prune_voxels(detector, torch.tensor(shares))
