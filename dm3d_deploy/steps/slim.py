"""Allocations that take channels and residual blocks whole, alone or before patterns within the layers that are left.

Two levels, as a layer's cost is a product: first the widths down to a share of the cost, then the knapsack over
patterns of the narrowed layers. Several shares between none and all make several candidates; a true forward picks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from dm3d_deploy.artifacts import write_tensors
from dm3d_deploy.errors import InfeasibleBudget
from dm3d_deploy.pruning.allocation import allocate, items_for
from dm3d_deploy.pruning.channels import GroupCurve, Slimming, slimmed
from dm3d_deploy.pruning.contracts import Allocation, Budget, Choice, Curve, Layer, Pattern
from dm3d_deploy.pruning.costs import executed_costs, time_costs
from dm3d_deploy.pruning.curves import pruned_counts
from dm3d_deploy.pruning.groups import ChannelGroup, channel_groups
from dm3d_deploy.pruning.macs import macs_of_counts
from dm3d_deploy.pruning.masks import masked_state
from dm3d_deploy.pruning.narrowed import Narrowing
from dm3d_deploy.pruning.patterns import eligible_patterns, prune_step
from dm3d_deploy.pruning.profiles import LayerTimes, Profile
from dm3d_deploy.stages import RunContext
from dm3d_deploy.steps.candidates import Candidate
from dm3d_deploy.steps.frame_work import Pieces, distortions, frames_of, outputs_of
from dm3d_deploy.steps.layers import in_scope, read_group_curves, read_layers

BLOCK_FRAMES = 2
TIME_BISECTIONS = 12
# Of the way from the dense cost to the target, on a logarithmic scale: what channels save before patterns do the rest.
CHANNELS_FIRST = (0.35, 0.7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """What can go whole: the layers in scope, the groups, their curves, and the distortion of each block's identity."""

    every: tuple[Layer, ...]
    layers: tuple[Layer, ...]
    groups: tuple[ChannelGroup, ...]
    curves: Mapping[str, GroupCurve]
    blocks: Mapping[str, float]


def slim_candidates(
    run: RunContext, curves: Sequence[Curve], offered: set[Pattern], budget: Budget, *, mixed: bool
) -> list[Candidate]:
    """Allocations within a budget of executed MACs; `mixed` adds those that go on with patterns behind some widths.

    InfeasibleBudget when even the narrowest widths without any block cost more.
    """
    whole, scores = _whole(run), {}
    if mixed:
        with safe_open(run.path("scores"), framework="np") as file:
            scores = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file, not a mapping
    return candidates_within(whole, budget, curves=curves, offered=offered if mixed else set(), scores=scores)


def timed_candidates(run: RunContext, profile: Profile, budget: Budget) -> list[Candidate]:
    """Channels and blocks within a time: of the widths by MACs those with the largest share whose layers are in time.

    Only what narrower layers in scope take less is counted as saved. InfeasibleBudget when no widths are fast enough.
    """
    whole, times = _whole(run), profile.times()
    dense_macs = math.fsum(layer.macs for layer in whole.layers)
    found = []
    for blocks in (True, False) if whole.blocks else (False,):
        best: Allocation | None = None
        low, high, share = 0.0, 1.0, 1.0
        for _ in range(TIME_BISECTIONS):
            widths = _slimmed(whole, share * dense_macs, blocks=blocks)
            choices, took_ms = ((), 0.0) if widths is None else _timed(whole, widths, times, budget)
            fits = took_ms <= budget.limit
            if widths is not None and fits:
                best = replace(_allocation(whole, choices, widths, budget, took_ms), lower_bound=0.0)
            low, high = (share, high) if fits else (low, share)
            share = (low + high) / 2
        if best is not None:
            found.append(Candidate(name=_name(best), allocation=best))
    if not found:
        least = _narrowest(whole)
        choices, least_ms = _timed(whole, least, times, budget)
        if least_ms > budget.limit:
            raise _too_slow(budget, least_ms)
        allocation = replace(_allocation(whole, choices, least, budget, least_ms), lower_bound=0.0)
        found.append(Candidate(name=_name(allocation), allocation=allocation))
    return _each_once(found)


def _name(allocation: Allocation) -> str:
    return "channels and blocks" if allocation.dropped else "channels"


def _each_once(found: Sequence[Candidate]) -> list[Candidate]:
    """Where no block goes, both ways end at the same channels."""
    return list({candidate.allocation.choices: candidate for candidate in found}.values())


