"""Who is in the street: traffic, parked rows, people, two-wheelers, works."""

from __future__ import annotations

import math

import numpy as np

from calib.simulator.road import Road
from calib.simulator.scene import REACH_M, Scene

_MOVING = (
    ("car", 0.74),
    ("truck", 0.07),
    ("bus", 0.05),
    ("trailer", 0.03),
    ("construction_vehicle", 0.02),
    ("motorcycle", 0.05),
    ("bicycle", 0.04),
)
_RARE = ("truck", "bus", "trailer", "construction_vehicle", "motorcycle")
_SPACING_M = {"car": 7.0, "truck": 9.0, "bus": 12.0, "trailer": 13.0, "construction_vehicle": 9.0}


def populate(scene: Scene, *, density: float, rare: float) -> None:
    """Fill the street; `rare` multiplies the share of the vehicles in `_RARE`."""
    weights = np.array([share * (rare if name in _RARE else 1.0) for name, share in _MOVING])
    weights /= weights.sum()
    _lanes(scene, weights, density)
    if scene.road.junction is not None:
        _crossing_lanes(scene, scene.road.junction, weights, density)
    for side in (-1, 1):
        if scene.road.parking[side > 0]:
            _parked_row(scene, side)
    _parking_lots(scene, density)
    _works(scene, density * math.sqrt(rare))
    _people(scene, density)
    _two_wheelers(scene, density, rare)


def _draw_vehicle(scene: Scene, weights: np.ndarray) -> str:
    return _MOVING[int(scene.random.choice(len(_MOVING), p=weights))][0]


def _ridden(scene: Scene, name: str) -> tuple[float, float, float]:
    """Size of a two-wheeler with its rider."""
    length, width = (2.1, 0.8) if name == "motorcycle" else (1.75, 0.6)
    random = scene.random
    return length * random.uniform(0.9, 1.1), width * random.uniform(0.85, 1.15), float(random.normal(1.7, 0.08))


def _drive(scene: Scene, name: str, u: float, v: float, yaw: float, speed: float) -> None:
    size = _ridden(scene, name) if name in ("motorcycle", "bicycle") else None
    scene.add(name, u, v, yaw, speed=min(speed, 6.0) if name == "bicycle" else speed, size=size)


def _lanes(scene: Scene, weights: np.ndarray, density: float) -> None:
    road, random = scene.road, scene.random
    for lane in range(2 * road.lanes):
        v = road.middle + (lane - road.lanes + 0.5) * road.lane_m
        yaw = 0.0 if v < road.middle else math.pi
        spacing = random.choice([7.0, 14.0, 30.0, 80.0]) / density
        speed = 0.0 if random.random() < 0.4 else random.uniform(2, 14)
        u = -REACH_M + random.uniform(0, 10)
        while u < REACH_M:
            name = _draw_vehicle(scene, weights)
            own_speed = max(0.0, speed * random.uniform(0.8, 1.2))
            _drive(scene, name, u, v + random.normal(0, 0.25), yaw + random.normal(0, 0.03), own_speed)
            u += _SPACING_M.get(name, 5.0) + random.exponential(spacing)


def _crossing_lanes(scene: Scene, junction: float, weights: np.ndarray, density: float) -> None:
    random, half = scene.random, scene.road.crossing_half
    for across, yaw in ((0.45 * half, math.pi / 2), (-0.45 * half, -math.pi / 2)):
        v = -REACH_M
        while v < REACH_M:
            name = _draw_vehicle(scene, weights)
            speed = 0.0 if random.random() < 0.5 else random.uniform(2, 8)
            _drive(scene, name, junction + across, v, yaw + random.normal(0, 0.05), speed)
            v += _SPACING_M.get(name, 5.0) + random.exponential(14.0 / density)


def _parked_row(scene: Scene, side: int) -> None:
    road, random = scene.road, scene.random
    v = road.kerb(side) - side * road.parking_m / 2
    filled, u = random.uniform(0.3, 0.95), -REACH_M
    while u < REACH_M:
        if random.random() < filled:
            name = ("car", "truck", "motorcycle")[int(random.choice(3, p=[0.92, 0.05, 0.03]))]
            yaw = (0.0 if random.random() < 0.7 else math.pi) + random.normal(0, 0.03)
            scene.add(name, u, v + random.normal(0, 0.12), yaw, slack=0.85)
        u += 5.4 + random.exponential(0.6)


