"""Channels that go as a whole: what a group loses at each width, and the widths that a budget of MACs affords.

A layer costs its inputs times its outputs, so the costs of groups do not add up: the widths are found by descent over
the groups at one price per MAC (each group's best width while the others stand still), the price by bisection.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from dm3d_deploy.errors import InternalError
from dm3d_deploy.pruning import knapsack
from dm3d_deploy.pruning.contracts import Layer
from dm3d_deploy.pruning.groups import ChannelGroup, kept_sides
from dm3d_deploy.pruning.patterns import native_from_taps, taps_from_native

BISECTIONS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCurve:
    """What a group loses at each width: `order` holds its channels, the first to go first; `widths` fall from all."""

    group: str
    order: Int64[np.ndarray, " channels"]
    widths: Int64[np.ndarray, " options"]
    distortion: Float64[np.ndarray, " options"]

    def keep(self, width: int) -> Bool[np.ndarray, " channels"]:
        """Which channels stay at a width."""
        kept = np.zeros(len(self.order), np.bool_)
        kept[self.order[len(self.order) - width :]] = True
        return kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Slimming:
    """Widths of the groups that lose channels, residual blocks of which the identity is left, and what that makes.

    `distortion` is predicted, `cost` the MACs of the layers in scope, `lower_bound` what no widths get below.
    """

    widths: Mapping[str, int]
    dropped: tuple[str, ...]
    distortion: float
    cost: float
    lower_bound: float


def widths_of(channels: int, multiple: int) -> Int64[np.ndarray, " options"]:
    """All channels, then every smaller multiple of what the device pays for at once."""
    return np.array([channels, *range((channels - 1) // multiple * multiple, 0, -multiple)], dtype=np.int64)


def group_curve(
    group: ChannelGroup,
    layers: Mapping[str, Layer],
    weights: Mapping[str, Float[np.ndarray, "*shape"]],
    gradients: Mapping[str, Float[np.ndarray, "samples ..."]],
    *,
    multiple: int,
    kappa: float,
    damping: float,
) -> GroupCurve:
    """Distortion of one group at every width, from the gradient rows of the layers that read it.

    Without a channel its readers lose a column each: dW is those columns, and what its writers hold is of no account.
    delta = mean over samples of (g_n' dW)^2 + kappa ||dW||^2 as for weights (`curves.layer_curve`). The least
    sqrt(E (g_n' dW_c)^2 + damping * mean over channels of it * ||dW_c||^2 / mean ||dW||^2) goes first.
    """
    removed, energy = np.zeros((0, group.channels)), np.zeros(group.channels)
    for slot in group.read:
        layer, weight = layers[slot.layer], weights[slot.layer].astype(np.float64)
        flat = gradients[slot.layer].reshape(-1, *layer.shape)
        rows = np.stack([_columns(layer, row * weight, slot.offset, group, slot.repeat) for row in flat])
        removed = rows if not len(removed) else removed + rows
        energy += _columns(layer, np.square(weight), slot.offset, group, slot.repeat)
    square = np.square(removed).mean(axis=0)
    score = square + damping * square.mean() * energy / max(float(energy.mean()), np.finfo(np.float64).tiny)
    order = np.argsort(score, kind="stable")
    gone = np.cumsum(removed[:, order], axis=1)
    loss = np.concatenate([[0.0], np.square(gone).mean(axis=0) + kappa * np.cumsum(energy[order])])
    widths = widths_of(group.channels, multiple)
    return GroupCurve(
        group=group.name,
        order=order,
        widths=widths,
        distortion=np.maximum.accumulate(loss[group.channels - widths]),
    )


def _columns(layer: Layer, array: np.ndarray, offset: int, group: ChannelGroup, repeat: int) -> np.ndarray:
    """Sums over everything that multiplies each channel of a group: [channels]."""
    inputs = taps_from_native(layer, array).sum(axis=(0, 2))
    summed: np.ndarray = inputs[offset : offset + group.channels * repeat].reshape(group.channels, repeat).sum(axis=1)
    return summed


def channel_mask(
    layer: Layer, groups: Iterable[ChannelGroup], keep: Mapping[str, Bool[np.ndarray, " channels"]]
) -> Bool[np.ndarray, "*shape"]:
    """The weights of a layer that lie between kept inputs and kept outputs, native shape."""
    inputs, outputs = kept_sides(layer, groups, keep)
    taps = np.repeat(np.multiply.outer(inputs, outputs)[None], layer.taps, axis=0)
    return native_from_taps(layer, taps)


class _Widths:
    """The MACs of layers as products of group widths; a dropped block's layers cost nothing."""

    def __init__(
        self, layers: Sequence[Layer], groups: Sequence[ChannelGroup], curves: Mapping[str, GroupCurve]
    ) -> None:
        self.options = [curves[group.name] for group in groups if group.name in curves]
        index = {curve.group: i for i, curve in enumerate(self.options)}
        self.price = np.array([float(layer.positions.sum()) for layer in layers])
        self.fixed = np.array([[layer.inputs, layer.outputs] for layer in layers], dtype=np.float64)
        self.slope = np.zeros((len(layers), 2, len(self.options)))
        rows = {layer.name: row for row, layer in enumerate(layers)}
        self.blocks = [group.block for group in groups if group.name in curves]
        for group in groups:
            if group.name not in index:
                continue
            for side, slots in ((0, group.read), (1, group.written)):
                for slot in slots:
                    if slot.layer in rows:
                        self.slope[rows[slot.layer], side, index[group.name]] += slot.repeat
                        self.fixed[rows[slot.layer], side] -= slot.repeat * group.channels
        self.names = [layer.name for layer in layers]

    def sides(self, widths: np.ndarray) -> np.ndarray:
        """Inputs and outputs of each layer."""
        found: np.ndarray = self.fixed + self.slope @ widths
        return found

    def cost(self, widths: np.ndarray, alive: np.ndarray) -> float:
        sides = self.sides(widths)
        return float((self.price * alive * sides[:, 0] * sides[:, 1]).sum())

    def per_channel(self, widths: np.ndarray, alive: np.ndarray) -> np.ndarray:
        """MACs that one channel of each group costs while the others stand still."""
        sides, price = self.sides(widths), self.price * alive
        found: np.ndarray = (price * sides[:, 1]) @ self.slope[:, 0] + (price * sides[:, 0]) @ self.slope[:, 1]
        return found


class _Search:
    """Descent at one price per MAC over widths and blocks."""

    def __init__(self, table: _Widths, blocks: Mapping[str, float]) -> None:
        self.table, self.blocks = table, blocks
        self.inside = {
            block: np.array([name.startswith(f"{block}.") for name in table.names], dtype=np.bool_) for block in blocks
        }

    def alive(self, dropped: Collection[str]) -> np.ndarray:
        found = np.ones(len(self.table.names))
        for block in dropped:
            found[self.inside[block]] = 0
        return found

    def loss(self, picks: np.ndarray, dropped: Collection[str]) -> float:
        own = (
            float(curve.distortion[pick])
            for curve, pick, block in zip(self.table.options, picks, self.table.blocks, strict=True)
            if block not in dropped
        )
        return math.fsum([*own, *(self.blocks[block] for block in dropped)])

    def widths(self, picks: np.ndarray) -> np.ndarray:
        return np.array([curve.widths[pick] for curve, pick in zip(self.table.options, picks, strict=True)], float)

    def cost(self, picks: np.ndarray, dropped: Collection[str]) -> float:
        return self.table.cost(self.widths(picks), self.alive(dropped))

    def descend(self, price: float, picks: np.ndarray, dropped: frozenset[str]) -> tuple[np.ndarray, frozenset[str]]:
        """Until no group and no block changes alone."""
        picks = picks.copy()
        while True:
            before = picks.copy(), dropped
            for index, curve in enumerate(self.table.options):
                each = self.table.per_channel(self.widths(picks), self.alive(dropped))[index]
                picks[index] = int(np.argmin(curve.distortion + price * each * curve.widths))
            for block in self.blocks:
                trials = [dropped - {block}, dropped | {block}]
                values = [self.loss(picks, trial) + price * self.cost(picks, trial) for trial in trials]
                dropped = trials[int(values[1] < values[0])]
            if dropped == before[1] and (picks == before[0]).all():
                return picks, dropped

    def spend(self, picks: np.ndarray, dropped: frozenset[str], limit: float) -> np.ndarray:
        """Widen again and again the group that gains most and fits."""
        picks = picks.copy()
        while True:
            best, gain = None, 0.0
            for index, curve in enumerate(self.table.options):
                for pick in range(int(picks[index])):
                    wider = picks.copy()
                    wider[index] = pick
                    gained = float(curve.distortion[picks[index]] - curve.distortion[pick])
                    if gained > gain and self.cost(wider, dropped) <= limit:
                        best, gain = (index, pick), gained
            if best is None:
                return picks
            picks[best[0]] = best[1]


def slimmed(
    layers: Sequence[Layer],
    groups: Sequence[ChannelGroup],
    curves: Mapping[str, GroupCurve],
    blocks: Mapping[str, float],
    *,
    limit: float,
) -> Slimming | None:
    """Widths and dropped blocks of little predicted distortion whose layers cost `limit` MACs at most.

    `layers` are those that the limit counts, `blocks` the distortion of each residual block's identity. None when even
    the narrowest widths without any block cost more.
    """
    table = _Widths(layers, groups, curves)
    search = _Search(table, blocks)
    dense, none = np.zeros(len(table.options), np.int64), frozenset[str]()
    narrowest = np.array([len(curve.widths) - 1 for curve in table.options])
    if search.cost(dense, none) <= limit:
        return _slimming(search, dense, none, limit)
    if search.cost(narrowest, frozenset(blocks)) > limit:
        return None
    found = [(narrowest, frozenset(blocks))]
    starts = (dense, none), (narrowest, frozenset(blocks))
    for start in starts:
        low, high = 0.0, math.inf
        price = 1.0 / search.cost(dense, none)
        for _ in range(BISECTIONS):
            picks, dropped = search.descend(price, *start)
            fits = search.cost(picks, dropped) <= limit
            if fits:
                found.append((picks, dropped))
            low, high = (low, price) if fits else (price, high)
            price = price * 4 if high == math.inf else (price / 4 if low == 0 else math.sqrt(low * high))
            if low > 0 and high / low < 1 + 1e-6:
                break
    found.sort(key=lambda one: search.loss(*one))
    spent = [(search.spend(picks, dropped, limit), dropped) for picks, dropped in found[:4]]
    return _slimming(search, *min(spent, key=lambda one: search.loss(*one)), limit)


def _slimming(search: _Search, picks: np.ndarray, dropped: frozenset[str], limit: float) -> Slimming:
    table = search.table
    widths = search.widths(picks).astype(int).tolist()
    return Slimming(
        widths={
            curve.group: width
            for curve, width, block in zip(table.options, widths, table.blocks, strict=True)
            if width < curve.widths[0] and block not in dropped
        },
        dropped=tuple(sorted(dropped)),
        distortion=search.loss(picks, dropped),
        cost=search.cost(picks, dropped),
        lower_bound=_bound(search, limit),
    )


def _bound(search: _Search, limit: float) -> float:
    """A knapsack that saves at least as much: a width's saving beside dense neighbours is the largest that it can be.

    For shares a and b that go, 1 - (1 - a)(1 - b) <= a + b; the same holds for a block and the widths around it.
    """
    table = search.table
    dense = np.zeros(len(table.options), np.int64)
    each = table.per_channel(search.widths(dense), search.alive(()))
    costs = [own * curve.widths for own, curve in zip(each, table.options, strict=True)]
    losses = [curve.distortion for curve in table.options]
    for block, loss in search.blocks.items():
        own = search.cost(dense, ()) - search.cost(dense, (block,))
        costs.append(np.array([own, 0.0]))
        losses.append(np.array([0.0, loss]))
    if not costs:
        raise InternalError("no group and no block to slim")
    spare = math.fsum(cost[0] for cost in costs) - search.cost(dense, ())
    room = max(limit + spare, math.fsum(cost.min() for cost in costs))
    return max(0.0, knapsack.solve(costs, losses, room, bins=2000)[1])
