"""Curves, masks and MACs against loops over single weights and a Hessian that is written out."""

import itertools
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest

from dm3d_deploy.pruning.contracts import Layer
from dm3d_deploy.pruning.curves import layer_curve
from dm3d_deploy.pruning.macs import dense_macs, executed_macs, kept_macs
from dm3d_deploy.pruning.patterns import is_2_4, prune_step, taps_from_native, tiles_kept
from dm3d_deploy.pruning.ranking import scores

LAYERS = {
    "sparse, small tiles": ("sparse", (40, 2, 1, 2, 6)),
    "sparse, large tiles": ("sparse", (36, 1, 1, 2, 34)),
    "conv2d": ("conv2d", (6, 8, 3, 2)),
    "deconv2d": ("deconv2d", (8, 5, 2, 2)),
}
CASES = [
    (name, pattern)
    for name, (kind, shape) in LAYERS.items()
    for pattern in ("unstructured", "tile" if kind == "sparse" else "2:4")
]
HUNDREDTHS = range(0, 99, 7)


def layer_of(name: str) -> Layer:
    kind, shape = LAYERS[name]
    taps = shape[1] * shape[2] * shape[3] if kind == "sparse" else shape[2] * shape[3]
    positions = np.random.default_rng(5).uniform(0, 1000, taps)
    return Layer(name=name, part="3d" if kind == "sparse" else "2d", kind=kind, shape=shape, positions=positions)


def native_indices(kind: str, shape: tuple[int, ...]) -> Iterator[tuple[int, int, int, tuple[int, ...]]]:
    """(tap, input, output, native index) of every weight, in the order (tap, input, output)."""
    if kind == "sparse":
        outputs, depth, height, width, inputs = shape
        for z, y, x, i, o in itertools.product(*map(range, (depth, height, width, inputs, outputs))):
            yield (z * height + y) * width + x, i, o, (o, z, y, x, i)
    else:
        first, second, height, width = shape
        inputs, outputs = (second, first) if kind == "conv2d" else (first, second)
        for y, x, i, o in itertools.product(*map(range, (height, width, inputs, outputs))):
            yield y * width + x, i, o, (o, i, y, x) if kind == "conv2d" else (i, o, y, x)


