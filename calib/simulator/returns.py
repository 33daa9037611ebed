"""From where a beam lands to what the sensor reports: lost echoes, brightness, noise, its own car."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32

from calib.simulator.cast import Echoes, Pose
from calib.simulator.ground import Ground
from calib.simulator.primitives import CLUTTER, GROUND, OWN_CAR, Primitives
from calib.simulator.sensor import Sensor

_GRAZING_COSINE = 0.028
_EGO_HALF_M = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Returns:
    """Points in the frame of the key sweep's sensor, with the sensor's columns, and the object each belongs to."""

    points: Float32[np.ndarray, "points columns"]
    owner: Int32[np.ndarray, " points"]


def measure(
    sensor: Sensor,
    poses: list[Pose],
    ground: Ground,
    primitives: Primitives,
    echoes: Echoes,
    random: np.random.Generator,
) -> Returns:
    """Points that survive, with noise along the beam and intensity on the sensor's own scale."""
    rays = sensor.directions.shape[1]
    sweep, ray = np.divmod(echoes.ray, rays)
    direction = sensor.directions[:, ray]
    on_ground = echoes.primitive == GROUND
    thing = np.where(on_ground, 0, echoes.primitive)
    turn = np.array([(np.cos(pose.yaw), np.sin(pose.yaw)) for pose in poses], dtype=np.float32)[sweep].T
    direction = np.stack(
        [turn[0] * direction[0] - turn[1] * direction[1], turn[1] * direction[0] + turn[0] * direction[1], direction[2]]
    )
    start = np.array([pose.origin - poses[0].origin for pose in poses], dtype=np.float32)[sweep].T
    start[2] += sensor.lift_m.astype(np.float32)[ray // sensor.azimuth_steps]
    albedo = np.append(primitives.albedo, np.float32(0))[thing] * np.append(primitives.glow, np.float32(1))[thing]
    sink = np.zeros(len(ray), dtype=np.float32)
    rows = np.flatnonzero(on_ground)
    place = start[:2, rows] + echoes.range_m[rows] * direction[:2, rows]
    cell = ground.cell_at(place[0] + np.float32(poses[0].origin[0]), place[1] + np.float32(poses[0].origin[1]))
    albedo[rows] = ground.albedo.ravel()[cell]
    sink[rows] = ground.grass.ravel()[cell]
    kept, brightness = _survive(sensor, echoes, albedo, on_ground, random)
    range_m = echoes.range_m + random.standard_normal(len(ray), dtype=np.float32) * np.float32(sensor.range_noise_m)
    blade = np.abs(random.standard_normal(len(ray), dtype=np.float32)) * sink
    points = start + range_m * direction
    points[2] += np.minimum(blade, 0.5)
    columns = [*points, _stored(sensor, brightness, random)]
    if "timestamp" in sensor.columns:
        columns.append(np.array([pose.lag_s for pose in poses], dtype=np.float32)[sweep])
    owner = np.append(primitives.owner, CLUTTER)[thing].astype(np.int32)
    owner[on_ground] = CLUTTER
    rows = np.flatnonzero(kept & (owner != OWN_CAR))
    table = np.stack(columns, axis=1)[rows]
    owner = owner[rows]
    if sensor.ego_returns:
        table, owner = _with_own_car(sensor, table, owner, random)
    return Returns(points=table, owner=owner)


def _survive(
    sensor: Sensor,
    echoes: Echoes,
    albedo: Float32[np.ndarray, " rays"],
    on_ground: np.ndarray,
    random: np.random.Generator,
) -> tuple[np.ndarray, Float32[np.ndarray, " rays"]]:
    """Which echoes are strong enough, by their signal to noise and the grazing angle on the ground."""
    cosine = np.clip(echoes.cosine, 0.02, 1)
    root = np.sqrt(cosine)
    reflected = albedo * np.where(on_ground, np.sqrt(root), root)
    signal = reflected * root * np.square(sensor.reach_m / np.maximum(echoes.range_m, 1))
    chance = np.clip(0.02 + 1.2 * signal, 0, 0.997)
    chance = np.where(on_ground, chance * np.clip(echoes.cosine / _GRAZING_COSINE, 0, 1), chance)
    kept = random.random(len(cosine), dtype=np.float32) < chance
    return kept, reflected


def _stored(
    sensor: Sensor, reflected: Float32[np.ndarray, " rays"], random: np.random.Generator
) -> Float32[np.ndarray, " rays"]:
    """Intensity on the data set's scale: one gain a frame, speckle a point, whole levels."""
    gain = np.exp(random.uniform(*np.log(sensor.intensity_gain)))
    speckle = np.exp(0.25 * random.standard_normal(len(reflected), dtype=np.float32))
    share = np.clip(reflected * speckle * np.float32(gain), 0, 1)
    levels = np.float32(sensor.intensity_levels)
    return np.asarray(np.rint(share * levels) * np.float32(sensor.intensity_scale / sensor.intensity_levels))


def _with_own_car(
    sensor: Sensor, points: np.ndarray, owner: np.ndarray, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The key sweep keeps the returns of its own roof; loaders cut them out of the earlier sweeps."""
    count = int(sensor.ego_returns * sensor.directions.shape[1])
    radius, course = 0.1 + 0.5 * random.random(count) ** 3, random.uniform(-np.pi, np.pi, count)
    own = np.zeros((count, points.shape[1]), dtype=np.float32)
    own[:, 0], own[:, 1] = radius * np.cos(course), radius * np.sin(course)
    own[:, 2] = random.normal(-0.05, 0.08, count)
    own[:, 3] = np.rint(random.exponential(6.0, count))
    return np.concatenate([own, points]), np.concatenate([np.full(count, CLUTTER, dtype=np.int32), owner])
