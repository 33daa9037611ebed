"""The ten nuScenes classes: how large they are and what they are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from calib.simulator.primitives import Material, PrimitiveList

CLASS_NAMES = (
    "car",
    "truck",
    "construction_vehicle",
    "bus",
    "trailer",
    "barrier",
    "motorcycle",
    "bicycle",
    "pedestrian",
    "traffic_cone",
)

# mean and deviation of length, width and height (m); motorcycle and bicycle without a rider
SIZES = {
    "car": ((4.3, 0.48), (1.78, 0.14), (1.6, 0.16)),
    "truck": ((6.9, 1.5), (2.48, 0.22), (2.85, 0.45)),
    "construction_vehicle": ((6.3, 1.3), (2.75, 0.35), (3.15, 0.4)),
    "bus": ((10.9, 1.2), (2.9, 0.15), (3.4, 0.3)),
    "trailer": ((12.0, 1.9), (2.85, 0.25), (3.8, 0.35)),
    "barrier": ((0.51, 0.12), (2.4, 0.4), (0.99, 0.12)),
    "motorcycle": ((2.1, 0.18), (0.78, 0.09), (1.2, 0.1)),
    "bicycle": ((1.72, 0.13), (0.6, 0.07), (1.1, 0.08)),
    "pedestrian": ((0.74, 0.15), (0.67, 0.1), (1.75, 0.12)),
    "traffic_cone": ((0.41, 0.07), (0.41, 0.07), (0.95, 0.2)),
}
_COMMON = 0.6
_RUBBER = Material(0.06)
_PLATE = Material(1.0, glow=3.0)
_DARK = Material(0.12)
_SKIN = Material(0.38)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """One object standing at (x, y, ground) with a heading and a size; `at` places its parts."""

    x: float
    y: float
    ground: float
    yaw: float
    length: float
    width: float
    height: float
    owner: int

    def at(self, forward: float, left: float, up: float) -> tuple[float, float, float]:
        """A point of the object's own frame in the ego frame."""
        along, across = math.cos(self.yaw), math.sin(self.yaw)
        return self.x + along * forward - across * left, self.y + across * forward + along * left, self.ground + up


def draw_size(name: str, random: np.random.Generator) -> tuple[float, float, float]:
    """Length, width and height of one object of a class; part of the deviation is common to the three."""
    common, *own = np.clip(random.standard_normal(4), -2.5, 2.5)
    draws = (_COMMON * common + math.sqrt(1 - _COMMON**2) * each for each in own)
    length, width, height = (
        max(mean + float(draw) * spread, 0.6 * mean) for draw, (mean, spread) in zip(draws, SIZES[name], strict=True)
    )
    return length, width, height


def build(name: str, thing: Placed, into: PrimitiveList, random: np.random.Generator) -> None:
    """Add the primitives of one object."""
    _SHAPES[name](thing, into, random)


def _paint(random: np.random.Generator) -> Material:
    tone = random.choice([0.06, 0.15, 0.3, 0.5, 0.7], p=[0.22, 0.2, 0.25, 0.2, 0.13])
    return Material(float(tone * random.uniform(0.7, 1.3)))


def _car(thing: Placed, into: PrimitiveList, random: np.random.Generator) -> None:
    length, width, height, yaw, owner = thing.length, thing.width, thing.height, thing.yaw, thing.owner
    paint = _paint(random)
    clearance, belt = random.uniform(0.15, 0.25), height * random.uniform(0.52, 0.62)
    waist = clearance + (belt - clearance) * random.uniform(0.5, 0.8)
    sill, hood = (length * 0.985, width), random.uniform(0.9, 0.97)
    into.frustum(thing.at(0, 0, clearance), yaw, sill, (length, 0.99 * width), waist - clearance, paint, owner=owner)
    into.frustum(
        thing.at(0, 0, waist),
        yaw,
        (length, 0.99 * width),
        (hood * length, 0.94 * width),
        belt - waist,
        paint,
        shift=-(1 - hood) * random.uniform(0.2, 0.5) * length,
        owner=owner,
    )
    foot, top, shift, place = _car_cabin(height, random)
    cabin = Material(paint.albedo, glass=float(random.uniform(0.2, 0.6)))
    into.frustum(
        thing.at(place * length, 0, belt),
        yaw,
        (foot * length, width * 0.93),
        (top * length, width * random.uniform(0.68, 0.8)),
        height - belt,
        cabin,
        shift=shift * length,
        owner=owner,
    )
    radius = random.uniform(0.29, 0.35)
    for end in (-0.31, 0.31):
        for side in (-0.43, 0.43):
            into.wheel(thing.at(end * length, side * width, radius), yaw, radius, 0.22, _RUBBER, owner=owner)
    into.box(thing.at(-length / 2 + 0.01, 0, height * 0.36), yaw, (0.04, 0.5, 0.12), _PLATE, owner=owner)
    if random.random() < 0.7:
        into.box(thing.at(length / 2 - 0.01, 0, height * 0.26), yaw, (0.04, 0.5, 0.12), _PLATE, owner=owner)
    for side in (-0.5, 0.5):
        into.box(thing.at(length * 0.17, side * width, belt - 0.02), yaw, (0.15, 0.12, 0.14), paint, owner=owner)


