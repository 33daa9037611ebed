"""One pruning ratio and pattern for each layer: least predicted distortion within the budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from dm3d_deploy.errors import InfeasibleBudget, InternalError, UsageError, nearest
from dm3d_deploy.pruning import knapsack
from dm3d_deploy.pruning.contracts import ROUNDING, Allocation, Budget, Choice, Curve, Layer, Pattern

Mode = Literal["auto", "unstructured"]
Items = Sequence[Sequence[Choice]]


def items_for(layer: Layer, curves: Iterable[Curve], mode: Mode | str) -> tuple[Choice, ...]:
    """What the allocation may choose from for one layer: the one place that says so.

    - unstructured: every point of the unstructured curve.
    - auto: what the device can use. A layer with a tile curve (3D) takes whole tiles only. One with a 2:4 curve (2D)
      is pruned freely below one half, where hardware saves nothing either way, and 2:4 legal from there on. A layer
      with neither is unstructured.
    """
    if mode not in get_args(Mode):
        raise UsageError(f"There is no pattern mode '{mode}'.", fix=nearest(mode, get_args(Mode)))
    by_pattern: dict[Pattern, Curve] = {}
    for curve in curves:
        if curve.layer != layer.name or curve.pattern in by_pattern:
            raise InternalError(
                f"{layer.name}: the curve ({curve.layer}, {curve.pattern}) is of another layer or double"
            )
        by_pattern[curve.pattern] = curve
    if mode == "auto" and "tile" in by_pattern:
        return _points(by_pattern["tile"])
    if "unstructured" not in by_pattern:
        raise InternalError(f"{layer.name}: no unstructured curve among {sorted(by_pattern)}")
    free = _points(by_pattern["unstructured"])
    if mode == "auto" and "2:4" in by_pattern:
        return tuple(choice for choice in free if choice.ratio < 0.5) + _points(by_pattern["2:4"])
    return free


def allocate(
    items: Items,
    *,
    budget: Budget,
    costs: knapsack.Costs | None = None,
    fixed_cost: float = 0.0,
    bins: int = 50_000,
) -> Allocation:
    """Choose one of each layer's items with the least sum of distortions whose cost fits the budget.

    `costs` are the items' in the budget's unit; without them their MACs count. `fixed_cost` is what the budget counts
    and nothing here can change: layers in scope that stay dense, and time that no weight takes. Exact up to `bins`
    (see `knapsack.solve`); `Allocation.gap` certifies how far from the optimum it can be. InfeasibleBudget when even
    the cheapest items and the fixed cost exceed the budget.
    """
    found, distortions = _arrays(items, costs)
    limit = budget.limit * (1 + ROUNDING / 2)
    cheapest = math.fsum([fixed_cost, *(cost.min() for cost in found)])
    if cheapest > limit:
        raise _out_of_reach(budget, cheapest, fixed_cost)
    picks, bound = knapsack.solve(found, distortions, limit - fixed_cost, bins=bins)
    return _allocation(items, found, picks, fixed_cost, budget=budget, lower_bound=bound)


def cheapest_within(
    items: Items,
    *,
    max_distortion: float,
    dense: Budget,
    costs: knapsack.Costs | None = None,
    fixed_cost: float = 0.0,
    bins: int = 50_000,
) -> Allocation:
    """Choose one of each layer's items with the least cost whose distortions sum to `max_distortion` at most.

    The same knapsack with its sides exchanged. `dense` is the budget that keeps everything; the allocation's own
    budget is what was reached. `Allocation.lower_bound` bounds the cost. UsageError when no choice is that faithful.
    """
    found, distortions = _arrays(items, costs)
    limit = max_distortion * (1 + ROUNDING / 2)
    least = math.fsum(distortion.min() for distortion in distortions)
    if least > limit:
        raise UsageError(
            f"The distortion {max_distortion:g} cannot be reached: the most faithful choice has {least:.4g}.",
            fix=f"raise --max-distortion above {least:.4g}",
        )
    picks, bound = knapsack.solve(distortions, found, limit, bins=bins)
    total = math.fsum([fixed_cost, *(cost[pick] for cost, pick in zip(found, picks, strict=True))])
    reached = replace(dense, value=min(1.0, total / dense.denominator))
    return _allocation(
        items, found, picks, fixed_cost, budget=reached, lower_bound=fixed_cost + bound, max_distortion=max_distortion
    )


def _arrays(items: Items, costs: knapsack.Costs | None) -> tuple[knapsack.Costs, list[np.ndarray]]:
    if not items or any(not group or len({choice.layer for choice in group}) != 1 for group in items):
        raise InternalError("an allocation needs layers, each with items of its own")
    if costs is None:
        costs = [np.array([choice.cost for choice in group]) for group in items]
    return costs, [np.array([choice.distortion for choice in group]) for group in items]


def _allocation(
    items: Items,
    costs: knapsack.Costs,
    picks: Sequence[int],
    fixed_cost: float,
    *,
    budget: Budget,
    lower_bound: float,
    max_distortion: float | None = None,
) -> Allocation:
    choices = tuple(group[pick] for group, pick in zip(items, picks, strict=True))
    return Allocation(
        choices=choices,
        distortion=math.fsum(choice.distortion for choice in choices),
        cost=math.fsum([fixed_cost, *(cost[pick] for cost, pick in zip(costs, picks, strict=True))]),
        budget=budget,
        lower_bound=lower_bound,
        max_distortion=max_distortion,
    )


def _out_of_reach(budget: Budget, cheapest: float, fixed: float) -> InfeasibleBudget:
    """The refusal: what was asked for, the cheapest that is left, and how much of it no choice can change."""
    share = cheapest / budget.denominator
    if budget.unit == "ms":
        return InfeasibleBudget(
            f"The target of {budget.limit:.4g} ms cannot be reached: pruned as far as patterns allow, "
            f"{cheapest:.4g} ms of {budget.denominator:.4g} ms are left, {fixed:.4g} ms of them in what stays dense.",
            fix=f"raise --target to {math.ceil(cheapest * 1e3) / 1e3:.3f}ms or more",
            cheapest=share,
        )
    kind = "executed MACs" if budget.unit == "executed" else "MACs"
    return InfeasibleBudget(
        f"The target {budget.value:g} of the {budget.scope}'s {kind} cannot be reached: pruned as far as patterns "
        f"allow, {share:.4f} are left, {fixed / budget.denominator:.4f} of them in layers that stay dense.",
        fix=f"raise --target to {math.ceil(share * 1e4) / 1e4:.4f} or more",
        cheapest=share,
    )


def _points(curve: Curve) -> tuple[Choice, ...]:
    return tuple(
        Choice(
            layer=curve.layer,
            pattern=curve.pattern,
            step=step,
            ratio=float(ratio),
            distortion=float(distortion),
            cost=float(cost),
        )
        for step, (ratio, distortion, cost) in enumerate(zip(curve.ratio, curve.distortion, curve.cost, strict=True))
    )
