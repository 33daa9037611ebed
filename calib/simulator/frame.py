"""One simulated frame: draw a world from a seed, drive the sensor through it, keep what it would have seen."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from calib.simulator.cast import Pose, cast
from calib.simulator.landuse import furnish
from calib.simulator.primitives import OWN_CAR, Material
from calib.simulator.returns import Returns, measure
from calib.simulator.road import draw_ground, draw_road
from calib.simulator.scene import Scene
from calib.simulator.sensor import Sensor, sensor_named
from calib.simulator.traffic import populate
from dm3d_deploy.errors import UsageError
from dm3d_deploy.pointcloud import Boxes3D, PointCloud

_NOISE_MARGIN_M = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedFrame:
    """A cloud and its labels in the sensor frame; labels are 0-based into `CLASS_NAMES`.

    `num_points` counts the points of the cloud that came from each object and lie in its box. Objects without a
    single point are kept: the caller decides how many points make an object visible.
    """

    cloud: PointCloud
    boxes: Boxes3D
    labels: Int64[np.ndarray, " boxes"]
    num_points: Int64[np.ndarray, " boxes"]
    seed: int
    sensor: str


def simulate_frame(
    seed: int, *, sensor: str = "nuscenes32", sweeps: int | None = None, rare: float = 1.0
) -> SimulatedFrame:
    """The frame of that seed, the same bits every time.

    `sweeps` defaults to what the sensor's data set stacks into a frame; `rare` multiplies the share of trucks, buses,
    trailers, construction vehicles and motorcycles. Raises `UsageError` for an unknown sensor, no sweep, a seed or
    share below zero.
    """
    model = sensor_named(sensor)
    count = model.sweeps if sweeps is None else sweeps
    if count < 1:
        raise UsageError(f"a frame of {count} sweeps has no points.", fix="ask for one sweep or more")
    if not rare >= 0:
        raise UsageError(f"the share of rare classes cannot be multiplied by {rare}.", fix="use a factor of 0 or more")
    if seed < 0:
        raise UsageError(f"{seed} is no seed.", fix="use a whole number of 0 or more")
    random = np.random.Generator(np.random.PCG64(seed))
    poses, speed = _drive(model, count, random)
    scene = lay_out(model, poses, random, rare=rare)
    _own_car(scene, model, poses[0])
    objects, primitives = scene.objects(), scene.primitives.table()
    moving = np.concatenate([objects[:, 7:9], [speed, (0.0, 0.0), (0.0, 0.0)]])
    owned = moving[primitives.owner]
    echoes = cast(model, poses, scene.ground, primitives, owned, random)
    seen = measure(model, poses, scene.ground, primitives, echoes, random)
    return SimulatedFrame(
        cloud=PointCloud(points=seen.points, columns=model.columns, source=f"simulated {sensor} frame {seed}"),
        boxes=_boxes(objects, poses[0]),
        labels=scene.labels(),
        num_points=_count(objects, poses[0], seen),
        seed=seed,
        sensor=sensor,
    )


def lay_out(sensor: Sensor, poses: list[Pose], random: np.random.Generator, *, rare: float = 1.0) -> Scene:
    """Draw a street with all that stands and drives in it, clear of the way that the car came."""
    road = draw_road(sensor.forward_rad, random)
    scene = Scene(road, draw_ground(road, random, sensor.tilt_jitter_rad), poses, random)
    populate(scene, density=random.uniform(0.3, 1.1), rare=rare)
    furnish(scene)
    return scene


def _drive(sensor: Sensor, count: int, random: np.random.Generator) -> tuple[list[Pose], tuple[float, float]]:
    """Where the sensor was during each sweep, the key frame first, at constant speed and yaw rate; its velocity."""
    height = sensor.height_m + float(np.clip(random.normal(), -2.5, 2.5)) * sensor.height_jitter_m
    speed = 0.0 if random.random() < 0.25 else random.uniform(1, 14)
    turn_rate = random.normal(0, 0.08) if speed else 0.0
    poses = []
    for sweep in range(count):
        lag = sweep * sensor.sweep_interval_s
        yaw = -turn_rate * lag
        back = -speed * lag
        course = sensor.forward_rad + yaw / 2
        place = np.array([back * math.cos(course), back * math.sin(course), height])
        poses.append(Pose(origin=place, yaw=yaw, lag_s=lag))
    return poses, (speed * math.cos(sensor.forward_rad), speed * math.sin(sensor.forward_rad))


def _own_car(scene: Scene, sensor: Sensor, key: Pose) -> None:
    """The roof below the sensor, which casts a shadow and never shows."""
    back, front, half, drop = sensor.own_car
    x, y = (0.5 * (front - back) * part for part in (math.cos(sensor.forward_rad), math.sin(sensor.forward_rad)))
    roof = (x, y, key.origin[2] - drop - 0.3)
    scene.primitives.box(roof, sensor.forward_rad, (front + back, 2 * half, 0.3), Material(0.2), owner=OWN_CAR)


def _boxes(objects: Float64[np.ndarray, "objects 9"], key: Pose) -> Boxes3D:
    return Boxes3D(
        centre=(objects[:, :3] - key.origin).astype(np.float32),
        size=objects[:, 3:6].astype(np.float32),
        yaw=((objects[:, 6] + np.pi) % (2 * np.pi) - np.pi).astype(np.float32),
        velocity=objects[:, 7:9].astype(np.float32),
    )


def _count(objects: Float64[np.ndarray, "objects 9"], key: Pose, seen: Returns) -> Int64[np.ndarray, " objects"]:
    """Points of each object inside its own box, with a margin for the noise of the range."""
    rows = np.flatnonzero(seen.owner >= 0)
    owner = seen.owner[rows]
    boxes = objects[owner]
    away = seen.points[rows, :3] + key.origin - boxes[:, :3]
    along, across = np.cos(boxes[:, 6]), np.sin(boxes[:, 6])
    local = np.stack([along * away[:, 0] + across * away[:, 1], along * away[:, 1] - across * away[:, 0], away[:, 2]])
    inside = (np.abs(local) <= boxes[:, 3:6].T / 2 + _NOISE_MARGIN_M).all(axis=0)
    return np.bincount(owner[inside], minlength=len(objects)).astype(np.int64)
