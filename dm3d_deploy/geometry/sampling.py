"""Keypoints of a frame: farthest-point sampling (Eldar et al. 1997; PointNet++)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int64

from dm3d_deploy.errors import FrameError

FARTHEST = np.float32(1e10)  # where nothing was taken yet, as OpenPCDet begins (m^2)


def farthest_points(points: Float32[np.ndarray, "points 3"], count: int) -> Int64[np.ndarray, " count"]:
    """Indices of `count` points: the first one, then always the one farthest from all taken (equal: lowest index).

    Squared distances are float32, added x, y, z. Fewer points than `count` are taken all and repeated in that order.
    Raises FrameError without a point.
    """
    if not len(points):
        raise FrameError("no point lies in the model's range.", fix="use a frame with points in the model's range")
    # One row a coordinate, so that every pass below runs over memory in order.
    x, y, z = (np.ascontiguousarray(axis) for axis in points.T)
    nearest = np.full(len(points), FARTHEST)
    distance, along = np.empty_like(nearest), np.empty_like(nearest)
    taken = np.zeros(min(count, len(points)), dtype=np.int64)
    for step in range(1, len(taken)):
        last = taken[step - 1]
        np.subtract(x, x[last], out=distance)
        np.multiply(distance, distance, out=distance)
        for axis in (y, z):
            np.subtract(axis, axis[last], out=along)
            np.multiply(along, along, out=along)
            np.add(distance, along, out=distance)
        np.minimum(nearest, distance, out=nearest)
        taken[step] = nearest.argmax()
    repeated: np.ndarray = np.resize(taken, count)
    return repeated
