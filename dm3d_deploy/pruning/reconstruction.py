"""Least squares for the weights that a mask keeps: what a layer should compute, from what it now sees.

As optimal brain compression and SparseGPT do for one layer at a time, with the mask given: of every output channel the
kept weights are chosen anew, so that the layer's output on calibration inputs comes closest to the dense model's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Integer

from dm3d_deploy.errors import InternalError

BLOCK = 256  # rows of a triangle that are multiplied at once


@dataclass(slots=True)
class Moments:
    """Weighted sums over rows of inputs x and wanted outputs y, enough for every least-squares problem between them.

    `mass` is the sum of the weights.
    """

    mass: float
    x: Float64[np.ndarray, " inputs"]
    y: Float64[np.ndarray, " outputs"]
    xx: Float[np.ndarray, "inputs inputs"]
    xy: Float[np.ndarray, "inputs outputs"]

    @classmethod
    def empty(cls, inputs: int, outputs: int) -> Moments:
        """Sums over nothing."""
        return cls(0.0, np.zeros(inputs), np.zeros(outputs), np.zeros((inputs, inputs)), np.zeros((inputs, outputs)))

    @classmethod
    def of(
        cls,
        x: Float[np.ndarray, "rows inputs"],
        y: Float[np.ndarray, "rows outputs"],
        weights: Float[np.ndarray, " rows"],
    ) -> Moments:
        """Sums over rows, each as often as its weight (not negative) says; products in the arrays' own precision."""
        if not len(x) == len(y) == len(weights):
            raise InternalError(f"{len(x)} rows of inputs, {len(y)} of outputs and {len(weights)} weights differ")
        roots = np.sqrt(weights)[:, None]
        rooted, wanted = x * roots, y * roots
        return cls(
            mass=float(weights.sum(dtype=np.float64)),
            x=(rooted * roots).sum(axis=0, dtype=np.float64),
            y=(wanted * roots).sum(axis=0, dtype=np.float64),
            xx=rooted.T @ rooted,  # one array times itself costs half of two arrays' product
            xy=rooted.T @ wanted,
        )

    def add(self, other: Moments) -> None:
        """Add the sums over other rows, in the precision of these."""
        self.mass += other.mass
        for own, more in ((self.x, other.x), (self.y, other.y), (self.xx, other.xx), (self.xy, other.xy)):
            own += more


@dataclass(frozen=True, slots=True, kw_only=True)
class Refit:
    """New weights, zero where the mask is, and what to add to each output."""

    weight: Float64[np.ndarray, "inputs outputs"]
    offset: Float64[np.ndarray, " outputs"]


def refit(
    moments: Moments,
    weight: Float[np.ndarray, "inputs outputs"],
    keep: Bool[np.ndarray, "inputs outputs"],
    *,
    damping: float,
) -> Refit:
    """Minimise mean ||y - x W - offset||^2 + damping * d * ||W - weight||^2 over the kept entries of each column of W.

    Means are weighted; d is the mean variance of the inputs, so that `damping` has no unit: it holds weights near
    where they were in directions that the rows do not excite. Columns of equal masks share one factorisation.
    """
    if moments.mass <= 0 or damping <= 0 or not weight.shape == keep.shape == moments.xy.shape:
        raise InternalError(
            f"weights {weight.shape}, masks {keep.shape}, rows of mass {moments.mass:g}, {moments.xy.shape}: no "
            f"least-squares problem with damping {damping:g}"
        )
    mean_x, mean_y = moments.x / moments.mass, moments.y / moments.mass
    gram, ridge = _centred(moments, damping)
    cross = moments.xy / moments.mass - np.outer(mean_x, mean_y)
    found = np.where(keep, weight.astype(np.float64), 0.0)
    masks, group_of = np.unique(keep, axis=1, return_inverse=True)

    def solve(group: int) -> None:
        kept, columns = np.flatnonzero(masks[:, group]), np.flatnonzero(group_of.ravel() == group)
        if not len(kept):
            return
        square = gram[np.ix_(kept, kept)]
        start = found[np.ix_(kept, columns)]
        wanted = cross[np.ix_(kept, columns)] - square @ start
        square[np.diag_indices(len(kept))] += ridge
        found[np.ix_(kept, columns)] = start + np.linalg.solve(square, wanted)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # groups do not touch each other, so no order shows
        list(pool.map(solve, range(masks.shape[1])))
    return Refit(weight=found, offset=mean_y - mean_x @ found)


