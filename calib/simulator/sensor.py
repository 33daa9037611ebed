"""The spinning LiDARs that the simulator imitates: beams, steps, ranges, brightness."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float32, Float64

from dm3d_deploy.errors import UsageError, nearest


@dataclass(frozen=True, kw_only=True)
class Sensor:
    """A regular grid of rays, `elevation_rad` (ascending) by `azimuth_steps`, seen from `height_m` above the road.

    `intensity_gain` is the spread of one brightness factor per frame and `intensity_scale` the largest value that the
    data set stores. `sweeps` is how many sweeps its data set stacks into a frame, `sweep_interval_s` apart.

    `forward_rad` is where the car drives in the sensor's axes. `blocks` are numbers of rings, from the lowest up, and
    how far above the origin their beams leave. `own_car` is the roof that shadows the low rings: how far it reaches
    back, forward and to either side, and how far below the sensor it lies. `ego_returns` is the share of rays of the
    key sweep that its data set keeps as echoes of the own car.
    """

    name: str
    elevation_rad: tuple[float, ...]
    azimuth_steps: int
    forward_rad: float
    blocks: tuple[tuple[int, float], ...]
    own_car: tuple[float, float, float, float]
    height_m: float
    height_jitter_m: float
    tilt_jitter_rad: float
    max_range_m: float
    min_range_m: float
    range_noise_m: float
    reach_m: float
    intensity_gain: tuple[float, float]
    intensity_scale: float
    intensity_levels: int
    sweeps: int
    sweep_interval_s: float
    columns: tuple[str, ...]
    ego_returns: float

    @cached_property
    def tangent(self) -> Float64[np.ndarray, " rings"]:
        """Slope of each ring."""
        tangent: np.ndarray = np.tan(np.asarray(self.elevation_rad))
        return tangent

    @cached_property
    def lift_m(self) -> Float64[np.ndarray, " rings"]:
        """How far above the sensor's origin the beams of each ring leave."""
        counts, lifts = zip(*self.blocks, strict=True)
        return np.repeat(np.array(lifts, dtype=np.float64), counts)

    @cached_property
    def azimuth(self) -> Float64[np.ndarray, " steps"]:
        """Azimuth of each step in the sensor frame, from -pi upwards."""
        step = 2.0 * np.pi / self.azimuth_steps
        return np.asarray(-np.pi + (np.arange(self.azimuth_steps) + 0.5) * step)

    @cached_property
    def directions(self) -> Float32[np.ndarray, "3 rays"]:
        """Unit vectors of all rays, ring by ring, one row for each axis."""
        elevation = np.asarray(self.elevation_rad)[:, None]
        x = np.cos(elevation) * np.cos(self.azimuth)
        y = np.cos(elevation) * np.sin(self.azimuth)
        z = np.broadcast_to(np.sin(elevation), x.shape)
        return np.stack([x.ravel(), y.ravel(), z.ravel()]).astype(np.float32)


def _degrees(*pieces: np.ndarray) -> tuple[float, ...]:
    return tuple(np.deg2rad(np.sort(np.concatenate(pieces))).tolist())


_PANDAR40 = np.concatenate(
    [[15.0, 11.0, 8.0, 5.0, 3.0], np.linspace(2.0, -6.0, 25), -7.0 - np.arange(8), [-19.0, -25.0]]
)

SENSORS = {
    sensor.name: sensor
    for sensor in (
        Sensor(
            name="hdl64",
            elevation_rad=_degrees(np.linspace(2.0, -8.5, 32), np.linspace(-8.95, -24.95, 32)),
            azimuth_steps=2083,
            forward_rad=0.0,
            blocks=((32, 0.11), (32, 0.16)),
            own_car=(1.45, 1.35, 0.85, 0.45),
            height_m=1.73,
            height_jitter_m=0.05,
            tilt_jitter_rad=0.004,
            max_range_m=110.0,
            min_range_m=1.5,
            range_noise_m=0.018,
            reach_m=170.0,
            intensity_gain=(0.9, 1.7),
            intensity_scale=1.0,
            intensity_levels=100,
            sweeps=1,
            sweep_interval_s=0.1,
            columns=("x", "y", "z", "intensity"),
            ego_returns=0.0,
        ),
        Sensor(
            name="nuscenes32",
            elevation_rad=_degrees(np.linspace(10.67, -30.67, 32)),
            azimuth_steps=1086,
            forward_rad=np.pi / 2,
            blocks=((32, 0.0),),
            own_car=(1.5, 1.36, 0.9, 0.59),
            height_m=1.87,
            height_jitter_m=0.12,
            tilt_jitter_rad=0.006,
            max_range_m=105.0,
            min_range_m=1.0,
            range_noise_m=0.02,
            reach_m=100.0,
            intensity_gain=(0.1, 0.45),
            intensity_scale=255.0,
            intensity_levels=255,
            sweeps=10,
            sweep_interval_s=0.05,
            columns=("x", "y", "z", "intensity", "timestamp"),
            ego_returns=0.24,
        ),
        Sensor(
            name="once40",
            elevation_rad=_degrees(_PANDAR40),
            azimuth_steps=1800,
            forward_rad=-np.pi / 2,
            blocks=((40, 0.0),),
            own_car=(1.5, 1.4, 0.8, 0.6),
            height_m=1.75,
            height_jitter_m=0.1,
            tilt_jitter_rad=0.005,
            max_range_m=180.0,
            min_range_m=1.0,
            range_noise_m=0.02,
            reach_m=150.0,
            intensity_gain=(0.001, 0.004),
            intensity_scale=255.0,
            intensity_levels=25500,
            sweeps=1,
            sweep_interval_s=0.1,
            columns=("x", "y", "z", "intensity"),
            ego_returns=0.0,
        ),
    )
}


def sensor_named(name: str) -> Sensor:
    """The sensor of that name; `UsageError` when there is none."""
    if name not in SENSORS:
        raise UsageError(f"there is no simulated sensor '{name}'; {nearest(name, SENSORS)}", fix="use a known sensor")
    return SENSORS[name]
