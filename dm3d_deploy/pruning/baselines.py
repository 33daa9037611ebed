"""The allocations to beat: how many weights of each layer other methods keep at the same kept multiplications.

All of them rank by one score per weight and prune freely. A layer keeps at least 1 - RATIO_CAP of its weights, as with
DM3D: methods that compare weights across layers would otherwise empty some, and be beaten for that alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Float64, Int64

from dm3d_deploy.errors import InfeasibleBudget, InternalError
from dm3d_deploy.pruning.contracts import Layer
from dm3d_deploy.pruning.patterns import RATIO_CAP, native_from_taps, prune_step

Scores = Mapping[str, Float[np.ndarray, "*shape"]]
HALVINGS = 100


def kept_counts(method: str, layers: Sequence[Layer], scores: Scores, limit: float) -> dict[str, int]:
    """How many of each layer's weights `method` keeps: the highest by score, together at most `limit` MACs.

    `scores` by layer name, native shape: magnitudes for uniform, erk and lamp, `taylor_scores` for taylor.
    InfeasibleBudget when the least that every layer keeps costs more than the limit.
    """
    macs = {layer.name: _sorted_macs(layer, scores[layer.name]) for layer in layers}
    least = {layer.name: least_kept(layer) for layer in layers}
    cheapest = math.fsum(float(macs[name][:count].sum()) for name, count in least.items())
    if cheapest > limit:
        dense = math.fsum(layer.macs for layer in layers)
        share = cheapest / dense
        raise InfeasibleBudget(
            f"The method '{method}' cannot keep less than {share:.4f} of the MACs of the layers that it prunes, "
            f"{limit / dense:.4f} are allowed.",
            fix="raise --target",
            cheapest=share,
        )
    if method == "uniform":
        return _scaled({layer.name: 1.0 for layer in layers}, layers, macs, least, limit)
    if method == "erk":
        return _scaled({layer.name: erk_density(layer) for layer in layers}, layers, macs, least, limit)
    if method == "lamp":
        return _global({name: lamp_scores(score) for name, score in scores.items()}, layers, macs, least, limit)
    if method == "taylor":
        return _global({name: np.sort(score, axis=None)[::-1] for name, score in scores.items()},
                       layers, macs, least, limit)  # fmt: skip
    raise InternalError(f"'{method}' is no baseline with a kept count")


def least_kept(layer: Layer) -> int:
    """The weights that no method prunes from a layer."""
    return layer.weights - int(np.rint(RATIO_CAP * layer.weights))


def erk_density(layer: Layer) -> float:
    """Erdos-Renyi-Kernel: (inputs + outputs + kernel extents) / (inputs * outputs * taps), to a common factor.

    Evci et al., "Rigging the Lottery" (ICML 2020), section 3(1).
    """
    return (layer.inputs + layer.outputs + sum(layer.kernel)) / layer.weights


def lamp_scores(magnitudes: Float[np.ndarray, "*shape"]) -> Float64[np.ndarray, " weights"]:
    """w^2 over the sum of the squares that are not smaller, of each weight, from the largest weight to the smallest.

    Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning" (ICLR 2021), Eq. 3. Of equal weights each is
    compared with those before it in this order.
    """
    squares = np.square(np.sort(magnitudes.astype(np.float64), axis=None)[::-1])
    total = np.cumsum(squares)
    shares: np.ndarray = np.divide(squares, total, out=np.zeros_like(squares), where=total > 0)
    return shares


def taylor_scores(
    weight: Float[np.ndarray, "*shape"], mean_square_gradient: Float[np.ndarray, "*shape"]
) -> Float64[np.ndarray, "*shape"]:
    """|w| * sqrt(E g^2), comparable across layers: the root of Molchanov et al.'s squared Taylor term (CVPR 2019).

    SNIP's |w g| with the mean square over samples in place of one batch's gradient, which cancels between cells.
    """
    score: np.ndarray = np.abs(weight.astype(np.float64)) * np.sqrt(mean_square_gradient.astype(np.float64))
    return score


def signed_objective(
    layer: Layer,
    weight: Float[np.ndarray, "*shape"],
    gradients: Float[np.ndarray, "samples ..."],
    scores: Float[np.ndarray, "*shape"],
    ratios: Float64[np.ndarray, " points"],
    *,
    kappa: float,
) -> Float64[np.ndarray, " points"]:
    """DM3D's Eq. 13 as printed: g'dW + dW'H dW / 2 at every ratio, g the mean gradient, H as in Eq. 12.

    It is signed: where it is negative, pruning looks like a gain. For reproduction only.
    """
    steps = prune_step(layer, scores, "unstructured", ratios).ravel().astype(np.intp)
    flat, rows = weight.ravel().astype(np.float64), gradients.reshape(len(gradients), -1)
    points = len(ratios)
    removed = np.stack([np.bincount(steps, weights=row * flat, minlength=points + 1)[:points] for row in rows])
    energy = np.cumsum(np.bincount(steps, weights=flat * flat, minlength=points + 1)[:points])
    change = -np.cumsum(removed, axis=1)  # g_n'dW with dW = -w where pruned
    return np.asarray(change.mean(axis=0) + 0.5 * (np.square(change).mean(axis=0) + kappa * energy))


def _sorted_macs(layer: Layer, scores: Float[np.ndarray, "*shape"]) -> Float64[np.ndarray, " weights"]:
    """MACs of each weight of a layer, from the highest score to the lowest; ties as in `prune_step`."""
    per_tap = np.broadcast_to(layer.positions[:, None, None], (layer.taps, layer.inputs, layer.outputs))
    order = np.argsort(scores, axis=None, kind="stable")[::-1]
    return np.asarray(native_from_taps(layer, per_tap).ravel()[order])


def _scaled(
    densities: Mapping[str, float],
    layers: Sequence[Layer],
    macs: Mapping[str, Float64[np.ndarray, " weights"]],
    least: Mapping[str, int],
    limit: float,
) -> dict[str, int]:
    """Densities times the largest common factor that fits, none above 1."""

    def counts(factor: float) -> dict[str, int]:
        shares = {layer.name: min(1.0, factor * densities[layer.name]) for layer in layers}
        return {layer.name: max(least[layer.name], int(shares[layer.name] * layer.weights)) for layer in layers}

    def fits(factor: float) -> bool:
        return math.fsum(float(macs[name][:count].sum()) for name, count in counts(factor).items()) <= limit

    low, high = 0.0, 1 / min(densities.values())
    if fits(high):
        return counts(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return counts(low)


def _global(
    ranked: Mapping[str, Float64[np.ndarray, " weights"]],
    layers: Sequence[Layer],
    macs: Mapping[str, Float64[np.ndarray, " weights"]],
    least: Mapping[str, int],
    limit: float,
) -> dict[str, int]:
    """The highest scores over all layers until the next one does not fit; `ranked` falls within each layer."""
    values = np.concatenate([_first_forced(ranked[layer.name], least[layer.name]) for layer in layers])
    costs = np.concatenate([macs[layer.name] for layer in layers])
    owner = np.repeat(np.arange(len(layers)), [layer.weights for layer in layers])
    order = np.argsort(-values, kind="stable")
    kept: Int64[np.ndarray, " kept"] = order[: int(np.searchsorted(np.cumsum(costs[order]), limit, side="right"))]
    counts = np.bincount(owner[kept], minlength=len(layers))
    return {layer.name: int(count) for layer, count in zip(layers, counts, strict=True)}


def _first_forced(ranked: Float64[np.ndarray, " weights"], count: int) -> Float64[np.ndarray, " weights"]:
    forced = ranked.astype(np.float64)
    forced[:count] = np.inf
    return forced