def pruned_by_hand(
    kind: str, shape: tuple[int, ...], score: np.ndarray, pattern: str, ratio: Fraction
) -> list[tuple[int, ...]]:
    """Native indices of what a ratio prunes, from the words of the definition."""
    weights = list(native_indices(kind, shape))
    flat = {index: position for position, index in enumerate(np.ndindex(*shape))}
    if pattern == "unstructured":
        ascending = sorted((score[index], flat[index], index) for _, _, _, index in weights)
        return [index for _, _, index in ascending[: round(ratio * len(weights))]]
    if pattern == "2:4":
        fours: dict[tuple[int, int, int], list] = {}
        for tap, i, o, index in weights:
            fours.setdefault((tap, i // 4, o), []).append((score[index], i, index))
        first = [index for four in fours.values() for _, _, index in sorted(four)[:2]]
        rest = sorted((score[index], flat[index], index) for *_, index in weights if index not in set(first))
        return first + [index for _, _, index in rest[: round(ratio * len(weights)) - len(first)]]
    inputs, outputs = 1 + max(w[1] for w in weights), 1 + max(w[2] for w in weights)
    side = 16 if min(inputs, outputs) <= 16 else 32
    tiles: dict[tuple[int, int, int], list[tuple[int, ...]]] = {}
    for tap, i, o, index in weights:
        tiles.setdefault((tap, i // side, o // side), []).append(index)
    ascending = sorted((sum(score[index] ** 2 for index in tile) / len(tile), key) for key, tile in tiles.items())
    gone: list[tuple[int, ...]] = []
    for _, key in ascending:
        if len(gone) + len(tiles[key]) > ratio * len(weights):
            break
        gone += tiles[key]
    return gone


@pytest.fixture(params=CASES, ids=[f"{name}, {pattern}" for name, pattern in CASES])
def case(request: pytest.FixtureRequest) -> tuple[Layer, str, list[Fraction], np.ndarray, np.ndarray, np.ndarray]:
    name, pattern = request.param
    layer = layer_of(name)
    rng = np.random.default_rng(11)
    weight = rng.normal(0, 0.1, layer.shape)
    gradients = rng.normal(0, 1, (5, *layer.shape)) * rng.lognormal(0, 1, layer.shape)
    ranked = scores(weight, np.square(gradients).mean(axis=0), damping=0.5)
    ratios = [Fraction(k, 100) for k in HUNDREDTHS if pattern != "2:4" or k >= 50]
    if pattern == "2:4":
        ratios.insert(0, Fraction(1, 2))
    return layer, pattern, ratios, weight, gradients, ranked


def test_scores_by_hand() -> None:
    weight, square = np.array([-2.0, 0.5, 0.0]), np.array([4.0, 0.0, 5.0])
    assert scores(weight, square, damping=1.0) == pytest.approx([2 * 7**0.5, 0.5 * 3**0.5, 0.0], rel=1e-15)
    assert scores(weight, square, damping=0.0) == pytest.approx([4.0, 0.0, 0.0], rel=1e-15)


def test_masks_are_those_of_the_definition(case: tuple) -> None:
    layer, pattern, ratios, _, _, ranked = case
    steps = prune_step(layer, ranked, pattern, [float(ratio) for ratio in ratios])
    for point, ratio in enumerate(ratios):
        keep = np.ones(layer.shape, dtype=bool)
        for index in pruned_by_hand(layer.kind, layer.shape, ranked, pattern, ratio):
            keep[index] = False
        assert np.array_equal(steps > point, keep), ratio


def test_masks_of_tied_scores_are_those_of_the_definition(case: tuple) -> None:
    layer, pattern, ratios, _, _, _ = case
    ranked = np.random.default_rng(3).integers(0, 3, layer.shape).astype(float)
    steps = prune_step(layer, ranked, pattern, [float(ratio) for ratio in ratios])
    for point, ratio in enumerate(ratios):
        gone = set(pruned_by_hand(layer.kind, layer.shape, ranked, pattern, ratio))
        assert {index for index in np.ndindex(*layer.shape) if steps[index] <= point} == gone, ratio


def test_curves_are_those_of_the_written_out_hessian(case: tuple) -> None:
    layer, pattern, ratios, weight, gradients, ranked = case
    kappa = 1e-3
    rows = gradients.reshape(len(gradients), -1)
    hessian = kappa * np.eye(weight.size) + sum(np.outer(row, row) for row in rows) / len(rows)
    curve = layer_curve(
        layer, weight, gradients, ranked, pattern, np.array([float(ratio) for ratio in ratios]), kappa=kappa
    )
    assert len(curve.ratio) == len(ratios)
    largest = 0.0
    for point, ratio in enumerate(ratios):
        gone = pruned_by_hand(layer.kind, layer.shape, ranked, pattern, ratio)
        change = np.zeros(layer.shape)
        for index in gone:
            change[index] = -weight[index]
        largest = max(largest, change.ravel() @ hessian @ change.ravel())
        macs = sum(layer.positions[tap] for tap, _, _, index in native_indices(layer.kind, layer.shape))
        macs -= sum(layer.positions[tap] for tap, _, _, i in native_indices(layer.kind, layer.shape) if i in set(gone))
        assert curve.distortion[point] == pytest.approx(largest, rel=1e-9, abs=1e-300)
        assert curve.cost[point] == pytest.approx(macs, rel=1e-9)
        assert curve.ratio[point] == len(gone) / weight.size
    assert largest > 0


def test_flat_rows_and_native_single_precision_rows_agree() -> None:
    layer = layer_of("conv2d")
    rng = np.random.default_rng(0)
    weight, gradients = rng.normal(size=layer.shape), rng.normal(size=(3, *layer.shape)).astype(np.float32)
    ranked = np.abs(weight)
    grid = np.array([0, 0.3, 0.6])
    native = layer_curve(layer, weight, gradients, ranked, "unstructured", grid, kappa=0.0)
    flat = layer_curve(layer, weight, gradients.reshape(3, -1).astype(float), ranked, "unstructured", grid, kappa=0.0)
    assert np.array_equal(native.distortion, flat.distortion)


@pytest.mark.parametrize("name", LAYERS)
def test_macs_by_loops(name: str) -> None:
    layer = layer_of(name)
    keep = np.random.default_rng(1).random(layer.shape) < 0.4
    everything = list(native_indices(layer.kind, layer.shape))
    dense = sum(layer.positions[tap] for tap, *_ in everything)
    assert len(everything) == layer.weights
    assert layer.macs == pytest.approx(dense, rel=1e-12)
    assert kept_macs(layer, keep) == pytest.approx(
        sum(layer.positions[tap] for tap, _, _, index in everything if keep[index]), rel=1e-12
    )
    assert dense_macs([layer, layer])[layer.part] == pytest.approx(2 * dense, rel=1e-12)
    assert executed_macs(layer, keep, "unstructured") == executed_macs(layer, keep, "dense") == layer.macs


@pytest.mark.parametrize("name", ["sparse, small tiles", "sparse, large tiles"])
def test_executed_tiles_by_loops(name: str) -> None:
    layer = layer_of(name)
    rng = np.random.default_rng(2)
    keep = np.zeros(layer.shape, dtype=bool)
    keep.ravel()[rng.choice(keep.size, 3, replace=False)] = True
    side = 16 if min(layer.shape[0], layer.shape[4]) <= 16 else 32
    hit = {(t, i // side, o // side) for t, i, o, index in native_indices(layer.kind, layer.shape) if keep[index]}
    runs = sum(
        layer.positions[t] for t, i, o, _ in native_indices(layer.kind, layer.shape) if (t, i // side, o // side) in hit
    )
    assert 0 < kept_macs(layer, keep) < runs < layer.macs
    assert executed_macs(layer, keep, "tile") == pytest.approx(runs, rel=1e-12)
    kept = tiles_kept(taps_from_native(layer, keep), side, side)
    assert {tuple(map(int, tile)) for tile in np.argwhere(kept)} == hit


def test_two_of_four_by_hand() -> None:
    rng = np.random.default_rng(4)
    verdicts = set()
    for _ in range(200):
        keep = rng.random((2, 8, 3)) < 0.3
        legal = all(
            sum(bool(keep[t, 4 * g + i, o]) for i in range(4)) <= 2
            for t in range(2)
            for g in range(2)
            for o in range(3)
        )
        assert is_2_4(keep) == legal
        verdicts.add(legal)
    assert verdicts == {True, False}
    assert not is_2_4(np.zeros((1, 6, 1), dtype=bool))