def shares_left(
    moments: Moments,
    weight: Float[np.ndarray, "inputs columns"],
    steps: Integer[np.ndarray, "inputs columns"],
    points: int,
    *,
    damping: float,
) -> Float64[np.ndarray, " points"]:
    """Of the squared change that pruning makes in a layer's outputs, the share that `refit` leaves, at every point.

    The weight w_i of a column goes at the point `steps`, never at `points`; moments are of the dense inputs x. Without
    a refit the change is E (x_P'w_P)^2 over the pruned P. With it, w_P'(C_PP - C_PK C_KK^-1 C_KP)w_P over the kept K,
    C the covariance plus the refit's ridge: with the weights in the order in which they go, the last first, and
    C = LL', that is the sum of (L'w)_i^2 over P, so one factorisation prices all points. Both are summed over the
    columns. 1 where nothing changes.
    """
    if moments.mass <= 0 or damping <= 0 or not weight.shape == steps.shape or len(weight) != len(moments.x):
        raise InternalError(
            f"weights {weight.shape}, steps {steps.shape}, {len(moments.x)} inputs of mass {moments.mass:g}: no shares "
            f"with damping {damping:g}"
        )
    double, ridge = _centred(moments, damping)
    ridge = max(ridge, float(np.finfo(np.float32).eps * np.trace(moments.xx) / moments.mass))  # what sums cannot tell
    double[np.diag_indices(len(double))] += ridge
    gram, mean = double.astype(np.float32), (moments.x / moments.mass).astype(np.float32)

    ways, way_of = np.unique(steps, axis=1, return_inverse=True)  # columns of one tile go alike

    def changes(way: int) -> Float64[np.ndarray, "2 points"]:
        last_first = np.argsort(-ways[:, way].astype(np.int64), kind="stable")
        gone = np.searchsorted(-ways[last_first, way].astype(np.int64), -np.arange(points), side="left")
        square = gram[np.ix_(last_first, last_first)]
        factor = _factor(square, lambda: double[np.ix_(last_first, last_first)])
        total = np.zeros((2, points))
        for column in np.flatnonzero(way_of.ravel() == way):
            w = weight[last_first, column].astype(np.float32)
            spread = w * ((np.diag(square) - np.float32(ridge)) * w + 2 * _behind_diagonal(square, w))
            total[0] += _tails(spread)[gone] + np.square(_tails(w * mean[last_first])[gone])
            total[1] += _tails(np.square(factor.T @ w))[gone]
        return total

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        masked, left = np.sum(list(pool.map(changes, range(ways.shape[1]))), axis=0)
    return np.asarray(np.minimum(np.divide(left, masked, out=np.ones(points), where=masked > 0), 1.0))


def _centred(moments: Moments, damping: float) -> tuple[Float64[np.ndarray, "inputs inputs"], float]:
    """The inputs' covariance, and the ridge that `damping` means beside it."""
    mean = moments.x / moments.mass
    gram = moments.xx / moments.mass - np.outer(mean, mean)
    return gram, damping * max(float(np.trace(gram)) / len(gram), float(np.finfo(np.float32).tiny))


def _tails(values: Float[np.ndarray, " n"]) -> Float64[np.ndarray, " more"]:
    """Sums from each place to the end, and the 0 behind it."""
    return np.append(np.cumsum(values[::-1], dtype=np.float64)[::-1], 0.0)


def _behind_diagonal(square: Float[np.ndarray, "n n"], vector: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The strictly upper triangle times a vector, without a copy of the triangle."""
    found = np.empty_like(vector)
    for start in range(0, len(vector), BLOCK):
        stop = start + BLOCK
        found[start:stop] = np.triu(square[start:stop, start:stop], 1) @ vector[start:stop]
        found[start:stop] += square[start:stop, stop:] @ vector[stop:]
    return found


def _factor(
    single: Float[np.ndarray, "n n"], double: Callable[[], Float64[np.ndarray, "n n"]]
) -> Float[np.ndarray, "n n"]:
    """The lower Cholesky factor in single precision, half the time; in double where rounding leaves none."""
    try:
        return np.linalg.cholesky(single)
    except np.linalg.LinAlgError:
        return np.linalg.cholesky(double())