def _parking_lots(scene: Scene, density: float) -> None:
    road, random = scene.road, scene.random
    for _ in range(random.poisson(0.7 * density)):
        side = 1 if random.random() < 0.5 else -1
        start, pitch = random.uniform(-REACH_M, REACH_M), random.uniform(2.5, 2.9)
        v = road.kerb(side) + side * (road.pavement_m + random.uniform(4, 20))
        for place in range(random.integers(3, 12)):
            if random.random() < 0.75:
                yaw = math.pi / 2 * random.choice([-1, 1]) + random.normal(0, 0.04)
                scene.add("car", start + place * pitch, v, yaw, slack=0.8)


def _people(scene: Scene, density: float) -> None:
    road, random = scene.road, scene.random
    for _ in range(random.poisson(11 * density)):
        u, v = _beside_road(scene, road)
        if random.random() < 0.15:
            v = random.uniform(road.right, road.left)
        course = random.uniform(-math.pi, math.pi) if random.random() < 0.4 else random.choice([0.0, math.pi])
        speed = 0.0 if random.random() < 0.35 else random.uniform(0.5, 1.8)
        for _ in range(random.choice([1, 2, 3, 5], p=[0.55, 0.25, 0.15, 0.05])):
            yaw = course + random.normal(0, 0.25)
            scene.add("pedestrian", u + random.normal(0, 0.7), v + random.normal(0, 0.6), yaw, speed=speed)


def _beside_road(scene: Scene, road: Road) -> tuple[float, float]:
    random = scene.random
    side = 1 if random.random() < 0.5 else -1
    u = random.uniform(-REACH_M, REACH_M) * random.choice([0.5, 1.0])
    return u, road.kerb(side) + side * random.uniform(0.4, max(1.2, road.pavement_m))


def _two_wheelers(scene: Scene, density: float, rare: float) -> None:
    road, random = scene.road, scene.random
    for name, mean in (("bicycle", 4.0), ("motorcycle", 1.6 * math.sqrt(rare))):
        for _ in range(random.poisson(mean * density)):
            side = 1 if random.random() < 0.5 else -1
            inward = random.uniform(0.4, 1.5) if random.random() < 0.5 else -random.uniform(0.5, 2.0)
            u = random.uniform(-REACH_M, REACH_M) * random.choice([0.5, 1.0])
            v = road.kerb(side) - side * inward
            yaw = random.choice([0.0, math.pi]) + random.normal(0, 0.2)
            if random.random() < 0.55:
                scene.add(name, u, v, yaw, speed=random.uniform(2, 6), size=_ridden(scene, name))
            else:
                for _ in range(random.choice([1, 1, 3])):
                    scene.add(name, u, v, yaw + random.normal(0, 0.1) + math.pi / 2 * random.integers(0, 2), slack=0.8)
                    u += random.uniform(0.7, 1.2)


def _works(scene: Scene, density: float) -> None:
    """Rows of cones and barriers, and at times the machine behind them."""
    road, random = scene.road, scene.random
    for name, chance, spacing, across in (
        ("traffic_cone", 0.45, (1.5, 5.0), 0.2),
        ("barrier", 0.4, (2.4, 3.2), 0.1),
    ):
        if random.random() >= chance * density:
            continue
        u, v, pitch = random.uniform(-40, 30), random.uniform(road.right, road.left), random.uniform(*spacing)
        drift = random.normal(0, 0.05)
        for place in range(random.integers(3, 13)):
            yaw = math.pi / 2 + random.normal(0, 0.08)
            scene.add(name, u + place * pitch, v + place * pitch * drift + random.normal(0, across), yaw, slack=0.7)
        if random.random() < 0.5:
            side = 1 if v > road.middle else -1
            yaw = random.uniform(-math.pi, math.pi)
            scene.add("construction_vehicle", u + random.uniform(0, 15), v + side * random.uniform(2, 5), yaw)