def _car_cabin(height: float, random: np.random.Generator) -> tuple[float, float, float, float]:
    """Foot and top length, shift of the top and place of the cabin, as shares of the car's length; vans are tall."""
    style = random.random() + float(np.clip(height - 1.6, -0.3, 0.5))
    if style < 0.45:
        return random.uniform(0.55, 0.62), random.uniform(0.28, 0.36), -random.uniform(0.02, 0.06), -0.06
    if style < 0.75:
        return random.uniform(0.62, 0.70), random.uniform(0.42, 0.50), -random.uniform(0.05, 0.09), -0.13
    if style < 0.92:
        return random.uniform(0.68, 0.76), random.uniform(0.52, 0.60), -0.05, -0.11
    return 0.82, 0.70, -0.05, -0.07


def _wheels(thing: Placed, into: PrimitiveList, ends: tuple[float, ...], radius: float) -> None:
    for end in ends:
        for side in (-0.42, 0.42):
            centre = thing.at(end * thing.length, side * thing.width, radius)
            into.wheel(centre, thing.yaw, radius, 0.32, _RUBBER, owner=thing.owner)


def _bus(thing: Placed, into: PrimitiveList, random: np.random.Generator) -> None:
    paint = _paint(random)
    shell = Material(paint.albedo, glass=float(random.uniform(0.05, 0.25)))
    waist = 0.42 * thing.height
    size = (thing.length, thing.width)
    into.box(thing.at(0, 0, 0.3), thing.yaw, (*size, waist - 0.3), paint, owner=thing.owner)
    top = (thing.length * random.uniform(0.95, 1.0), thing.width * 0.96)
    into.frustum(thing.at(0, 0, waist), thing.yaw, size, top, thing.height - waist, shell, owner=thing.owner)
    _wheels(thing, into, (-0.32, 0.3), 0.48)


def _truck(thing: Placed, into: PrimitiveList, random: np.random.Generator) -> None:
    length, width, height, yaw, owner = thing.length, thing.width, thing.height, thing.yaw, thing.owner
    paint = _paint(random)
    cab = min(random.uniform(1.7, 2.4), 0.4 * length)
    cab_height = height * random.uniform(0.65, 0.95)
    into.frustum(
        thing.at(length / 2 - cab / 2, 0, 0.45),
        yaw,
        (cab, width * 0.97),
        (cab * 0.8, width * 0.93),
        cab_height - 0.45,
        Material(paint.albedo, glass=0.2),
        shift=-cab * 0.08,
        owner=owner,
    )
    load, middle = length - cab - 0.2, -(cab + 0.2) / 2
    body = Material(float(random.uniform(0.1, 0.8)))
    if random.random() < 0.3:
        into.box(thing.at(middle, 0, 0.8), yaw, (load, width, 0.25 * height), body, owner=owner)
        heap = random.uniform(0.3, 0.9)
        into.box(thing.at(middle, 0, 0.9), yaw, (load * heap, width * 0.8, height * 0.5), _DARK, owner=owner)
    else:
        into.box(thing.at(middle, 0, 0.9), yaw, (load, width, height - 0.9), body, owner=owner)
    into.box(thing.at(0, 0, 0.55), yaw, (length * 0.96, width * 0.5, 0.35), _DARK, owner=owner)
    _wheels(thing, into, (-0.36, -0.24, 0.33) if length > 8.5 else (-0.3, 0.33), 0.48)


