"""What lines a street: plots of houses, hedges, thickets, woods and open land, chosen side by side."""

from __future__ import annotations

import math

import numpy as np

from calib.simulator.clutter import building, clump, hedge, junk, pole, rail, tree, wall
from calib.simulator.primitives import Material
from calib.simulator.scene import Scene

_END_M = 72.0
_USES = ("terrace", "gardens", "hedge", "thicket", "wood", "yard", "open")
# share of each use along one side of a street, by the character of that side
_CHARACTERS = (
    (0.30, (0.78, 0.10, 0.05, 0.00, 0.00, 0.05, 0.02)),
    (0.28, (0.15, 0.55, 0.20, 0.05, 0.00, 0.03, 0.02)),
    (0.22, (0.00, 0.05, 0.40, 0.40, 0.10, 0.00, 0.05)),
    (0.12, (0.00, 0.00, 0.10, 0.30, 0.50, 0.00, 0.10)),
    (0.08, (0.05, 0.05, 0.05, 0.25, 0.15, 0.15, 0.30)),
)


def furnish(scene: Scene) -> None:
    """Line both sides of the road, then scatter poles, street trees and junk."""
    random, road = scene.random, scene.road
    if random.random() < 0.15:
        rail(scene, road.middle, -_END_M, _END_M)
    for side in (-1, 1):
        character = int(random.choice(len(_CHARACTERS), p=[share for share, _ in _CHARACTERS]))
        weights = np.array(_CHARACTERS[character][1])
        setback = road.pavement_m * (1.0 if random.random() < 0.7 else 0.3)
        if character >= 2 and random.random() < 0.4:
            rail(scene, road.kerb(side) + side * 0.5, -_END_M, _END_M)
        u = -_END_M
        while u < _END_M:
            length = random.uniform(7, 24)
            if road.junction is None or abs(u + length / 2 - road.junction) > length / 2 + road.crossing_half:
                use = _USES[int(random.choice(len(_USES), p=weights))]
                _fill(scene, use, u + length / 2, road.kerb(side) + side * setback, length, side)
            u += length + (random.exponential(3.0) if random.random() < 0.4 else 0.0)
        _scatter(scene, side)


def _fill(scene: Scene, use: str, u: float, v: float, length: float, side: int) -> None:
    random = scene.random
    if use == "terrace":
        size = length, random.uniform(7, 14), random.uniform(4, 15)
        retreat = random.uniform(0, 1.0)
        if not building(scene, u, v + side * retreat, size, side):
            building(scene, u, v + side * (retreat + random.uniform(4, 10)), size, side)
    elif use == "gardens":
        _garden(scene, u, v, length, side)
    elif use == "hedge":
        hedge(scene, u, v + side * random.uniform(0.3, 2.5), length, random.uniform(0.7, 3.0))
        _grow(scene, u, v + side * 3, length, side, shrubs=0.15, trees=0.15, depth=8)
    elif use == "thicket":
        _grow(scene, u, v, length, side, shrubs=1.1, trees=0.2, depth=9)
    elif use == "wood":
        _grow(scene, u, v, length, side, shrubs=0.5, trees=0.6, depth=18)
    elif use == "yard":
        for _ in range(random.integers(2, 8)):
            junk(scene, u + random.uniform(-0.5, 0.5) * length, v + side * random.uniform(0, 12))
        building(scene, u, v + side * random.uniform(10, 20), (length, 10, random.uniform(3, 9)), side)
    else:
        _grow(scene, u, v, length, side, shrubs=0.08, trees=0.03, depth=25)


def _garden(scene: Scene, u: float, v: float, length: float, side: int) -> None:
    """A house behind a front garden with a wall, fence or hedge, shrubs, perhaps a car in the drive."""
    random = scene.random
    depth = random.uniform(2.5, 9)
    house = length * random.uniform(0.55, 0.95), random.uniform(7, 12), random.uniform(3, 8)
    if random.random() < 0.35 and depth > 4.5:
        drive = u + random.choice([-0.4, 0.4]) * length
        scene.add("car", drive, v + side * 3.2, side * math.pi / 2 + random.normal(0, 0.05))
    building(scene, u + random.normal(0, 0.05) * length, v + side * depth, house, side)
    front, gate = random.random(), random.uniform(0.6, 0.95)
    if front < 0.35:
        hedge(scene, u, v + side * 0.6, gate * length, random.uniform(0.6, 2.0))
    elif front < 0.6:
        stone = Material(random.uniform(0.2, 0.6))
        wall(scene, u, v + side * 0.15, gate * length, random.uniform(0.4, 2.0), stone, thick=0.25)
    elif front < 0.85:
        bars = Material(random.uniform(0.2, 0.5), solid=random.uniform(0.25, 1.0))
        wall(scene, u, v + side * 0.15, gate * length, random.uniform(0.8, 1.8), bars, thick=0.08)
    _grow(scene, u, v + side, length, side, shrubs=0.3, trees=0.12, depth=depth)
    if random.random() < 0.4:
        junk(scene, u + random.uniform(-0.5, 0.5) * length, v + side * random.uniform(1, depth))


def _grow(
    scene: Scene, u: float, v: float, length: float, side: int, *, shrubs: float, trees: float, depth: float
) -> None:
    """Shrubs and trees, so many for each metre of road, thinning out away from it."""
    random = scene.random
    for _ in range(random.poisson(shrubs * length)):
        away = depth * random.beta(1.0, 2.0)
        radius = random.uniform(0.25, 1.0) + 0.08 * away
        clump(scene, u + random.uniform(-0.5, 0.5) * length, v + side * (away + 0.5 * radius), radius)
    for _ in range(random.poisson(trees * length)):
        away = depth * random.beta(1.0, 1.5)
        tree(scene, u + random.uniform(-0.5, 0.5) * length, v + side * away, low=random.random() < 0.35)


def _scatter(scene: Scene, side: int) -> None:
    random, road = scene.random, scene.road
    edge = road.kerb(side)
    for _ in range(random.poisson(9)):
        pole(scene, random.uniform(-60, 60), edge + side * random.uniform(0.3, 2.5))
    if random.random() < 0.5:
        pitch, offset = random.uniform(7, 15), random.uniform(0.6, 1.6)
        for place in range(int(2 * _END_M / pitch)):
            if random.random() < 0.8:
                tree(scene, place * pitch - _END_M, edge + side * offset, low=False)
    for _ in range(random.poisson(5)):
        junk(scene, random.uniform(-50, 50), edge + side * random.uniform(0.8, 14))
