"""Coupling found by derivatives, and widths found by trying all of them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from models_sample import small_config, small_scene

from dm3d_deploy.models.detector import build_detector, prunable_layers, sparse_pair_counts
from dm3d_deploy.models.seeded import seed_weights
from dm3d_deploy.pruning.channels import GroupCurve, group_curve, slimmed
from dm3d_deploy.pruning.contracts import Layer
from dm3d_deploy.pruning.groups import ChannelGroup, Slot, channel_groups
from dm3d_deploy.steps.layers import layers_of


@pytest.fixture(scope="module")
def scene():
    detector = build_detector(small_config())
    seed_weights(detector, 0)
    features, coords = small_scene()
    layers = layers_of(detector, [sparse_pair_counts(detector, coords)])
    return detector, features, coords, layers


def test_what_reads_a_channel_is_what_its_writers_reach(scene):
    """With a writer's channel made NaN, exactly the readers' named inputs are NaN where they enter."""
    detector, features, coords, layers = scene
    groups = channel_groups(layers)
    entered = {}

    def note(name, axis):
        def hook(module, inputs):
            rows = inputs[0].features if hasattr(inputs[0], "features") else inputs[0]
            dims = [d for d in range(rows.ndim) if d != axis]
            entered[name] = torch.isnan(rows).any(dim=dims[0]) if rows.ndim == 2 else torch.isnan(rows).amax(dim=dims)

        return hook

    hooks = [layer.module.register_forward_pre_hook(note(layer.name, 1)) for layer in prunable_layers(detector)]
    norms = {layer.name: layer.norm for layer in prunable_layers(detector)}
    for group in groups:
        channel = group.channels - 1
        for slot in group.written:
            beta = norms[slot.layer].bias
            before = beta.detach().clone()
            with torch.no_grad():
                beta[channel] = math.nan
                detector(features, coords)
                beta.copy_(before)
            for read in group.read:
                found = set(torch.nonzero(entered[read.layer]).flatten().tolist())
                own = set(range(read.offset + channel * read.repeat, read.offset + (channel + 1) * read.repeat))
                if read.layer in _direct(group, slot.layer):
                    assert found == own, (slot.layer, read.layer)
    for hook in hooks:
        hook.remove()


def _direct(group, writer):
    """Readers that come after a writer and before anything mixes its channels again."""
    later = [read.layer for read in group.read]
    blocks = [slot.layer for slot in group.written]
    position = blocks.index(writer)
    following = [layer for layer in later if layer.endswith(".conv1")]
    return set(following[position : position + 1]) or set(later) - set(following)


def problem(seed):
    """A chain of four layers whose three inner groups may narrow; the first two groups share a layer, and so on."""
    rng = np.random.default_rng(seed)
    sides = rng.integers(2, 7, 5).tolist()
    layers = [
        Layer(
            name=f"l{i}", part="2d", kind="conv2d", shape=(sides[i + 1], sides[i], 1, 1),
            positions=np.array([float(rng.integers(1, 20))]),
        )
        for i in range(4)
    ]  # fmt: skip
    groups, curves = [], {}
    for i in range(3):
        groups.append(
            ChannelGroup(
                name=f"l{i}", channels=sides[i + 1], written=(Slot(layer=f"l{i}"),), read=(Slot(layer=f"l{i + 1}"),)
            )
        )
        widths = np.arange(sides[i + 1], 0, -1)
        losses = np.concatenate([[0.0], np.cumsum(rng.exponential(size=len(widths) - 1))])
        curves[f"l{i}"] = GroupCurve(
            group=f"l{i}", order=rng.permutation(sides[i + 1]), widths=widths, distortion=losses
        )
    return layers, groups, curves


def brute_force(layers, curves, limit):
    best = math.inf
    for picks in itertools.product(*(range(len(curve.widths)) for curve in curves.values())):
        inner = [int(curve.widths[pick]) for curve, pick in zip(curves.values(), picks, strict=True)]
        sides = [layers[0].inputs, *inner, layers[-1].outputs]
        cost = sum(layer.positions[0] * a * b for layer, a, b in zip(layers, sides[:-1], sides[1:], strict=True))
        if cost <= limit:
            best = min(best, sum(curve.distortion[pick] for curve, pick in zip(curves.values(), picks, strict=True)))
    return best


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_widths_are_feasible_and_near_the_best_of_all(share):
    ratios = []
    for seed in range(60):
        layers, groups, curves = problem(seed)
        limit = share * sum(layer.macs for layer in layers)
        best = brute_force(layers, curves, limit)
        found = slimmed(layers, groups, curves, {}, limit=limit)
        if found is None:
            assert best == math.inf
            continue
        assert found.cost <= limit * (1 + 1e-12)
        assert found.lower_bound <= best * (1 + 1e-9)
        assert best <= found.distortion + 1e-12
        ratios.append(found.distortion / best if best > 0 else 1.0)
    assert np.mean(np.array(ratios) < 1.0 + 1e-9) > 0.5
    assert np.mean(ratios) < 1.15


def test_a_group_curve_is_the_dense_hessian_of_its_columns():
    rng = np.random.default_rng(0)
    group = ChannelGroup(
        name="a", channels=3, written=(Slot(layer="a"),), read=(Slot(layer="b", offset=1, repeat=2), Slot(layer="c"))
    )
    layers = {
        "b": Layer(name="b", part="2d", kind="conv2d", shape=(2, 8, 1, 2), positions=np.ones(2)),
        "c": Layer(name="c", part="2d", kind="deconv2d", shape=(3, 4, 2, 1), positions=np.ones(2)),
    }
    weights = {name: rng.normal(size=layer.shape) for name, layer in layers.items()}
    gradients = {name: rng.normal(size=(5, *layer.shape)) for name, layer in layers.items()}
    curve = group_curve(group, layers, weights, gradients, multiple=1, kappa=0.1, damping=0.0)
    assert curve.widths.tolist() == [3, 2, 1]
    for width, found in zip(curve.widths, curve.distortion, strict=True):
        gone = ~curve.keep(int(width))
        change = {name: np.zeros_like(weight) for name, weight in weights.items()}
        for channel in np.flatnonzero(gone):
            change["b"][:, 1 + 2 * channel : 3 + 2 * channel] = weights["b"][:, 1 + 2 * channel : 3 + 2 * channel]
            change["c"][channel] = weights["c"][channel]
        flat = np.concatenate([change["b"].ravel(), change["c"].ravel()])
        rows = np.concatenate([gradients["b"].reshape(5, -1), gradients["c"].reshape(5, -1)], axis=1)
        hessian = 0.1 * np.eye(len(flat)) + rows.T @ rows / 5
        assert found == pytest.approx(flat @ hessian @ flat)
