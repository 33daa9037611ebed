"""Layers behind widths and dropped blocks: shapes, masks, and the state that stands for them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from dm3d_deploy.errors import InfeasibleBudget, UsageError
from dm3d_deploy.pruning.channels import GroupCurve, widths_of
from dm3d_deploy.pruning.contracts import Allocation, Budget, Choice, Layer
from dm3d_deploy.pruning.costs import planned_time
from dm3d_deploy.pruning.groups import channel_groups
from dm3d_deploy.pruning.macs import executed_macs, kept_macs
from dm3d_deploy.pruning.masks import masked_state, masks_of
from dm3d_deploy.pruning.narrowed import Narrowing
from dm3d_deploy.pruning.patterns import is_2_4, prune_step, taps_from_native
from dm3d_deploy.pruning.profiles import LayerTimes, Profile, TimeCurve
from dm3d_deploy.recipe import Recipe
from dm3d_deploy.steps import allocate, slim
from dm3d_deploy.steps.slim import narrowed_items


def conv(name, inputs, outputs, *, kind="conv2d", part="2d", final=False):
    shape = (inputs, outputs, 2, 2) if kind == "deconv2d" else (outputs, inputs, 2, 2)
    return Layer(name=name, part=part, kind=kind, shape=shape, positions=np.full(4, 10.0), final=final)


LAYERS = (
    conv("backbone_2d.blocks.0.1", 8, 16),
    conv("backbone_2d.deblocks.0.0", 16, 12, kind="deconv2d"),
    conv("dense_head.shared_conv.0", 12, 8, part="head"),
    conv("dense_head.heads_list.0.hm.0", 8, 2, part="head", final=True),
)
RNG = np.random.default_rng(0)
SCORES = {layer.name: RNG.uniform(size=layer.shape) for layer in LAYERS}


def curve(name, channels):
    return GroupCurve(
        group=name,
        order=np.random.default_rng(channels).permutation(channels),
        widths=widths_of(channels, 4),
        distortion=np.linspace(0, 1, len(widths_of(channels, 4))),
    )


CURVES = {layer.name: curve(layer.name, layer.outputs) for layer in LAYERS[:3]}


def test_widths_fall_by_what_the_device_pays_for():
    assert widths_of(64, 8).tolist() == [64, 56, 48, 40, 32, 24, 16, 8]
    assert widths_of(20, 8).tolist() == [20, 16, 8]
    assert widths_of(6, 8).tolist() == [6]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_a_narrow_layer_is_the_whole_one_without_rows_and_columns(layer):
    narrow = Narrowing(LAYERS, CURVES, {"backbone_2d.blocks.0.1": 8, "backbone_2d.deblocks.0.0": 4})
    left, taken = narrow.of(layer), narrow.take(layer, SCORES[layer.name])
    assert taken.shape == left.shape
    whole = narrow.whole(layer, np.ones(left.shape, bool))
    assert np.count_nonzero(whole) == left.weights
    assert np.array_equal(np.sort(SCORES[layer.name][whole]), np.sort(taken.ravel()))
    assert (left.inputs, left.outputs) == {
        "backbone_2d.blocks.0.1": (8, 8),
        "backbone_2d.deblocks.0.0": (8, 4),
        "dense_head.shared_conv.0": (4, 8),
        "dense_head.heads_list.0.hm.0": (8, 2),
    }[layer.name]


def test_masks_hold_widths_and_patterns_within_them():
    widths = {"backbone_2d.blocks.0.1": 8}
    narrow = Narrowing(LAYERS, CURVES, widths)
    first, second = LAYERS[:2]
    half = narrow.of(second)
    choices = (
        Choice(layer=first.name, pattern="channel", step=0, ratio=0.5, distortion=0, cost=narrow.of(first).macs),
        Choice(layer=second.name, pattern="2:4", step=0, ratio=0.5, distortion=0.1, cost=half.macs / 2),
    )
    allocation = Allocation(
        choices=choices, distortion=0.1, cost=1.0, budget=Budget(value=1.0, denominator=1e6), lower_bound=0.0,
        widths=widths,
    )  # fmt: skip
    masks = {mask.layer: mask for mask in masks_of(LAYERS, SCORES, allocation, CURVES)}
    assert list(masks) == [first.name, second.name]
    kept = narrow.take(second, masks[second.name].keep)
    assert is_2_4(taps_from_native(half, kept))
    assert executed_macs(half, kept, "2:4") == second.macs / 4
    gone = ~CURVES[first.name].keep(8)
    assert not masks[first.name].keep[gone].any()
    assert masks[first.name].keep[~gone].all()
    assert not masks[second.name].keep[gone].any()


def test_a_layer_out_of_the_allocation_loses_the_channels_that_it_reads():
    widths = {"backbone_2d.deblocks.0.0": 8}
    narrow = Narrowing(LAYERS, CURVES, widths)
    choices = tuple(
        Choice(layer=layer.name, pattern="channel", step=0, ratio=0.0, distortion=0, cost=narrow.of(layer).macs)
        for layer in LAYERS[:2]
    )
    allocation = Allocation(
        choices=choices, distortion=0.1, cost=1.0, budget=Budget(value=1.0, denominator=1e6), lower_bound=0.0,
        widths=widths,
    )  # fmt: skip
    masks = {mask.layer: mask.keep for mask in masks_of(LAYERS, SCORES, allocation, CURVES)}
    assert masks["dense_head.shared_conv.0"].any(axis=(0, 2, 3)).sum() == 8


def test_a_block_whose_second_convolution_keeps_nothing_adds_nothing():
    state = {f"b.{name}": np.ones(3) for name in ("conv2.weight", "conv2.bias", "bn2.weight", "bn2.bias", "bn1.bias")}
    silent = masked_state(state, {"b.conv2": np.zeros(3, bool)})
    assert not silent["b.bn2.weight"].any()
    assert not silent["b.bn2.bias"].any()
    assert silent["b.bn1.bias"].all()
    assert state["b.bn2.bias"].all()
    assert masked_state(state, {"b.conv2": np.array([True, False, False])})["b.bn2.bias"].all()


def test_channels_are_counted_in_executed_macs_or_time():
    with pytest.raises(UsageError, match="by executed MACs or by a time only") as caught:
        Recipe(model="centerpoint", target=0.5, patterns="channels")
    assert caught.value.fix == "give --target 0.5 and --cost executed, or --target 25ms"
    assert Recipe(model="centerpoint", target=0.5, patterns="channels", cost="executed").patterns == "channels"


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_choices_of_a_narrow_layer_cost_what_their_masks_keep(pattern):
    layer = LAYERS[0]
    narrow = Narrowing(LAYERS, CURVES, {"backbone_2d.blocks.0.1": 8})
    left, scored = narrow.of(layer), narrow.take(layer, SCORES[layer.name])
    whole = [
        Choice(layer=layer.name, pattern=pattern, step=step, ratio=ratio, distortion=1.0, cost=layer.macs * (1 - ratio))
        for step, ratio in enumerate((0.75, 0.5, 0.9))
    ]
    items = narrowed_items(layer, left, whole, SCORES[layer.name], scored)
    for item in items:
        keep = prune_step(left, scored, pattern, (item.ratio,)) > 0
        assert item.cost == pytest.approx(kept_macs(left, keep), rel=1e-12)
    kept = np.square(scored).sum() / np.square(SCORES[layer.name]).sum()
    assert [item.distortion for item in items] == [pytest.approx(kept)] * 3
    assert narrowed_items(layer, layer, whole, SCORES[layer.name], SCORES[layer.name]) == tuple(whole)


def timed(layers, *, least, fixed_ms):
    """A millisecond a layer, in proportion to its multiplications down to a share `least`."""
    line = TimeCurve(share=np.array([least, 1.0]), ms=np.array([least, 1.0]))
    times = tuple(
        LayerTimes(layer=x.name, part=x.part, kind=x.kind, shape=x.shape, dense_ms=1.0, curves={"channel": line})
        for x in layers
    )
    return Profile(
        standing="measured", device="d", model="m", precision="fp16", voxels=1, clock="c", band={},
        fixed_ms=fixed_ms, layers=times, stamp={}, notes=(),
    )  # fmt: skip


def test_widths_within_a_time_take_it_by_the_profile(monkeypatch):
    """Each layer here takes a millisecond, in proportion to its multiplications, and two are fixed."""
    profile = timed(LAYERS, least=0.0, fixed_ms={"2d": 2.0})
    scope = LAYERS[:2]
    whole = slim.Whole(every=LAYERS, layers=scope, groups=channel_groups(LAYERS), curves=CURVES, blocks={})
    monkeypatch.setattr(slim, "_whole", lambda run: whole)
    for limit in (6.0, 5.2, 4.7):
        budget = Budget(value=limit / 6, denominator=6.0, unit="ms")
        (found,) = slim.timed_candidates(None, profile, budget)
        narrow = Narrowing(LAYERS, CURVES, found.allocation.widths)
        by_hand = 2 + sum(narrow.of(layer).macs / layer.macs for layer in scope) + 2  # the other two layers stay
        assert found.allocation.cost == pytest.approx(by_hand)
        assert limit - 0.4 < by_hand <= limit + 1e-9
        lost = {name: dict(zip(CURVES[name].widths, CURVES[name].distortion, strict=True))[width]
                for name, width in found.allocation.widths.items()}  # fmt: skip
        assert {choice.layer: choice.distortion for choice in found.allocation.choices if choice.distortion} == {
            name: loss for name, loss in lost.items() if loss
        }
        assert found.allocation.distortion == pytest.approx(sum(lost.values()))
        assert planned_time(profile, scope, found.allocation.choices)["planned_ms"] == pytest.approx(by_hand)
    with pytest.raises(InfeasibleBudget, match="target of 2 ms cannot be reached: at the narrowest widths") as caught:
        slim.timed_candidates(None, profile, Budget(value=2 / 6, denominator=6.0, unit="ms"))
    assert caught.value.cheapest > 2 / 6


def sparse(name, inputs):
    return Layer(name=name, part="3d", kind="sparse", shape=(8, 3, 3, 3, inputs), positions=np.full(27, 10.0))


def test_a_block_that_goes_takes_no_time_and_the_cheapest_that_is_named_is_reached(monkeypatch):
    """Of eight milliseconds two are fixed and two are the block's; the map's first layer never takes less than half."""
    block = "backbone_3d.conv1.0"
    stem, first, second = (
        sparse("backbone_3d.conv_input.0", 4),
        sparse(f"{block}.conv1", 8),
        sparse(f"{block}.conv2", 8),
    )
    layers = (stem, first, second, *LAYERS[:-1])
    profile = timed(layers, least=0.5, fixed_ms={"3d": 2.0})
    curves = {first.name: curve(first.name, 8), LAYERS[0].name: curve(LAYERS[0].name, 16)}
    whole = slim.Whole(
        every=layers, layers=layers[:4], groups=channel_groups(layers), curves=curves, blocks={block: 0.5}
    )
    monkeypatch.setattr(slim, "_whole", lambda run: whole)
    with pytest.raises(InfeasibleBudget, match=r"without residual blocks, 5\.5 ms of 8 ms are left") as caught:
        slim.timed_candidates(None, profile, Budget(value=0.5, denominator=8.0, unit="ms"))
    assert caught.value.fix == "raise --target to 5.500ms or more"
    monkeypatch.setattr(slim, "TIME_BISECTIONS", 1)  # as where no share tried meets the narrowest widths
    (found,) = slim.timed_candidates(None, profile, Budget(value=5.5 / 8, denominator=8.0, unit="ms"))
    assert found.allocation.dropped == (block,)
    assert found.allocation.widths == {LAYERS[0].name: 4}
    assert found.allocation.cost == 5.5
    assert found.allocation.distortion == pytest.approx(1.5)
    assert planned_time(profile, layers[:4], found.allocation.choices)["planned_ms"] == 5.5


@pytest.mark.parametrize(("patterns_left", "channels_left"), [(0.4, 0.6), (0.6, 0.4)])
def test_a_refusal_names_the_cheaper_of_patterns_and_channels(monkeypatch, patterns_left, channels_left):
    def refusing(left):
        def refuse(*args):
            raise InfeasibleBudget(f"{left} are left.", fix="raise it", cheapest=left)

        return refuse

    monkeypatch.setattr(allocate, "candidates_of", refusing(patterns_left))
    monkeypatch.setattr(allocate, "timed_candidates", refusing(channels_left))
    recipe = Recipe(model="m", target_ms=1.0, cost="latency", device="orin")
    prices = allocate.Prices(each={}, fixed=0.0, dense=Budget(value=1.0, denominator=8.0, unit="ms"))
    offer = allocate.Offer(layers=(), items=(), dense=(), out_of_scope=(), skipped=())
    with pytest.raises(InfeasibleBudget, match=r"0\.4 are left"):
        allocate._with_whole(SimpleNamespace(recipe=recipe), [], offer, prices, "a profile")
