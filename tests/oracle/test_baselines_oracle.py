"""Baselines against loops over single weights, written from the papers' definitions."""

import itertools

import numpy as np
import pytest

from dm3d_deploy.errors import InfeasibleBudget, InternalError
from dm3d_deploy.pruning.baselines import kept_counts, lamp_scores, signed_objective, taylor_scores
from dm3d_deploy.pruning.contracts import Layer

SHAPES = {"a": ("sparse", (6, 1, 1, 3, 5)), "b": ("conv2d", (4, 10, 3, 1)), "c": ("deconv2d", (7, 5, 2, 2))}
METHODS = ("uniform", "erk", "lamp", "taylor")


@pytest.fixture(scope="module")
def layers():
    rng = np.random.default_rng(0)
    found = []
    for name, (kind, shape) in SHAPES.items():
        taps = np.prod(shape[1:4] if kind == "sparse" else shape[2:4])
        positions = rng.uniform(10, 900, taps)
        found.append(Layer(name=name, part="2d", kind=kind, shape=shape, positions=positions))
    return found


@pytest.fixture(scope="module")
def scores(layers):
    rng = np.random.default_rng(1)
    return {layer.name: np.abs(rng.normal(0, 1 + i, layer.shape)) for i, layer in enumerate(layers)}


def macs_of_weight(layer, index):
    """MACs of one weight by its native index."""
    kernel = index[1:4] if layer.kind == "sparse" else index[2:4]
    extents = layer.shape[1:4] if layer.kind == "sparse" else layer.shape[2:4]
    tap = 0
    for at, extent in zip(kernel, extents, strict=True):
        tap = tap * extent + at
    return layer.positions[tap]


def weights_of(layer, scores):
    """(score, MACs) of every weight, best first."""
    rows = [(scores[layer.name][i], macs_of_weight(layer, i)) for i in np.ndindex(*layer.shape)]
    return sorted(rows, reverse=True)


def least_of(layer):
    return layer.weights - round(0.98 * layer.weights)


def cost_of(layers, scores, counts):
    return sum(m for layer in layers for _, m in weights_of(layer, scores)[: counts[layer.name]])


def comparable(method, layer, scores):
    """Scores that LAMP and Taylor compare across layers, best first within the layer."""
    own = [score for score, _ in weights_of(layer, scores)]
    if method == "taylor":
        return own
    return [w * w / sum(v * v for v in own[: k + 1]) for k, w in enumerate(own)]


def by_hand(method, layers, scores, limit):
    if method in ("lamp", "taylor"):
        counts = {layer.name: least_of(layer) for layer in layers}
        rest = [
            (value, layer.name) for layer in layers for value in comparable(method, layer, scores)[least_of(layer) :]
        ]
        for _, name in sorted(rest, reverse=True):
            counts[name] += 1
            if cost_of(layers, scores, counts) > limit:
                counts[name] -= 1
                return counts
        return counts
    best = {}
    for factor in np.linspace(0, 60, 60_001):
        counts = {}
        for layer in layers:
            density = 1.0
            if method == "erk":
                kernel = layer.shape[1:4] if layer.kind == "sparse" else layer.shape[2:4]
                ends = (layer.shape[0], layer.shape[4 if layer.kind == "sparse" else 1])
                density = (sum(ends) + sum(kernel)) / np.prod(layer.shape)
            counts[layer.name] = max(least_of(layer), int(min(1.0, factor * density) * layer.weights))
        if counts in best.values():
            continue
        if cost_of(layers, scores, counts) > limit:
            return best[max(best)]
        best[factor] = counts
    raise AssertionError("the factor never reached the limit")


@pytest.mark.parametrize(("method", "share"), list(itertools.product(METHODS, (0.7, 0.5, 0.3, 0.07))))
def test_kept_counts_are_those_of_the_definition(layers, scores, method, share):
    limit = share * sum(layer.macs for layer in layers)
    counts = kept_counts(method, layers, scores, limit)
    assert counts == by_hand(method, layers, scores, limit)
    assert cost_of(layers, scores, counts) <= limit * (1 + 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_everything_is_kept_within_a_budget_of_everything(layers, scores, method):
    limit = sum(layer.macs for layer in layers) * (1 + 1e-12)
    assert kept_counts(method, layers, scores, limit) == {layer.name: layer.weights for layer in layers}


@pytest.mark.parametrize("method", METHODS)
def test_no_layer_is_emptied_and_too_little_is_refused(layers, scores, method):
    dense = sum(layer.macs for layer in layers)
    least = {layer.name: least_of(layer) for layer in layers}
    floor = cost_of(layers, scores, least)
    counts = kept_counts(method, layers, scores, floor * (1 + 1e-12))
    assert all(counts[name] >= count >= 1 for name, count in least.items())
    with pytest.raises(InfeasibleBudget, match=f"'{method}' cannot keep less than {floor / dense:.4f}") as refused:
        kept_counts(method, layers, scores, floor * 0.99)
    assert refused.value.cheapest == pytest.approx(floor / dense)


def test_an_unknown_method_is_a_bug(layers, scores):
    with pytest.raises(InternalError, match="'magic' is no baseline"):
        kept_counts("magic", layers, scores, 1e9)


def test_lamp_by_hand():
    found = lamp_scores(np.abs(np.array([[1.0, -3.0], [2.0, 0.0]])))
    assert found.tolist() == pytest.approx([9 / 9, 4 / 13, 1 / 14, 0.0])
    assert lamp_scores(np.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_taylor_by_hand():
    found = taylor_scores(np.array([-2.0, 0.5]), np.array([4.0, 9.0]))
    assert found.tolist() == pytest.approx([4.0, 1.5])


def test_the_printed_objective_by_a_written_out_hessian():
    layer = Layer(name="b", part="2d", kind="conv2d", shape=(3, 4, 2, 1), positions=np.array([1.0, 2.0]))
    rng = np.random.default_rng(3)
    gradients = rng.normal(size=(4, *layer.shape))
    weight = 0.2 * gradients.mean(axis=0)  # taking it away goes down the slope
    ranked, ratios = np.abs(rng.normal(size=layer.shape)), np.array([0.0, 0.25, 0.5, 0.75])
    rows = gradients.reshape(4, -1)
    hessian = 1e-3 * np.eye(24) + rows.T @ rows / 4
    found = signed_objective(layer, weight, gradients, ranked, ratios, kappa=1e-3)
    for value, ratio in zip(found, ratios, strict=True):
        change = np.zeros(24)
        gone = np.argsort(ranked.ravel(), kind="stable")[: round(ratio * 24)]
        change[gone] = -weight.ravel()[gone]
        assert value == pytest.approx(rows.mean(axis=0) @ change + 0.5 * change @ hessian @ change, abs=1e-12)
    assert found.min() < 0
