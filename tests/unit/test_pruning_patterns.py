"""Pruning orders: what holds for every layer, score and ratio."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dm3d_deploy.errors import InternalError
from dm3d_deploy.pruning.contracts import Layer, Skipped
from dm3d_deploy.pruning.macs import executed_macs, kept_macs
from dm3d_deploy.pruning.patterns import (
    eligible_patterns,
    is_2_4,
    native_from_taps,
    prune_step,
    ratio_grid,
    taps_from_native,
    tile_size,
    tile_weights,
    tiles_kept,
    usable_ratios,
)


def layer(kind: str, shape: tuple[int, ...], *, final: bool = False) -> Layer:
    taps = int(np.prod(shape[1:4] if kind == "sparse" else shape[2:]))
    part = "3d" if kind == "sparse" else "2d"
    return Layer(name="x", part=part, kind=kind, shape=shape, positions=np.arange(1.0, taps + 1), final=final)


@st.composite
def layers(draw: st.DrawFn, pattern: str) -> Layer:
    side = st.integers(1, 40) if pattern != "2:4" else st.integers(1, 6).map(lambda fours: 4 * fours)
    inputs, outputs = draw(side), draw(st.integers(1, 40))
    small = st.integers(1, 3)
    if pattern == "tile":
        return layer("sparse", (outputs, draw(small), draw(small), draw(small), inputs))
    kind = draw(st.sampled_from(["conv2d", "deconv2d"]))
    first, second = (outputs, inputs) if kind == "conv2d" else (inputs, outputs)
    return layer(kind, (first, second, draw(small), draw(small)))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "tile"])
@settings(max_examples=40)
@given(data=st.data())
def test_every_mask_is_nested_legal_and_within_its_ratio(pattern: str, data: st.DataObject) -> None:
    some = data.draw(layers(pattern))
    ranked = np.random.default_rng(data.draw(st.integers(0, 99))).random(some.shape)
    grid = usable_ratios(pattern, ratio_grid(20))
    steps = prune_step(some, ranked, pattern, grid)
    assert steps.shape == some.shape
    before = np.ones(some.shape, dtype=bool)
    for point, ratio in enumerate(grid):
        keep = steps > point
        pruned = some.weights - np.count_nonzero(keep)
        taps = taps_from_native(some, keep)
        assert not (keep & ~before).any()
        if pattern == "tile":
            tiles = tiles_kept(taps, *tile_size(some.inputs, some.outputs))
            full = (tiles * tile_weights(some.inputs, some.outputs)).sum()
            assert full == np.count_nonzero(keep), "a tile was cut"
            assert pruned <= ratio * some.weights + 1e-6
            assert executed_macs(some, keep, "tile") == kept_macs(some, keep)
        else:
            assert pruned == round(ratio * some.weights)
        if pattern == "2:4":
            assert is_2_4(taps)
            assert executed_macs(some, keep, "2:4") == 0.5 * some.macs
        before = keep


@pytest.mark.parametrize(
    ("kind", "shape", "native"),
    [
        ("sparse", (5, 3, 2, 4, 7), (3, 2, 1, 3, 6)),
        ("conv2d", (5, 7, 2, 4), (3, 6, 1, 3)),
        ("deconv2d", (7, 5, 2, 4), (6, 3, 1, 3)),
    ],
)
def test_native_layouts(kind: str, shape: tuple[int, ...], native: tuple[int, ...]) -> None:
    some = layer(kind, shape)
    array = np.zeros(shape)
    array[native] = 1
    taps = taps_from_native(some, array)
    tap = (2 * 2 + 1) * 4 + 3 if kind == "sparse" else 1 * 4 + 3
    assert np.argwhere(taps).tolist() == [[tap, 6, 3]]
    assert np.array_equal(native_from_taps(some, taps), array)
    assert native_from_taps(some, taps).flags.c_contiguous


def test_tile_sizes() -> None:
    assert tile_size(5, 16) == (5, 16)
    assert tile_size(16, 32) == (16, 16)
    assert tile_size(32, 64) == (32, 32)
    assert tile_size(17, 128) == (17, 32)
    assert tile_weights(40, 33).tolist() == [[1024, 32], [256, 8]]


def test_ratio_grid_stops_at_the_cap() -> None:
    grid = ratio_grid(100)
    assert len(grid) == 99
    assert grid[0] == 0
    assert grid[-1] == 0.98
    assert usable_ratios("2:4", grid)[0] == 0.5
    assert len(usable_ratios("2:4", grid)) == 49
    assert usable_ratios("tile", grid) is grid


def test_eligible_patterns() -> None:
    device = ("2:4", "tile")
    assert eligible_patterns(layer("sparse", (8, 3, 3, 3, 8)), device) == (("unstructured", "tile"), None)
    assert eligible_patterns(layer("sparse", (8, 3, 3, 3, 8)), ()) == (("unstructured",), None)
    assert eligible_patterns(layer("conv2d", (8, 8, 3, 3)), device) == (("unstructured", "2:4"), None)
    assert eligible_patterns(layer("conv2d", (8, 8, 3, 3)), ("tile",)) == (("unstructured",), None)
    assert eligible_patterns(layer("conv2d", (8, 6, 3, 3)), device) == (
        ("unstructured",),
        Skipped(layer="x", reason="2:4 needs input channels in fours, the layer has 6"),
    )
    assert eligible_patterns(layer("conv2d", (2, 8, 3, 3), final=True), device) == (
        ("dense",),
        Skipped(layer="x", reason="a final head convolution with 2 output channels stays dense"),
    )


@pytest.mark.parametrize(
    ("shape", "pattern", "ratios", "text"),
    [
        ((8, 8, 3, 3), "dense", [0.5], "the pattern 'dense' prunes nothing"),
        ((8, 8, 3, 3), "unstructured", [0.5, 0.4], "must rise within 0..1"),
        ((8, 8, 3, 3), "unstructured", [], "must rise within 0..1"),
        ((8, 8, 3, 3), "unstructured", [0.5, 1.1], "must rise within 0..1"),
        ((8, 8, 3, 3), "unstructured", np.zeros(40_000), "40000 pruning ratios are too many"),
        ((8, 8, 3, 3), "2:4", [0.4, 0.5], "not 8 channels from ratio 0.4"),
        ((8, 6, 3, 3), "2:4", [0.5], "not 6 channels from ratio 0.5"),
    ],
)
def test_refusals(shape: tuple[int, ...], pattern: str, ratios: list[float], text: str) -> None:
    with pytest.raises(InternalError, match=re.escape(text)):
        prune_step(layer("conv2d", shape), np.ones(shape), pattern, ratios)


def test_misfits_are_refused() -> None:
    some = layer("conv2d", (8, 8, 3, 3))
    with pytest.raises(InternalError, match="must be finite and fit"):
        prune_step(some, np.full(some.shape, np.nan), "unstructured", [0.5])
    with pytest.raises(InternalError, match="must be finite and fit"):
        prune_step(some, np.ones((8, 8, 3, 2)), "unstructured", [0.5])
    with pytest.raises(InternalError, match="does not fit the weight"):
        taps_from_native(some, np.ones((8, 8, 9)))
    with pytest.raises(InternalError, match="holds no taps of"):
        native_from_taps(some, np.ones((9, 8, 7)))
    with pytest.raises(InternalError, match="not 2:4 legal"):
        executed_macs(some, np.ones(some.shape, dtype=bool), "2:4")
    with pytest.raises(InternalError, match="no such pattern 'blocks'"):
        executed_macs(some, np.ones(some.shape, dtype=bool), "blocks")
