"""The multiple-choice knapsack: one item of each group, least distortion, total cost within a limit.

Arrays in, indices out; it knows no layers. Ties go to the lowest cost, then to the first item.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int64

from dm3d_deploy.errors import InternalError

Costs = Sequence[Float64[np.ndarray, " items"]]


class _Fronts:
    """The undominated items of each group, cost rising and distortion falling; short groups repeat their last item."""

    def __init__(self, costs: Costs, distortions: Costs) -> None:
        self.items = [undominated(cost, distortion) for cost, distortion in zip(costs, distortions, strict=True)]
        self.sizes = np.array([len(items) for items in self.items])
        padded = np.stack([np.pad(items, (0, self.sizes.max() - len(items)), mode="edge") for items in self.items])
        self.cost = np.stack([cost[items] for cost, items in zip(costs, padded, strict=True)])
        self.distortion = np.stack([loss[items] for loss, items in zip(distortions, padded, strict=True)])
        self.rows = np.arange(len(self.items))

    def total_cost(self, picks: Int64[np.ndarray, " groups"]) -> float:
        return math.fsum(self.cost[self.rows, picks])

    def total_distortion(self, picks: Int64[np.ndarray, " groups"]) -> float:
        return math.fsum(self.distortion[self.rows, picks])


def solve(costs: Costs, distortions: Costs, limit: float, *, bins: int = 50_000) -> tuple[list[int], float]:
    """Pick one item per group; returns the picks and the Lagrangian lower bound of the distortion.

    Costs are rounded up to bins, so that the limit holds; what the rounding left over is then spent on the moves that
    gain most. Before that, items that cannot be in any solution better than the one the Lagrangian relaxation gives
    are struck out, and the bins divide only what is left above the cheapest remaining items. The limit must be
    reachable: the caller checks it and words the refusal.
    """
    if not costs or bins < 1 or any(len(c) == 0 or c.shape != d.shape for c, d in zip(costs, distortions, strict=True)):
        raise InternalError("a knapsack needs bins, groups, and as many costs as distortions in each")
    if not all(np.isfinite(values).all() for values in (*costs, *distortions)):
        raise InternalError("a knapsack's costs and distortions must be finite")
    fronts = _Fronts(costs, distortions)
    cheapest, dearest = np.zeros_like(fronts.sizes), fronts.sizes - 1
    if fronts.total_cost(cheapest) > limit:
        raise InternalError(f"the cheapest items cost {fronts.total_cost(cheapest):g}, the limit is {limit:g}")
    if fronts.total_cost(dearest) <= limit:
        return _original(fronts, dearest), fronts.total_distortion(dearest)

    multiplier, bound, feasible = _relax(fronts, cheapest, dearest, limit)
    feasible = _spend(fronts, feasible, limit)
    reduced = fronts.distortion + multiplier * fronts.cost
    reduced -= reduced.min(axis=1, keepdims=True)
    slack = fronts.total_distortion(feasible) - bound
    survivors = reduced <= slack + 1e-12 * float(reduced.max())
    survivors[fronts.rows, feasible] = True  # by arithmetic it survives; rounding must not strike it out
    best = _by_bins(fronts, survivors, limit, bins)
    if best is None:
        return _original(fronts, feasible), bound
    best = _spend(fronts, best, limit)
    return _original(fronts, min(best, feasible, key=fronts.total_distortion)), bound


def undominated(
    cost: Float64[np.ndarray, " items"], distortion: Float64[np.ndarray, " items"]
) -> Int64[np.ndarray, " front"]:
    """Indices of the items that no cheaper or equally dear item matches, cost rising, distortion falling."""
    order = np.lexsort((distortion, cost))  # stable: the first of equals leads
    sorted_distortion = distortion[order]
    best_before = np.concatenate([[np.inf], np.minimum.accumulate(sorted_distortion)[:-1]])
    front: np.ndarray = order[sorted_distortion < best_before]
    return front


def knapsack(sizes: Sequence[Int64[np.ndarray, " items"]], distortions: Costs, capacity: int) -> list[int] | None:
    """The exact knapsack over whole sizes by dynamic programming; None when nothing fits.

    best[j] is the least distortion of the groups so far with total size at most j. O(items * capacity) time,
    two bytes per group and bin.
    """
    if max(len(size) for size in sizes) > np.iinfo(np.int16).max:
        raise InternalError("a knapsack's group holds too many items")
    best = np.zeros(capacity + 1)
    chosen = np.zeros((len(sizes), capacity + 1), dtype=np.int16)
    for row, size, distortion in zip(chosen, sizes, distortions, strict=True):
        fresh = np.full(capacity + 1, np.inf)
        for item in np.lexsort((distortion, size)):
            step = int(size[item])
            if step > capacity:
                continue
            candidate = best[: capacity + 1 - step] + distortion[item]
            better = candidate < fresh[step:]
            np.copyto(fresh[step:], candidate, where=better)
            np.copyto(row[step:], np.int16(item), where=better)
        best = fresh
    if not math.isfinite(best[capacity]):
        return None
    picks = []
    left = capacity
    for row, size in zip(chosen[::-1], reversed(sizes), strict=True):
        picks.append(int(row[left]))
        left -= int(size[picks[-1]])
    return picks[::-1]


def _original(fronts: _Fronts, picks: Int64[np.ndarray, " groups"]) -> list[int]:
    return [int(items[pick]) for items, pick in zip(fronts.items, picks, strict=True)]


def _relax(
    fronts: _Fronts, cheap: Int64[np.ndarray, " groups"], dear: Int64[np.ndarray, " groups"], limit: float
) -> tuple[float, float, Int64[np.ndarray, " groups"]]:
    """The best multiplier, its bound, and the dearest relaxed solution within the limit.

    The dual L(m) = min over picks of distortion + m * (cost - limit) is concave and piecewise linear: the multiplier at
    which the two picks around the limit tie is tried, until no pick lies below their line.
    """
    while True:
        cost_cheap, cost_dear = fronts.total_cost(cheap), fronts.total_cost(dear)
        loss_cheap, loss_dear = fronts.total_distortion(cheap), fronts.total_distortion(dear)
        multiplier = (loss_cheap - loss_dear) / (cost_dear - cost_cheap)
        picks = np.argmin(fronts.distortion + multiplier * fronts.cost, axis=1)
        cost, loss = fronts.total_cost(picks), fronts.total_distortion(picks)
        bound = loss + multiplier * (cost - limit)
        line = loss_cheap + multiplier * (cost_cheap - limit)
        if not cost_cheap < cost < cost_dear or bound >= line - 1e-13 * abs(loss_cheap):
            return multiplier, min(bound, line), cheap
        if cost <= limit:
            cheap = picks
        else:
            dear = picks


def _by_bins(
    fronts: _Fronts, survivors: Bool[np.ndarray, "groups items"], limit: float, bins: int
) -> Int64[np.ndarray, " groups"] | None:
    """The knapsack over the surviving items, costs above each group's cheapest rounded up to bins."""
    kept = [np.flatnonzero(row[:size]) for row, size in zip(survivors, fronts.sizes, strict=True)]
    base = np.array([cost[items[0]] for cost, items in zip(fronts.cost, kept, strict=True)])
    room = limit - math.fsum(base)
    if room <= 1e-12 * abs(limit):  # bins of no width
        return None
    extra = [
        np.ceil((cost[items] - cost[items[0]]) * (bins / room)) for cost, items in zip(fronts.cost, kept, strict=True)
    ]
    sizes = [np.minimum(size, bins + 1).astype(np.int64) for size in extra]
    losses = [loss[items] for loss, items in zip(fronts.distortion, kept, strict=True)]
    picks = knapsack(sizes, losses, bins)
    return None if picks is None else np.array([items[pick] for items, pick in zip(kept, picks, strict=True)])


def _spend(fronts: _Fronts, picks: Int64[np.ndarray, " groups"], limit: float) -> Int64[np.ndarray, " groups"]:
    """Spend what is left of the limit: again and again the one move that lowers the distortion most and fits."""
    picks = picks.copy()
    while True:
        left = limit - fronts.total_cost(picks)
        cost = fronts.cost - fronts.cost[fronts.rows, picks][:, None]
        gain = fronts.distortion[fronts.rows, picks][:, None] - fronts.distortion
        gain[cost > left] = 0
        group, item = divmod(int(gain.argmax()), gain.shape[1])
        if gain[group, item] <= 0:
            return picks
        picks[group] = item
