"""Everything that is not an object: walls, hedges, trees, poles, junk. All places are in the road frame."""

from __future__ import annotations

import math

from calib.simulator.primitives import Material
from calib.simulator.scene import Scene


def building(scene: Scene, u: float, v: float, size: tuple[float, float, float], side: int) -> bool:
    """A block whose front faces the road, with bays, steps, pipes and sills before it; false when there is no room."""
    length, depth, height = size
    if not scene.is_free_strip(u, v + side * depth / 2, length, depth):
        return False
    random, yaw = scene.random, scene.road.heading
    x, y, z = scene.foot(u, v + side * depth / 2)
    wall = Material(random.uniform(0.15, 0.6))
    scene.primitives.box((x, y, z - 2), yaw, (length, depth, height + 2), wall)
    if random.random() < 0.5:
        ridge = (length, 0.3) if random.random() < 0.7 else (0.3, depth)
        roof = (length + 0.6, depth + 0.8)
        scene.primitives.frustum((x, y, z + height), yaw, roof, ridge, random.uniform(1.5, 4), Material(0.25))
    for _ in range(random.poisson(0.25 * length)):
        relief = random.uniform(0.15, 2.0), random.uniform(0.15, 0.9), random.uniform(0.3, 3.0)
        x, y, z = scene.foot(u + random.uniform(-0.5, 0.5) * length, v)
        raised = z + random.choice([0.0, 0.0, random.uniform(0.5, 3.0)])
        scene.primitives.box((x, y, raised), yaw, relief, Material(random.uniform(0.1, 0.7)))
    return True


def wall(scene: Scene, u: float, v: float, length: float, height: float, material: Material, *, thick: float) -> bool:
    """A wall, fence or hedge core in pieces that follow the ground; false when there is no room."""
    if not scene.is_free_strip(u, v, length, thick):
        return False
    pieces = max(1, round(length / 6))
    for piece in range(pieces):
        x, y, z = scene.foot(u + ((piece + 0.5) / pieces - 0.5) * length, v)
        size = length / pieces * 1.02, thick, height + 0.3
        scene.primitives.box((x, y, z - 0.3), scene.road.heading, size, material)
    return True


def hedge(scene: Scene, u: float, v: float, length: float, height: float) -> None:
    """A clipped core with an uneven surface of clumps."""
    random = scene.random
    thick = random.uniform(0.5, 1.4)
    leaf = Material(random.uniform(0.25, 0.5), depth_m=random.uniform(0.05, 0.25))
    if not wall(scene, u, v, length, height, leaf, thick=thick):
        return
    for _ in range(int(length * random.uniform(0.2, 0.6))):
        x, y, z = scene.foot(u + random.uniform(-0.5, 0.5) * length, v + random.normal(0, 0.3 * thick))
        radii = random.uniform(0.3, 0.9), random.uniform(0.3, 0.8), random.uniform(0.2, 0.6)
        top = z + height * random.uniform(0.3, 1.05)
        scene.primitives.ellipsoid((x, y, top), random.uniform(0, 3), radii, leaf)


def clump(scene: Scene, u: float, v: float, radius: float) -> bool:
    """One ragged shrub: balls of leaves of many sizes within a radius; false when there is no room."""
    random = scene.random
    x, y, z = scene.foot(u, v)
    if not scene.is_free(x, y, radius):
        return False
    leaf = Material(random.uniform(0.2, 0.5), depth_m=random.uniform(0.1, 0.6), solid=random.uniform(0.6, 1.0))
    tall = radius * random.uniform(0.6, 2.0)
    for _ in range(random.integers(2, 7)):
        size, shift = random.uniform(0.25, 0.75) * radius, 0.4 * radius
        place = x + random.normal(0, shift), y + random.normal(0, shift), z + tall * random.uniform(0.15, 0.9)
        radii = size * random.uniform(0.6, 1.4), size * random.uniform(0.6, 1.4), size * random.uniform(0.6, 1.3)
        scene.primitives.ellipsoid(place, random.uniform(0, 3), radii, leaf)
    return True


