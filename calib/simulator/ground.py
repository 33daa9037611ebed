"""Uneven ground as a grid of heights, and where the rings of a sensor first meet it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64

from calib.simulator.sensor import Sensor

_FIRST_SAMPLE_M = 1.6
_SAMPLE_RATIO = 1.02
_KEY_STRIDE = 16.0
_AZIMUTHS_AT_ONCE = 192


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """Square maps centred on the car: `height` (m), `albedo`, and `grass` (m), the depth into which beams sink."""

    height: Float32[np.ndarray, "cells cells"]
    albedo: Float32[np.ndarray, "cells cells"]
    grass: Float32[np.ndarray, "cells cells"]
    cell_m: float

    def height_at(
        self, x: Float[np.ndarray, "*points"], y: Float[np.ndarray, "*points"]
    ) -> Float32[np.ndarray, "*points"]:
        """Bilinear height (m); beyond the map the edge continues level."""
        edge = len(self.height) - 1
        column = np.clip(np.asarray(x, dtype=np.float32) * (1 / self.cell_m) + edge / 2, 0, edge - 1e-3)
        row = np.clip(np.asarray(y, dtype=np.float32) * (1 / self.cell_m) + edge / 2, 0, edge - 1e-3)
        left, low = column.astype(np.int32), row.astype(np.int32)
        across, up = column - left, row - low
        flat = self.height.ravel()
        corner = low * len(self.height) + left
        near = flat[corner] * (1 - across) + flat[corner + 1] * across
        corner += len(self.height)
        far = flat[corner] * (1 - across) + flat[corner + 1] * across
        return np.asarray(near + (far - near) * up, dtype=np.float32)

    def cell_at(self, x: Float[np.ndarray, " points"], y: Float[np.ndarray, " points"]) -> Int64[np.ndarray, " points"]:
        """Flat index of the nearest cell, for `albedo` and `grass`."""
        edge = len(self.height) - 1
        column = np.clip(np.rint(x / self.cell_m + edge / 2), 0, edge).astype(np.int64)
        row = np.clip(np.rint(y / self.cell_m + edge / 2), 0, edge).astype(np.int64)
        return row * len(self.height) + column


def cast_ground(
    ground: Ground, sensor: Sensor, origin: Float64[np.ndarray, " 3"], yaw: float
) -> tuple[Float32[np.ndarray, "rings steps"], Float32[np.ndarray, "rings steps"]]:
    """Range (m, infinite for none) and cosine of incidence at which each ray first meets the ground.

    Along one azimuth the ground is a profile of heights over distance; a ring meets it where the running maximum of
    the profile's slope, seen from the sensor, first exceeds the slope of the ring.
    """
    count = int(np.log(sensor.max_range_m / _FIRST_SAMPLE_M) / np.log(_SAMPLE_RATIO)) + 2
    distance = (_FIRST_SAMPLE_M * _SAMPLE_RATIO ** np.arange(count)).astype(np.float32)
    azimuth = (sensor.azimuth + yaw).astype(np.float32)[:, None]
    range_m = np.empty((len(sensor.tangent), len(azimuth)), dtype=np.float32)
    cosine = np.empty_like(range_m)
    for first in range(0, len(azimuth), _AZIMUTHS_AT_ONCE):
        sector = slice(first, first + _AZIMUTHS_AT_ONCE)
        x, y = np.cos(azimuth[sector]), np.sin(azimuth[sector])
        height = ground.height_at(origin[0] + x * distance, origin[1] + y * distance)
        ring = 0
        for rings, lift in sensor.blocks:
            block = slice(ring, ring + rings)
            below = height - np.float32(origin[2] + lift)
            met = _meet_profiles(distance, below, sensor.tangent[block])
            range_m[block, sector], cosine[block, sector] = met
            ring += rings
    return range_m, cosine


def _meet_profiles(
    distance: Float32[np.ndarray, " samples"],
    height: Float32[np.ndarray, "profiles samples"],
    tangent: Float64[np.ndarray, " rings"],
) -> tuple[Float32[np.ndarray, "rings profiles"], Float32[np.ndarray, "rings profiles"]]:
    """Range and cosine where each ring meets each profile of heights relative to the sensor."""
    count = len(distance)
    horizon = np.maximum.accumulate(np.clip(height / distance, -4, 4), axis=1)
    start = np.arange(len(height))[:, None]
    keys, wanted = horizon + start * _KEY_STRIDE, tangent[None, :] + start * _KEY_STRIDE
    after = np.searchsorted(keys.ravel(), wanted.ravel()).reshape(wanted.shape) - start * count
    met = after < count
    after = np.clip(after, 1, count - 1)
    grade = tangent.astype(np.float32)[None, :]
    near, far = distance[after - 1], distance[after]
    low, high = np.take_along_axis(height, after - 1, axis=1), np.take_along_axis(height, after, axis=1)
    below, above = low - near * grade, high - far * grade
    step = np.clip(below / np.where(above == below, np.float32(-1), below - above), 0, 1)
    slope = (high - low) / (far - near)
    rise = np.sqrt(1 + grade * grade)
    cosine = np.clip((slope - grade) / rise / np.sqrt(1 + slope * slope), 0, 1)
    range_m = np.where(met, (near + (far - near) * step) * rise, np.float32(np.inf))
    return range_m.T, cosine.T