def _trailer(thing: Placed, into: PrimitiveList, random: np.random.Generator) -> None:
    length, width, height, yaw, owner = thing.length, thing.width, thing.height, thing.yaw, thing.owner
    body = _paint(random)
    if random.random() < 0.8:
        into.box(thing.at(0, 0, 1.1), yaw, (length, width, height - 1.1), body, owner=owner)
    else:
        into.box(thing.at(0, 0, 1.1), yaw, (length, width, 0.3), body, owner=owner)
        into.box(thing.at(-0.1 * length, 0, 1.3), yaw, (0.7 * length, 0.9 * width, height - 1.3), _DARK, owner=owner)
    into.box(thing.at(0, 0, 0.7), yaw, (length * 0.97, width * 0.4, 0.4), _DARK, owner=owner)
    _wheels(thing, into, (-0.42, -0.33, -0.24), 0.5)


def _construction_vehicle(thing: Placed, into: PrimitiveList, random: np.random.Generator) -> None:
    length, width, height, yaw, owner = thing.length, thing.width, thing.height, thing.yaw, thing.owner
    body = Material(float(random.uniform(0.35, 0.65)))
    into.box(thing.at(-0.15 * length, 0, 0.5), yaw, (0.7 * length, 0.8 * width, 0.3 * height), body, owner=owner)
    cabin = Material(body.albedo, glass=0.4)
    across = random.uniform(-0.15, 0.15) * width
    into.box(thing.at(-0.1 * length, across, 0.4 * height), yaw, (1.5, 0.5 * width, 0.58 * height), cabin, owner=owner)
    lean, rise = random.uniform(0.1, 0.3) * length, random.uniform(0.3, 0.5) * height
    for shift, up in ((lean, 0.25 * height), (-0.3 * lean, 0.25 * height + 0.5 * rise)):
        into.frustum(thing.at(0.2 * length, 0, up), yaw, (0.5, 0.4), (0.45, 0.35), rise, body, shift=shift, owner=owner)
    into.box(thing.at(0.43 * length, 0, 0.05), yaw, (0.12 * length, 0.9 * width, 0.8), _DARK, owner=owner)
    for side in (-0.4, 0.4):
        if random.random() < 0.5:
            into.box(thing.at(-0.15 * length, side * width, 0), yaw, (0.65 * length, 0.45, 0.9), _RUBBER, owner=owner)
        else:
            for end in (-0.33, 0.12):
                into.wheel(thing.at(end * length, side * width, 0.65), yaw, 0.65, 0.45, _RUBBER, owner=owner)


def _person(thing: Placed, into: PrimitiveList, random: np.random.Generator, *, stride: float) -> None:
    height, width, yaw, owner = thing.height, thing.width, thing.yaw, thing.owner
    coat = _paint(random)
    into.ellipsoid(thing.at(0, 0, 0.67 * height), yaw, (0.14, 0.36 * width, 0.19 * height), coat, owner=owner)
    into.ellipsoid(thing.at(0.02, 0, 0.925 * height), yaw, (0.1, 0.09, 0.075 * height), _SKIN, owner=owner)
    cloth = Material(coat.albedo * 0.7)
    for side in (-1, 1):
        foot = thing.at(side * stride, side * 0.1, 0)
        leg, shift = 0.5 * height, -side * stride * 0.8
        into.frustum(foot, yaw, (0.15, 0.13), (0.17, 0.16), leg, cloth, shift=shift, owner=owner)
        hand = thing.at(-side * stride * 0.8, side * 0.4 * width, 0.44 * height)
        arm, shift = 0.36 * height, side * stride * 0.7
        into.frustum(hand, yaw, (0.09, 0.09), (0.11, 0.11), arm, coat, shift=shift, owner=owner)
    if random.random() < 0.3:
        into.box(thing.at(-0.2, 0, 0.55 * height), yaw, (0.18, 0.32, 0.42), _DARK, owner=owner)


def _pedestrian(thing: Placed, into: PrimitiveList, random: np.random.Generator) -> None:
    _person(thing, into, random, stride=min(random.uniform(0, 0.3), 0.4 * thing.length))


