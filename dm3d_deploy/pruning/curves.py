"""What each layer loses at each pruning ratio: the distortion curves."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float64, Int16

from dm3d_deploy.errors import InternalError, UsageError
from dm3d_deploy.pruning.contracts import Curve, Layer, Pattern
from dm3d_deploy.pruning.macs import macs_of_counts
from dm3d_deploy.pruning.patterns import prune_step, taps_from_native, usable_ratios


def layer_curve(
    layer: Layer,
    weight: Float[np.ndarray, "*shape"],
    gradients: Float[np.ndarray, "samples ..."],
    scores: Float[np.ndarray, "*shape"],
    pattern: Pattern,
    ratios: Float64[np.ndarray, " steps"],
    *,
    kappa: float,
) -> Curve:
    """Distortion and kept MACs of one layer at every ratio that `pattern` can take.

    `weight` and `scores` in native shape; `gradients` holds one row per frame and random-sign sketch, of native shape
    or flat. delta_k = mean over samples of (g_n' dW_k)^2 + kappa ||dW_k||^2, which is dW' H dW for
    H = kappa I + 1/N sum g_n g_n' (DM3D Eq. 10 with the empirical Fisher of Eq. 12), then its running maximum.
    """
    flat = gradients.reshape(len(gradients), -1)
    if weight.shape != layer.shape or flat.shape[1] != layer.weights:
        raise InternalError(
            f"{layer.name}: weight {weight.shape} and gradients {gradients.shape} do not fit {layer.shape}"
        )
    if not flat.any():
        raise UsageError(
            f"The layer {layer.name} received no gradient from {len(flat)} samples: pruning it would look free.",
            fix="keep --lambda-box and --lambda-score above 0, and calibrate on frames that hold points",
        )
    usable = usable_ratios(pattern, ratios)
    steps = prune_step(layer, scores, pattern, usable)
    removed, energy = _removed(weight.ravel().astype(np.float64), flat, steps.ravel(), len(usable))
    per_tap = pruned_counts(layer, steps, len(usable))
    pruned = per_tap.sum(axis=1)
    tap_weights = layer.inputs * layer.outputs
    return Curve(
        layer=layer.name,
        pattern=pattern,
        ratio=pruned / layer.weights,
        distortion=np.maximum.accumulate(np.square(removed).mean(axis=0) + kappa * energy),
        cost=macs_of_counts(layer, tap_weights - per_tap),
    )


def _removed(
    weight: Float64[np.ndarray, " weights"],
    gradients: Float[np.ndarray, "samples weights"],
    steps: Int16[np.ndarray, " weights"],
    points: int,
) -> tuple[Float64[np.ndarray, "samples points"], Float64[np.ndarray, " points"]]:
    """g_n' dW and ||dW||^2 at every point: sums over the weights of each step, then prefix sums."""
    bins = steps.astype(np.intp)
    sums = np.empty((len(gradients), points))
    for row, gradient in zip(sums, gradients, strict=True):
        row[:] = np.bincount(bins, weights=gradient * weight, minlength=points + 1)[:points]
    energy = np.bincount(bins, weights=weight * weight, minlength=points + 1)[:points]
    return np.cumsum(sums, axis=1), np.cumsum(energy)


def pruned_counts(layer: Layer, steps: Int16[np.ndarray, "*shape"], points: int) -> np.ndarray:
    """Weights of each tap that are pruned at each point: [points, taps]."""
    taps = taps_from_native(layer, steps).reshape(layer.taps, -1)
    counts = np.stack([np.bincount(tap, minlength=points + 1)[:points] for tap in taps], axis=1)
    return np.cumsum(counts, axis=0)
