"""Which weights matter least."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float64

from dm3d_deploy.errors import InternalError


def scores(
    weight: Float[np.ndarray, "*shape"], mean_square_gradient: Float[np.ndarray, "*shape"], *, damping: float = 1.0
) -> Float64[np.ndarray, "*shape"]:
    """Ranking score of every weight of one layer: |w| * sqrt(E g^2 + damping * mean(E g^2)), native shape.

    `mean_square_gradient` is E g^2 over the gradient samples; the mean is taken over the layer. Damping 0 is DM3D's
    Taylor score with a root mean square, a large damping ranks by magnitude. In between, a weight that these few
    frames never excite is not free.
    """
    if weight.shape != mean_square_gradient.shape or weight.size == 0:
        raise InternalError(f"weight {weight.shape} and mean square gradient {mean_square_gradient.shape} disagree")
    square = mean_square_gradient.astype(np.float64)
    if not (np.isfinite(weight).all() and np.isfinite(square).all()) or float(square.min()) < 0 or damping < 0:
        raise InternalError("ranking needs finite weights, and mean squares and damping that are not negative")
    score: np.ndarray = np.abs(weight.astype(np.float64)) * np.sqrt(square + damping * square.mean())
    return score