def _timed(
    whole: Whole, found: Slimming, times: Mapping[str, LayerTimes], budget: Budget
) -> tuple[tuple[Choice, ...], float]:
    """The choices that widths are, and the network's milliseconds with them."""
    narrow = Narrowing(whole.every, whole.curves, found.widths, found.dropped)
    choices = tuple(_whole_choice(narrow, layer) for layer in whole.layers)
    saved = math.fsum(
        times[layer.name].dense_ms - float(time_costs(times[layer.name], layer, (choice,))[0])
        for layer, choice in zip(whole.layers, choices, strict=True)
    )
    return choices, budget.denominator - saved


def _whole(run: RunContext) -> Whole:
    every = read_layers(run.path("layers"))
    return Whole(
        every=every,
        layers=in_scope(every, run.recipe.scope),
        groups=channel_groups(every),
        curves=read_group_curves(run.path("channels")),
        blocks=block_distortions(run, in_scope(every, run.recipe.scope)),
    )


def candidates_within(
    whole: Whole,
    budget: Budget,
    *,
    curves: Sequence[Curve],
    offered: set[Pattern],
    scores: Mapping[str, np.ndarray],
) -> list[Candidate]:
    """Channels and blocks, channels alone, and where patterns are `offered` some channels and then those."""
    ways = (True, False) if whole.blocks else (False,)
    found = [_channels_only(whole, budget, with_blocks) for with_blocks in ways]
    if offered:
        for way in CHANNELS_FIRST:
            found.append(_then_patterns(whole, curves, offered, budget, budget.value**way, scores))
    made = _each_once([candidate for candidate in found if candidate is not None])
    if not made:
        raise _out_of_reach(whole, budget)
    return made


def _slimmed(whole: Whole, limit: float, *, blocks: bool) -> Slimming | None:
    return slimmed(whole.layers, whole.groups, whole.curves, whole.blocks if blocks else {}, limit=limit)


def _channels_only(whole: Whole, budget: Budget, blocks: bool) -> Candidate | None:
    found = _slimmed(whole, budget.limit, blocks=blocks)
    if found is None:
        return None
    narrow = Narrowing(whole.every, whole.curves, found.widths, found.dropped)
    choices = tuple(_whole_choice(narrow, layer) for layer in whole.layers)
    allocation = _allocation(whole, choices, found, budget, math.fsum(choice.cost for choice in choices))
    return Candidate(name=_name(allocation), allocation=allocation)


def _whole_choice(narrow: Narrowing, layer: Layer) -> Choice:
    """A layer that keeps everything between its kept channels, or nothing in a block that goes."""
    if narrow.gone(layer):
        return Choice(layer=layer.name, pattern="depth", step=0, ratio=1.0, distortion=0.0, cost=0.0)
    left = narrow.of(layer)
    pattern: Pattern = "channel" if narrow.touches(layer) else "dense"
    ratio = 1 - left.weights / layer.weights
    return Choice(layer=layer.name, pattern=pattern, step=0, ratio=ratio, distortion=0.0, cost=left.macs)


def _allocation(whole: Whole, choices: Sequence[Choice], found: Slimming, budget: Budget, cost: float) -> Allocation:
    """What is lost with a group stands at the layer that writes it first, what is lost with a block at its first."""
    lost = {f"{block}.conv1": whole.blocks[block] for block in found.dropped}
    for name, width in found.widths.items():
        curve = whole.curves[name]
        lost[name] = float(curve.distortion[np.flatnonzero(curve.widths == width)[0]])
    told = tuple(replace(one, distortion=one.distortion + lost.get(one.layer, 0.0)) for one in choices)
    return Allocation(
        choices=told,
        distortion=math.fsum(choice.distortion for choice in told),
        cost=cost,
        budget=budget,
        lower_bound=found.lower_bound,
        widths=found.widths,
        dropped=found.dropped,
    )


def _then_patterns(
    whole: Whole,
    curves: Sequence[Curve],
    offered: set[Pattern],
    budget: Budget,
    share: float,
    scores: Mapping[str, np.ndarray],
) -> Candidate | None:
    """Channels down to `share` of the dense cost, then the knapsack over patterns of what is left."""
    found = _slimmed(whole, share * budget.denominator, blocks=True)
    if found is None:
        return None
    narrow = Narrowing(whole.every, whole.curves, found.widths, found.dropped)
    fixed, items, costs = [], [], []
    for layer in whole.layers:
        left = narrow.of(layer)
        patterns, _ = eligible_patterns(left, offered)
        if narrow.gone(layer) or patterns == ("dense",) or layer.name not in scores:
            fixed.append(_whole_choice(narrow, layer))
            continue
        own = [curve for curve in curves if curve.layer == layer.name and curve.pattern in patterns]
        scored = narrow.take(layer, scores[layer.name])
        group = narrowed_items(layer, left, items_for(layer, own, "auto"), scores[layer.name], scored)
        items.append(group)
        costs.append(executed_costs(left, group))
    with contextlib.suppress(InfeasibleBudget):
        spent = allocate(items, budget=budget, costs=costs, fixed_cost=math.fsum(choice.cost for choice in fixed))
        merged = _allocation(whole, (*fixed, *spent.choices), found, budget, spent.cost)
        return Candidate(name=f"channels to {share:.0%}, then patterns", allocation=replace(merged, lower_bound=0.0))
    return None