def tree(scene: Scene, u: float, v: float, *, low: bool) -> None:
    """A trunk with a crown of one to four balls, or a conifer; a low tree's leaves begin at knee height."""
    random = scene.random
    x, y, z = scene.foot(u, v)
    trunk, crown = random.uniform(0.06, 0.3), random.uniform(0.8, 1.8) if low else random.uniform(1.3, 3.3)
    if not scene.is_free(x, y, 0.8 * crown if low else trunk):
        return
    stem = random.uniform(0.3, 0.9) if low else random.uniform(1.6, 3.5)
    leaf = Material(random.uniform(0.25, 0.5), depth_m=random.uniform(0.1, 0.8), solid=random.uniform(0.3, 0.9))
    scene.primitives.cylinder((x, y, z - 0.3), trunk, stem + 0.3 + 0.7 * crown, Material(0.3))
    if random.random() < 0.2:
        foot, top = (1.4 * crown, 1.4 * crown), (0.1, 0.1)
        scene.primitives.frustum((x, y, z + stem), random.uniform(0, 3), foot, top, 3 * crown, leaf)
        return
    for _ in range(random.integers(3, 9)):
        size, shift = crown * random.uniform(0.25, 0.7), 0.45 * crown
        place = x + random.normal(0, shift), y + random.normal(0, shift), z + stem + crown * random.uniform(0.1, 1.8)
        radii = size * random.uniform(0.7, 1.3), size * random.uniform(0.7, 1.3), size * random.uniform(0.6, 1.1)
        scene.primitives.ellipsoid(place, random.uniform(0, 3), radii, leaf)


def rail(scene: Scene, v: float, start: float, stop: float) -> None:
    """A crash barrier along the road: a beam on posts."""
    random = scene.random
    steel, top = Material(random.uniform(0.3, 0.7)), random.uniform(0.6, 0.8)
    u = start
    while u < stop:
        if scene.is_free_strip(u + 2, v, 4, 0.3):
            x, y, z = scene.foot(u + 2, v)
            scene.primitives.box((x, y, z + top - 0.3), scene.road.heading, (4.0, 0.12, 0.3), steel)
            scene.primitives.box(scene.foot(u, v), scene.road.heading, (0.1, 0.1, top), steel)
        u += 4


def pole(scene: Scene, u: float, v: float) -> None:
    """A lamp post, a sign, a bollard or a bin."""
    random = scene.random
    x, y, z = scene.foot(u, v)
    if not scene.is_free(x, y, 0.3):
        return
    chance = random.random()
    if chance < 0.3:
        scene.primitives.cylinder((x, y, z), random.uniform(0.25, 0.5), random.uniform(0.7, 1.3), Material(0.3))
    elif chance < 0.45:
        scene.primitives.cylinder((x, y, z), random.uniform(0.05, 0.12), random.uniform(0.6, 1.1), Material(0.4))
    elif chance < 0.75:
        scene.primitives.cylinder((x, y, z), random.uniform(0.06, 0.16), random.uniform(4, 9), Material(0.4))
    else:
        height = random.uniform(1.8, 3.2)
        scene.primitives.cylinder((x, y, z), 0.04, height, Material(0.4))
        board = 0.06, random.uniform(0.4, 0.9), random.uniform(0.3, 0.9)
        turn = scene.road.heading + random.normal(0, 0.3)
        scene.primitives.box((x, y, z + height - board[2]), turn, board, Material(0.9, glow=3.0))


def junk(scene: Scene, u: float, v: float) -> None:
    """A thing of no class, from a crate to a shed, that a detector must not take for a car."""
    random = scene.random
    length, width = random.uniform(0.3, 1.2) * random.choice([1, 1, 3]), random.uniform(0.3, 1.6)
    height, yaw = random.uniform(0.2, 1.9), scene.road.heading + random.uniform(-math.pi, math.pi)
    x, y, z = scene.foot(u, v)
    if not scene.is_free(x, y, 0.5 * math.hypot(length, width)):
        return
    surface = Material(random.uniform(0.08, 0.7))
    kind = random.random()
    if kind < 0.35:
        scene.primitives.box((x, y, z), yaw, (length, width, height), surface)
    elif kind < 0.6:
        top = length * random.uniform(0.1, 0.9), width * random.uniform(0.1, 0.9)
        shift = random.normal(0, 0.15) * length
        scene.primitives.frustum((x, y, z), yaw, (length, width), top, height, surface, shift=shift)
    elif kind < 0.8:
        scene.primitives.ellipsoid((x, y, z), yaw, (0.6 * length, 0.6 * width, 0.7 * height), surface)
    else:
        for _ in range(random.integers(2, 6)):
            part = tuple(random.uniform(0.2, 0.6) * side for side in (length, width, height))
            place = x + random.normal(0, 0.25) * length, y + random.normal(0, 0.25) * width, z
            scene.primitives.box(place, random.uniform(0, 3), (part[0], part[1], part[2] * 1.5), surface)
