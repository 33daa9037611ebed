"""The road that a scene is built along, and the uneven land around it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from calib.simulator.ground import Ground

CELL_M = 0.25
HALF_MAP_M = 80.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Road:
    """A straight road in its own frame: u along it, v to its left, the ego car at u = v = 0.

    `heading` turns the road frame into the ego frame. Between the kerbs `right` < v < `left` lie the lanes and, where
    `parking` says so, a strip of parked cars. `junction` is the u of a crossing road of half width `crossing_half`.
    """

    heading: float
    lanes: int
    lane_m: float
    middle: float
    right: float
    left: float
    parking: tuple[bool, bool]
    parking_m: float
    pavement_m: float
    kerb_m: float
    junction: float | None
    crossing_half: float

    def place(self, u: float, v: float) -> tuple[float, float]:
        """Road frame to ego frame."""
        along, across = math.cos(self.heading), math.sin(self.heading)
        return along * u - across * v, across * u + along * v

    def kerb(self, side: int) -> float:
        """The v of the kerb on the right (-1) or left (+1)."""
        return self.left if side > 0 else self.right


def draw_road(forward_rad: float, random: np.random.Generator) -> Road:
    """A road of one to three lanes a direction, mostly along the way the car looks, seen from one of its lanes."""
    lanes = int(random.choice([1, 2, 3], p=[0.68, 0.24, 0.08]))
    lane_m = float(random.uniform(2.5, 3.5))
    parking = (bool(random.random() < 0.5), bool(random.random() < 0.5))
    parking_m = 2.2
    middle = float((random.integers(0, lanes) + 0.5) * lane_m)
    half = lanes * lane_m
    return Road(
        heading=float(
            forward_rad + random.normal(0, 0.05) if random.random() < 0.85 else random.uniform(-math.pi, math.pi)
        ),
        lanes=lanes,
        lane_m=lane_m,
        middle=middle,
        right=middle - half - parking_m * parking[0],
        left=middle + half + parking_m * parking[1],
        parking=parking,
        parking_m=parking_m,
        pavement_m=float(random.uniform(0.5, 3.8)),
        kerb_m=float(random.uniform(0.03, 0.15)),
        junction=float(random.uniform(12, 45) * random.choice([-1, 1])) if random.random() < 0.45 else None,
        crossing_half=float(random.uniform(4, 8)),
    )


def draw_ground(road: Road, random: np.random.Generator, tilt_rad: float) -> Ground:
    """Slopes, swells, kerbs, banks and rough verges; zero height under the car."""
    nodes = np.arange(-HALF_MAP_M, HALF_MAP_M + CELL_M / 2, CELL_M)
    x, y = nodes[None, :].astype(np.float32), nodes[:, None].astype(np.float32)
    along, across = np.float32(math.cos(road.heading)), np.float32(math.sin(road.heading))
    u, v = along * x + across * y, along * y - across * x
    beside = np.maximum(road.right - v, v - road.left)
    if road.junction is not None:
        beside = np.minimum(beside, np.abs(u - np.float32(road.junction)) - np.float32(road.crossing_half))
    height = np.float32(random.normal(0, tilt_rad)) * x + np.float32(random.normal(0, tilt_rad)) * y
    height += _waves(nodes, random, count=4, wavelength_m=(25, 80), amplitude_m=random.uniform(0.01, 0.07))
    height += np.float32(road.kerb_m) * np.clip(beside / 0.15, 0, 1)
    wild = np.clip((beside - np.float32(random.uniform(0.5, 3))) / 2, 0, 1)
    rough = _waves(nodes, random, count=4, wavelength_m=(4, 15), amplitude_m=0.06 * random.random() ** 2)
    rough += _waves(nodes, random, count=4, wavelength_m=(0.7, 2.5), amplitude_m=0.03 * random.random() ** 2)
    height += wild * rough
    for side in (-1, 1):
        start, width = random.uniform(1, 9), random.uniform(3, 15)
        grade = random.uniform(-0.15, 0.5) if random.random() < 0.5 else random.normal(0, 0.02)
        bank = np.clip(beside - np.float32(start), 0, np.float32(width)) * np.float32(grade)
        height += np.where((v - np.float32(road.middle)) * side > 0, bank, np.float32(0))
    centre = len(nodes) // 2
    height -= height[centre, centre]
    grassy = np.where(
        wild > 0.5, np.float32(random.uniform(0.0, 0.08) if random.random() < 0.75 else 0.0), np.float32(0)
    )
    asphalt, verge = random.uniform(0.12, 0.3), random.uniform(0.2, 0.45)
    patches = 1 + _waves(nodes, random, count=3, wavelength_m=(4, 15), amplitude_m=0.12)
    albedo = np.where(beside > 0, np.float32(verge), np.float32(asphalt)) * patches
    return Ground(height=height.astype(np.float32), albedo=albedo.astype(np.float32), grass=grassy, cell_m=CELL_M)


def _waves(
    nodes: np.ndarray, random: np.random.Generator, *, count: int, wavelength_m: tuple[float, float], amplitude_m: float
) -> np.ndarray:
    """A sum of plane waves; each is a sum of two outer products, which is what makes a large map cheap."""
    total = np.zeros((len(nodes), len(nodes)), dtype=np.float32)
    for _ in range(count):
        wave = 2 * math.pi / random.uniform(*wavelength_m)
        course, phase = random.uniform(0, 2 * math.pi, 2)
        along = (wave * math.cos(course) * nodes + phase).astype(np.float32)[None, :]
        across = (wave * math.sin(course) * nodes).astype(np.float32)[:, None]
        total += np.sin(along) * np.cos(across) + np.cos(along) * np.sin(across)
    return total * np.float32(amplitude_m)
