"""One pruning ratio and pattern for each layer: least predicted distortion within the budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np

from dm3d_deploy.errors import InfeasibleBudget, InternalError, UsageError, nearest
from dm3d_deploy.pruning import knapsack
from dm3d_deploy.pruning.contracts import ROUNDING, Allocation, Budget, Choice, Curve, Layer, Pattern

Mode = Literal["auto", "unstructured"]


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
    items: Sequence[Sequence[Choice]], *, budget: Budget, fixed_cost: float = 0.0, bins: int = 50_000
) -> Allocation:
    """Choose one of each layer's items with the least sum of distortions whose cost fits the budget.

    `fixed_cost` is what the budget counts and nothing here can change: layers in scope that stay dense. Exact up to
    `bins` (see `knapsack.solve`); `Allocation.gap` certifies how far from the optimum it can be. InfeasibleBudget when
    even the cheapest items and the fixed cost exceed the budget.
    """
    if not items or any(not group or len({choice.layer for choice in group}) != 1 for group in items):
        raise InternalError("an allocation needs layers, each with items of its own")
    costs = [np.array([choice.cost for choice in group]) for group in items]
    distortions = [np.array([choice.distortion for choice in group]) for group in items]
    limit = budget.limit * (1 + ROUNDING / 2)
    cheapest = math.fsum([fixed_cost, *(cost.min() for cost in costs)])
    if cheapest > limit:
        share = cheapest / budget.denominator
        raise InfeasibleBudget(
            f"The target {budget.value:g} of the {budget.scope}'s MACs cannot be reached: pruned as far as patterns "
            f"allow, {share:.4f} are left, {fixed_cost / budget.denominator:.4f} of them in layers that stay dense.",
            fix=f"raise --target to {math.ceil(share * 1e4) / 1e4:.4f} or more",
            cheapest=share,
        )
    picks, bound = knapsack.solve(costs, distortions, limit - fixed_cost, bins=bins)
    choices = tuple(group[pick] for group, pick in zip(items, picks, strict=True))
    return Allocation(
        choices=choices,
        distortion=math.fsum(choice.distortion for choice in choices),
        cost=math.fsum([fixed_cost, *(choice.cost for choice in choices)]),
        budget=budget,
        lower_bound=bound,
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