def _two_wheeler(thing: Placed, into: PrimitiveList, random: np.random.Generator, *, heavy: bool) -> None:
    length, width, yaw, owner = thing.length, thing.width, thing.yaw, thing.owner
    radius, tyre = (0.31, 0.16) if heavy else (0.33, 0.06)
    spokes = Material(0.12, solid=0.9 if heavy else 0.45)
    bars = min(thing.height, 1.1)
    for end in (-1, 1):
        into.wheel(thing.at(end * (length / 2 - radius), 0, radius), yaw, radius, tyre, spokes, owner=owner)
    frame = Material(0.3) if heavy else Material(0.3, solid=0.5)
    size = (0.5 * length, 0.32 if heavy else 0.07, 0.42 * bars)
    into.box(thing.at(0, 0, 0.35 * bars), yaw, size, frame, owner=owner)
    into.box(thing.at(0.28 * length, 0, 0.9 * bars), yaw, (0.1, 0.9 * width, 0.08), Material(0.3), owner=owner)
    into.box(thing.at(-0.14 * length, 0, 0.78 * bars), yaw, (0.3, 0.2, 0.12), _DARK, owner=owner)
    if thing.height > 1.35:
        _rider(thing, into, random)


def _rider(thing: Placed, into: PrimitiveList, random: np.random.Generator) -> None:
    height, yaw, owner = thing.height, thing.yaw, thing.owner
    coat = _paint(random)
    torso, lean = 0.33 * height, random.uniform(0.05, 0.35)
    hip = thing.at(-0.15, 0, 0.5 * height)
    into.frustum(hip, yaw, (0.24, 0.34), (0.24, 0.42), torso, coat, shift=lean, owner=owner)
    into.ellipsoid(thing.at(lean - 0.1, 0, 0.92 * height), yaw, (0.11, 0.1, 0.08 * height), _SKIN, owner=owner)
    for side in (-0.14, 0.14):
        leg = thing.at(0.12, side, 0.12 * height)
        into.frustum(leg, yaw, (0.15, 0.12), (0.17, 0.15), 0.42 * height, coat, shift=-0.2, owner=owner)
        arm = thing.at(0.28, 1.4 * side, 0.58 * height)
        into.frustum(arm, yaw, (0.1, 0.09), (0.1, 0.09), 0.22 * height, coat, shift=lean - 0.4, owner=owner)


def _motorcycle(thing: Placed, into: PrimitiveList, random: np.random.Generator) -> None:
    _two_wheeler(thing, into, random, heavy=True)


def _bicycle(thing: Placed, into: PrimitiveList, random: np.random.Generator) -> None:
    _two_wheeler(thing, into, random, heavy=False)


def _traffic_cone(thing: Placed, into: PrimitiveList, random: np.random.Generator) -> None:
    width, height, owner = thing.width, thing.height, thing.owner
    into.box(thing.at(0, 0, 0), thing.yaw, (thing.length, width, 0.04), _DARK, owner=owner)
    glow = Material(float(random.uniform(0.5, 0.9)), glow=float(random.choice([1.0, 2.5])))
    foot, top = (0.7 * thing.length, 0.7 * width), (0.06, 0.06)
    into.frustum(thing.at(0, 0, 0.04), thing.yaw, foot, top, height - 0.04, glow, owner=owner)


def _barrier(thing: Placed, into: PrimitiveList, random: np.random.Generator) -> None:
    length, width, height, yaw, owner = thing.length, thing.width, thing.height, thing.yaw, thing.owner
    if random.random() < 0.5:
        foot, top = (length, width), (0.4 * length, width)
        into.frustum(thing.at(0, 0, 0), yaw, foot, top, height, Material(0.5), owner=owner)
        return
    board = Material(float(random.uniform(0.4, 0.9)), glow=float(random.choice([1.0, 2.0])))
    into.box(thing.at(0, 0, 0.55 * height), yaw, (0.25 * length, width, 0.45 * height), board, owner=owner)
    for side in (-0.4, 0.4):
        into.box(thing.at(0, side * width, 0), yaw, (length, 0.08, 0.8 * height), Material(0.4), owner=owner)


_SHAPES: dict[str, Callable[[Placed, PrimitiveList, np.random.Generator], None]] = {
    "car": _car,
    "truck": _truck,
    "construction_vehicle": _construction_vehicle,
    "bus": _bus,
    "trailer": _trailer,
    "barrier": _barrier,
    "motorcycle": _motorcycle,
    "bicycle": _bicycle,
    "pedestrian": _pedestrian,
    "traffic_cone": _traffic_cone,
}