def narrowed_items(
    layer: Layer, left: Layer, items: Sequence[Choice], scores: np.ndarray, scored: np.ndarray
) -> tuple[Choice, ...]:
    """The same patterns and ratios on what is left of a layer: exact costs, distortions by the scores that it keeps.

    `scores` are those of the whole layer, `scored` of what is left, native shapes.
    """
    if left is layer:
        return tuple(items)
    whole = float(np.square(scores, dtype=np.float64).sum())
    share = float(np.square(scored, dtype=np.float64).sum()) / whole if whole > 0 else 1.0
    costs: dict[tuple[str, float], float] = {}
    for pattern in dict.fromkeys(item.pattern for item in items):
        ratios = sorted({item.ratio for item in items if item.pattern == pattern})
        gone = pruned_counts(left, prune_step(left, scored, pattern, ratios), len(ratios))
        found = macs_of_counts(left, left.inputs * left.outputs - gone)
        costs |= {(pattern, ratio): float(cost) for ratio, cost in zip(ratios, found, strict=True)}
    return tuple(
        replace(item, distortion=item.distortion * share, cost=costs[item.pattern, item.ratio]) for item in items
    )


def block_distortions(run: RunContext, layers: Sequence[Layer]) -> dict[str, float]:
    """The true distortion of each residual block's identity, alone, over some calibration frames.

    A block is too large a step for derivatives: its identity takes biases and the norm with it.
    """
    blocks = [layer.name.removesuffix(".conv1") for layer in layers if layer.name.endswith(".conv1")]
    frames = frames_of(run, "calibration")[:BLOCK_FRAMES]
    if not blocks:
        return {}
    pieces = Pieces(run, (1 + len(blocks)) * len(frames))
    dense = outputs_of(run, run.path("dense_weights"), frames, pieces.done)
    pieces.next_job(len(frames))
    state, trial = load_file(run.start), run.root / "work" / ".block.safetensors"
    shapes = {layer.name: layer.shape for layer in layers}
    losses = {}
    for block in blocks:
        masks = {name: np.zeros(shapes[name], np.bool_) for name in (f"{block}.conv1", f"{block}.conv2")}
        write_tensors(trial, masked_state(state, masks))
        each = distortions(run, dense, outputs_of(run, trial, frames, pieces.done))
        pieces.next_job(len(frames))
        losses[block] = math.fsum(each) / len(each)
    trial.unlink()
    return losses


def _narrowest(whole: Whole) -> Slimming:
    """Every group at its least width, and no residual block."""
    gone = {group.name for group in whole.groups if group.block in whole.blocks}
    widths = {
        name: int(curve.widths[-1])
        for name, curve in whole.curves.items()
        if name not in gone and curve.widths[-1] < curve.widths[0]
    }
    return Slimming(widths=widths, dropped=tuple(sorted(whole.blocks)), distortion=0.0, cost=0.0, lower_bound=0.0)


def _too_slow(budget: Budget, least_ms: float) -> InfeasibleBudget:
    return InfeasibleBudget(
        f"The target of {budget.limit:.4g} ms cannot be reached: at the narrowest widths and without residual blocks, "
        f"{least_ms:.4g} ms of {budget.denominator:.4g} ms are left.",
        fix=f"raise --target to {math.ceil(least_ms * 1e3) / 1e3:.3f}ms or more",
        cheapest=least_ms / budget.denominator,
    )


def _out_of_reach(whole: Whole, budget: Budget) -> InfeasibleBudget:
    least = _narrowest(whole)
    narrow = Narrowing(whole.every, whole.curves, least.widths, least.dropped)
    left = math.fsum(0.0 if narrow.gone(layer) else narrow.of(layer).macs for layer in whole.layers)
    share = left / budget.denominator
    return InfeasibleBudget(
        f"The target {budget.value:g} of the {budget.scope}'s executed MACs cannot be reached: at the narrowest widths "
        f"and without residual blocks, {share:.4f} are left.",
        fix=f"raise --target to {math.ceil(share * 1e4) / 1e4:.4f} or more",
        cheapest=share,
    )
