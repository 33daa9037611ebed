"""The stage that spends the budget: what each layer may become, what that costs, and the choice among it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from dm3d_deploy.artifacts import write_json
from dm3d_deploy.device import devices_from
from dm3d_deploy.errors import InfeasibleBudget
from dm3d_deploy.pruning.allocation import allocate as allocate_budget
from dm3d_deploy.pruning.allocation import cheapest_within, items_for
from dm3d_deploy.pruning.contracts import Allocation, Budget, Choice, Cost, Curve, Layer, Pattern, Scope
from dm3d_deploy.pruning.costs import UNIT_OF, executed_costs, planned_time, time_costs
from dm3d_deploy.pruning.patterns import eligible_patterns
from dm3d_deploy.pruning.profiles import Profile
from dm3d_deploy.recipe import Recipe
from dm3d_deploy.stages import RunContext
from dm3d_deploy.steps.baseline import baseline_allocation
from dm3d_deploy.steps.candidates import Candidate, candidates_of, verified
from dm3d_deploy.steps.foresee import foreseen_curves
from dm3d_deploy.steps.layers import allocation_as_json, in_scope, read_layers
from dm3d_deploy.steps.slim import slim_candidates, timed_candidates


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What the allocation may choose from: layers with items, all others, and why some of those have none."""

    layers: tuple[Layer, ...]
    items: tuple[tuple[Choice, ...], ...]
    dense: tuple[Layer, ...]
    out_of_scope: tuple[Layer, ...]
    skipped: tuple[dict[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """The items' costs in the budget's unit, what nothing can change, and what the dense network costs."""

    each: dict[tuple[str, Pattern, int], float]
    fixed: float
    dense: Budget


def allocate(run: RunContext) -> None:
    """Spend the budget over the layers in scope, and keep the candidate that a true forward says is best."""
    recipe, (curves, foreseen) = run.recipe, foreseen_curves(run)
    offer = offer_of(run, curves)
    profile = profile_of(run)
    try:
        found = _candidates(run, curves, offer, profile, foreseen=foreseen)
    except InfeasibleBudget as error:
        raise _with_standing(error, profile) from None
    estimated = profile is not None and profile.standing == "estimated"
    chosen, rows = verified(run, found, estimated=estimated)
    write_json(
        run.path("allocation"),
        {
            **allocation_as_json(chosen),
            "skipped": list(offer.skipped),
            "cost_kind": recipe.cost,
            "candidates": rows,
            "foreseen": foreseen,
            "time": None if profile is None else planned_time(profile, offer.layers, chosen.choices),
        },
    )


def _with_standing(error: InfeasibleBudget, profile: Profile | None) -> InfeasibleBudget:
    """A refusal in milliseconds says how these are known."""
    if profile is None:
        return error
    return InfeasibleBudget(f"{error.what} All times are {profile.words}.", fix=error.fix, cheapest=error.cheapest)


def _candidates(
    run: RunContext, curves: Sequence[Curve], offer: Offer, profile: Profile | None, *, foreseen: bool
) -> list[Candidate]:
    recipe, prices = run.recipe, prices_of(run.recipe, offer, profile)
    if recipe.method == "dm3d" and recipe.cost != "macs" and recipe.patterns != "unstructured":
        return _with_whole(run, curves, offer, prices, profile)
    if foreseen:  # a forward of the masks would not tell which is best behind a refit
        return [Candidate(name="least sum behind a refit", allocation=_solve(recipe, offer.items, prices, None))]
    if recipe.method == "dm3d":
        return candidates_of(recipe, offer.items, lambda items, limit: _solve(recipe, items, prices, limit))
    budget = _budget(recipe, prices.dense)
    rest = baseline_allocation(run, offer.layers, curves, budget, prices.fixed)
    return [Candidate(name=recipe.method, allocation=rest)]


def _with_whole(
    run: RunContext, curves: Sequence[Curve], offer: Offer, prices: Prices, profile: Profile | None
) -> list[Candidate]:
    """Candidates by what hardware runs: patterns alone where the devices have some, and channels and blocks."""
    recipe = run.recipe
    offered = {cast(Pattern, pattern) for device in devices_from(recipe.device) for pattern in device.patterns}
    mixed = recipe.patterns == "auto" and bool(offered)
    found: list[Candidate] = []
    refused: list[InfeasibleBudget] = []
    if mixed or recipe.max_distortion is not None or (recipe.patterns == "auto" and profile is not None):
        try:
            found += candidates_of(recipe, offer.items, lambda items, limit: _solve(recipe, items, prices, limit))
        except InfeasibleBudget as error:
            refused.append(error)
    if recipe.max_distortion is not None:
        return found  # within a distortion: patterns only
    budget = _budget(recipe, prices.dense)
    try:
        found += (
            slim_candidates(run, curves, offered, budget, mixed=mixed)
            if profile is None
            else timed_candidates(run, profile, budget)
        )
    except InfeasibleBudget as error:
        refused.append(error)
    if not found and refused:
        raise min(refused, key=lambda error: error.cheapest)
    return found


def offer_of(run: RunContext, curves: Sequence[Curve]) -> Offer:
    """Every layer in scope with the choices that the target devices and its curves leave it."""
    offered = {cast(Pattern, pattern) for device in devices_from(run.recipe.device) for pattern in device.patterns}
    by_layer: dict[str, list[Curve]] = {}
    for curve in curves:
        by_layer.setdefault(curve.layer, []).append(curve)
    every = read_layers(run.path("layers"))
    scope = in_scope(every, run.recipe.scope)
    layers, dense, items, skipped = [], [], [], []
    for layer in scope:
        patterns, skip = eligible_patterns(layer, offered)
        if skip is not None:
            skipped.append({"layer": skip.layer, "reason": skip.reason})
        if patterns != ("dense",) and layer.name not in by_layer:
            reason = "no calibration frame gives it a gradient, so pruning it would look free: it stays dense"
            patterns, skip = ("dense",), None
            skipped.append({"layer": layer.name, "reason": reason})
        if patterns == ("dense",):
            dense.append(layer)
            continue
        usable = [curve for curve in by_layer[layer.name] if curve.pattern in patterns]
        layers.append(layer)
        items.append(items_for(layer, usable, "auto" if run.recipe.patterns == "channels" else run.recipe.patterns))
    counted = {layer.name for layer in scope}
    return Offer(
        layers=tuple(layers),
        items=tuple(items),
        dense=tuple(dense),
        out_of_scope=tuple(layer for layer in every if layer.name not in counted),
        skipped=tuple(skipped),
    )


def profile_of(run: RunContext) -> Profile | None:
    """The times that the budget is counted in; None where it counts multiplications."""
    if run.recipe.cost != "latency":
        return None
    from dm3d_deploy.config import load_config
    from dm3d_deploy.models.detector import build_detector
    from dm3d_deploy.profiling import profile_for_build

    info = json.loads(run.path("frames_info").read_text(encoding="utf-8"))
    voxels = [row["voxels"] for row in info["frames"] if row["role"] == "calibration"]
    detector = build_detector(load_config(run.path("model_config")))
    name = str(json.loads(run.path("model_info").read_text(encoding="utf-8"))["name"])
    layers = read_layers(run.path("layers"))
    return profile_for_build(run.recipe, detector, layers, voxels=round(sum(voxels) / len(voxels)), model_name=name)


def prices_of(recipe: Recipe, offer: Offer, profile: Profile | None) -> Prices:
    """What the items cost in the recipe's cost. Time is the whole network's, MACs are those in scope."""
    pairs = list(zip(offer.layers, offer.items, strict=True))
    scope, unit = cast(Scope, recipe.scope), UNIT_OF[cast(Cost, recipe.cost)]
    if profile is not None:
        times = profile.times()
        costs = [time_costs(times[layer.name], layer, items) for layer, items in pairs]
        rest = (times[layer.name].dense_ms for layer in (*offer.dense, *offer.out_of_scope))
        fixed, denominator = math.fsum([*profile.fixed_ms.values(), *rest]), profile.dense_ms
    else:
        counted = recipe.cost == "executed"
        costs = [
            executed_costs(layer, items) if counted else np.array([item.cost for item in items])
            for layer, items in pairs
        ]
        fixed = math.fsum(layer.macs for layer in offer.dense)
        denominator = math.fsum(layer.dense_macs for layer in (*offer.dense, *offer.layers))
    each = {
        (item.layer, item.pattern, item.step): float(cost)
        for group, found in zip(offer.items, costs, strict=True)
        for item, cost in zip(group, found, strict=True)
    }
    return Prices(each=each, fixed=fixed, dense=Budget(value=1.0, denominator=denominator, scope=scope, unit=unit))


def _budget(recipe: Recipe, dense: Budget) -> Budget:
    """The recipe's target as a share; a network that is fast enough already keeps everything."""
    if recipe.target is not None:
        return replace(dense, value=recipe.target)
    return replace(dense, value=min(1.0, cast(float, recipe.target_ms) / dense.denominator))


def _solve(
    recipe: Recipe, items: Sequence[Sequence[Choice]], prices: Prices, max_distortion: float | None
) -> Allocation:
    """The best allocation within the recipe's goal: a share of the cost, a time, or a distortion."""
    costs = [np.array([prices.each[item.layer, item.pattern, item.step] for item in group]) for group in items]
    if max_distortion is not None:
        return cheapest_within(
            items, max_distortion=max_distortion, dense=prices.dense, costs=costs, fixed_cost=prices.fixed
        )
    return allocate_budget(items, budget=_budget(recipe, prices.dense), costs=costs, fixed_cost=prices.fixed)
