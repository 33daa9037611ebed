"""The stages' part in other methods than DM3D: what they rank by, and how they spend the budget."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
from safetensors import safe_open

from dm3d_deploy.errors import InfeasibleBudget
from dm3d_deploy.pruning import knapsack
from dm3d_deploy.pruning.baselines import kept_counts, signed_objective, taylor_scores
from dm3d_deploy.pruning.contracts import Allocation, Budget, Choice, Curve, Layer
from dm3d_deploy.pruning.macs import kept_macs
from dm3d_deploy.pruning.patterns import prune_step
from dm3d_deploy.pruning.ranking import scores as damped_scores
from dm3d_deploy.stages import RunContext

PAPER = "paper-eq13"


def scores_of(method: str, weight: np.ndarray, gradients: np.ndarray, damping: float) -> np.ndarray:
    """What a method ranks the weights of one layer by, Float32 of native shape; `gradients` are [samples, *shape]."""
    if method in ("uniform", "erk", "lamp"):
        return np.asarray(np.abs(weight))
    if method == PAPER:
        return np.asarray(np.abs(weight * gradients.mean(axis=0, dtype=np.float64)), dtype=np.float32)
    mean_square = np.square(gradients, dtype=np.float64).mean(axis=0)
    if method == "taylor":
        return taylor_scores(weight, mean_square).astype(np.float32)
    return damped_scores(weight, mean_square, damping=damping).astype(np.float32)


def printed_objective(
    layer: Layer, weight: np.ndarray, gradients: np.ndarray, scores: np.ndarray, ratios: np.ndarray, kappa: float
) -> list[float]:
    """The paper's Eq. 13 at every ratio, for curves.json."""
    return [float(value) for value in signed_objective(layer, weight, gradients, scores, ratios, kappa=kappa)]


def baseline_allocation(
    run: RunContext, layers: Sequence[Layer], curves: Sequence[Curve], budget: Budget, fixed: float
) -> Allocation:
    """A method's own kept counts as an allocation; its distortion is what the curves of its ranking predict.

    Of `curves` the unstructured ones count; the bound is that of the best allocation of the same curves.
    """
    method = run.recipe.method
    free = {curve.layer: curve for curve in curves if curve.pattern == "unstructured"}
    with safe_open(run.path("scores"), framework="np") as file:
        scores = {layer.name: file.get_tensor(layer.name) for layer in layers}
    costs, losses = [free[layer.name].cost for layer in layers], [free[layer.name].distortion for layer in layers]
    cheapest = math.fsum([fixed, *(float(cost[-1]) for cost in costs)]) / budget.denominator
    if cheapest > budget.value:
        raise InfeasibleBudget(
            f"The target {budget.value:g} cannot be reached by the method '{method}': {cheapest:.4f} is the least.",
            fix=f"raise --target to {math.ceil(cheapest * 1e4) / 1e4:.4f} or more",
            cheapest=cheapest,
        )
    limit = budget.limit - fixed
    _, bound = knapsack.solve(costs, losses, limit)
    if method == PAPER:
        picks, _ = knapsack.solve(costs, _signed(run, layers), limit)
        ratios = [float(free[layer.name].ratio[pick]) for layer, pick in zip(layers, picks, strict=True)]
    else:
        counts = kept_counts(method, layers, scores, limit)
        ratios = [1 - counts[layer.name] / layer.weights for layer in layers]
    choices = tuple(
        _choice(layer, ratio, free[layer.name], scores[layer.name]) for layer, ratio in zip(layers, ratios, strict=True)
    )
    return Allocation(
        choices=choices,
        distortion=math.fsum(choice.distortion for choice in choices),
        cost=math.fsum([fixed, *(choice.cost for choice in choices)]),
        budget=budget,
        lower_bound=bound,
    )


def _signed(run: RunContext, layers: Sequence[Layer]) -> list[np.ndarray]:
    rows = json.loads(run.path("curves").read_text(encoding="utf-8"))
    signed = {row["layer"]: np.asarray(row["signed"]) for row in rows if row["pattern"] == "unstructured"}
    return [signed[layer.name] for layer in layers]


def _choice(layer: Layer, ratio: float, curve: Curve, scores: np.ndarray) -> Choice:
    keep = prune_step(layer, scores, "unstructured", (ratio,)) > 0
    return Choice(
        layer=layer.name,
        pattern="unstructured",
        step=int(np.searchsorted(curve.ratio, ratio, side="right")) - 1,
        ratio=ratio,
        distortion=float(np.interp(ratio, curve.ratio, curve.distortion)),
        cost=kept_macs(layer, keep),
    )
