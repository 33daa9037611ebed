"""Cast the rays of several sweeps at ground and primitives: a z-buffer over ring x azimuth.

Each primitive is tested only on the slice of the grid that its bounds cover, near ones first, and only where nothing
nearer has been met. All (primitive, ray) pairs of a batch are one flat array, so the cost does not depend on Python.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64

from calib.simulator.ground import Ground, cast_ground
from calib.simulator.primitives import (
    ELLIPSOID,
    FRUSTUM,
    GROUND,
    WHEEL,
    Crossing,
    Primitives,
    cross_cylinders,
    cross_ellipsoids,
    cross_frusta,
    frustum_planes,
)
from calib.simulator.sensor import Sensor

_BATCH_PAIRS = 60_000
_NOTHING = -3
_MARGIN_RAD = 1e-3
_CABIN_SHARE = 0.35
_CABIN_DEPTH_M = (0.2, 1.2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pose:
    """Where the sensor stood during one sweep, and how long before the key frame."""

    origin: Float64[np.ndarray, " 3"]
    yaw: float
    lag_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _View:
    """The rings of one block of beams in one sweep, which share an origin."""

    sweep: int
    rings: slice
    origin: Float64[np.ndarray, " 3"]
    yaw: float
    lag_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Echoes:
    """Rays that met something: index into sweep x ring x azimuth, range, primitive (or `GROUND`), incidence."""

    ray: Int64[np.ndarray, " echoes"]
    range_m: Float32[np.ndarray, " echoes"]
    primitive: Int32[np.ndarray, " echoes"]
    cosine: Float32[np.ndarray, " echoes"]


@dataclass(slots=True)
class _Slices:
    """One row for each primitive and sweep that may meet: its slice of the grid and the ray origin it sees."""

    primitive: Int64[np.ndarray, " slices"]
    sweep: Int64[np.ndarray, " slices"]
    nearest_m: Float32[np.ndarray, " slices"]
    first_ring: Int64[np.ndarray, " slices"]
    rings: Int64[np.ndarray, " slices"]
    first_step: Int64[np.ndarray, " slices"]
    steps: Int64[np.ndarray, " slices"]
    origin: Float32[np.ndarray, "3 slices"]
    turn: Float32[np.ndarray, "2 slices"]

    def take(self, rows: np.ndarray) -> _Slices:
        return _Slices(
            self.primitive[rows],
            self.sweep[rows],
            self.nearest_m[rows],
            self.first_ring[rows],
            self.rings[rows],
            self.first_step[rows],
            self.steps[rows],
            self.origin[:, rows],
            self.turn[:, rows],
        )


def cast(
    sensor: Sensor,
    poses: list[Pose],
    ground: Ground,
    primitives: Primitives,
    velocity: Float64[np.ndarray, "primitives 2"],
    random: np.random.Generator,
) -> Echoes:
    """The nearest surface along every ray of every sweep; primitives move at `velocity` (m/s) up to the key frame."""
    surfaces = [cast_ground(ground, sensor, pose.origin, pose.yaw) for pose in poses]
    depth = np.concatenate([surface[0].ravel() for surface in surfaces])
    cosine = np.concatenate([surface[1].ravel() for surface in surfaces])
    np.copyto(depth, np.inf, where=depth > sensor.max_range_m)
    nearest = np.where(np.isfinite(depth), GROUND, _NOTHING).astype(np.int32)
    if len(primitives):
        caster = _Caster(sensor, primitives, depth, nearest, cosine, random)
        for batch in _batches(_slices(sensor, _views(sensor, poses), primitives, velocity), primitives.kind):
            caster.meet(batch)
    ray = np.flatnonzero((nearest != _NOTHING) & (depth > sensor.min_range_m))
    return Echoes(ray=ray, range_m=depth[ray], primitive=nearest[ray], cosine=cosine[ray])


def _views(sensor: Sensor, poses: list[Pose]) -> list[_View]:
    """Sweep by sweep, the lowest block first: the order of the rays."""
    views = []
    for sweep, pose in enumerate(poses):
        first = 0
        for count, lift in sensor.blocks:
            origin = pose.origin + np.array([0.0, 0.0, lift])
            rings = slice(first, first + count)
            views.append(_View(sweep=sweep, rings=rings, origin=origin, yaw=pose.yaw, lag_s=pose.lag_s))
            first += count
    return views


def _slices(
    sensor: Sensor, views: list[_View], primitives: Primitives, velocity: Float64[np.ndarray, "primitives 2"]
) -> _Slices:
    """Bounds of every primitive in the ring x azimuth grid of every view."""
    count = len(primitives)
    primitive = np.tile(np.arange(count), len(views))
    view = np.repeat(np.arange(len(views)), count)
    lag = np.array([each.lag_s for each in views])[view]
    away = primitives.position[primitive] - np.array([each.origin for each in views])[view]
    away[:, :2] -= velocity[primitive] * lag[:, None]
    turn = primitives.yaw[primitive] - np.array([each.yaw for each in views])[view]
    heading = primitives.yaw[primitive]
    along, across = np.cos(heading), np.sin(heading)
    origin = -np.stack([along * away[:, 0] + across * away[:, 1], along * away[:, 1] - across * away[:, 0], away[:, 2]])
    extent = primitives.extent()[primitive].T
    beyond = [np.maximum(np.maximum(extent[i] - origin[j], origin[j] - extent[i + 1]), 0) for i, j in ((0, 0), (2, 1))]
    gap = np.hypot(*beyond)
    corner_x = (extent[[0, 0, 1, 1]] - origin[0]).T
    corner_y = (extent[[2, 3, 2, 3]] - origin[1]).T
    reach = np.hypot(corner_x, corner_y).max(axis=1)
    low, high = extent[4] - origin[2], extent[5] - origin[2]
    floor = np.maximum(gap, 0.3)
    bottom = np.arctan2(low, np.where(low < 0, floor, reach))
    top = np.arctan2(high, np.where(high > 0, floor, reach))
    rings = np.asarray(sensor.elevation_rad)
    lowest, above = (np.array([getattr(each.rings, end) for each in views])[view] for end in ("start", "stop"))
    first_ring = np.maximum(np.searchsorted(rings, bottom - _MARGIN_RAD), lowest)
    last_ring = np.minimum(np.searchsorted(rings, top + _MARGIN_RAD), above)
    middle = np.arctan2(corner_y.mean(axis=1), corner_x.mean(axis=1))
    spread = np.arctan2(corner_y, corner_x) - middle[:, None]
    spread = (spread + np.pi) % (2 * np.pi) - np.pi
    step = 2 * np.pi / sensor.azimuth_steps
    start = np.floor((middle + turn + spread.min(axis=1) - _MARGIN_RAD + np.pi) / step - 0.5).astype(np.int64)
    stop = np.ceil((middle + turn + spread.max(axis=1) + _MARGIN_RAD + np.pi) / step + 0.5).astype(np.int64)
    steps = np.minimum(np.where(gap > 0.05, stop - start, sensor.azimuth_steps), sensor.azimuth_steps)
    found = _Slices(
        primitive=primitive,
        sweep=np.array([each.sweep for each in views])[view],
        nearest_m=gap.astype(np.float32),
        first_ring=first_ring,
        rings=last_ring - first_ring,
        first_step=start % sensor.azimuth_steps,
        steps=steps,
        origin=origin.astype(np.float32),
        turn=np.stack([np.cos(turn), np.sin(turn)]).astype(np.float32),
    )
    return found.take(np.flatnonzero((last_ring > first_ring) & (gap < sensor.max_range_m)))


def _batches(found: _Slices, kind: Int64[np.ndarray, " primitives"]) -> list[_Slices]:
    """Slices of one kind at a time, near batches first, each of about `_BATCH_PAIRS` rays to test."""
    found = found.take(np.argsort(found.nearest_m, kind="stable"))
    number = np.cumsum(found.rings * found.steps) // _BATCH_PAIRS
    shape = kind[found.primitive]
    order = np.lexsort((shape, number))
    cuts = np.flatnonzero((np.diff(number[order]) != 0) | (np.diff(shape[order]) != 0)) + 1
    return [found.take(rows) for rows in np.split(order, cuts)]


class _Caster:
    """The z-buffer and what is needed to fill it."""

    def __init__(
        self,
        sensor: Sensor,
        primitives: Primitives,
        depth: Float32[np.ndarray, " rays"],
        nearest: Int32[np.ndarray, " rays"],
        cosine: Float32[np.ndarray, " rays"],
        random: np.random.Generator,
    ) -> None:
        self._directions = sensor.directions
        self._steps = sensor.azimuth_steps
        self._primitives = primitives
        frusta = np.flatnonzero(primitives.kind == FRUSTUM)
        self._planes = np.zeros((9, len(primitives)), dtype=np.float32)
        self._planes[:, frusta] = frustum_planes(primitives.size[frusta]).T
        self._size = np.ascontiguousarray(primitives.size.T, dtype=np.float32)
        self._depth, self._nearest, self._cosine = depth, nearest, cosine
        self._random = random

    def meet(self, batch: _Slices) -> None:
        """Test one batch of slices of one kind and keep what is nearer than all before."""
        piece, ray = self._pairs(batch)
        if not len(ray):
            return
        crossing = self._cross(batch, piece, ray)
        kept = np.flatnonzero(crossing.hit & (crossing.enter > 0) & (crossing.enter < self._depth[ray]))
        ray, primitive = ray[kept], batch.primitive[piece[kept]]
        enter, cosine = self._materials(crossing, kept, primitive)
        kept = np.flatnonzero(enter < self._depth[ray])
        ray, enter = ray[kept], enter[kept]
        np.minimum.at(self._depth, ray, enter)
        won = np.flatnonzero(enter == self._depth[ray])
        self._nearest[ray[won]] = primitive[kept[won]]
        self._cosine[ray[won]] = cosine[kept[won]]

    def _pairs(self, batch: _Slices) -> tuple[np.ndarray, np.ndarray]:
        """All (slice, ray) pairs of a batch in which nothing nearer than the slice has been met."""
        row = np.repeat(np.arange(len(batch.primitive), dtype=np.int32), batch.rings)
        ring = np.arange(len(row)) - np.repeat(np.cumsum(batch.rings) - batch.rings, batch.rings)
        ring += batch.first_ring[row]
        rays = self._directions.shape[1]
        line = (batch.sweep[row] * rays + ring * self._steps).astype(np.int32)
        length = batch.steps[row]
        before = (np.cumsum(length) - length).astype(np.int32)
        owner = np.repeat(np.arange(len(row), dtype=np.int32), length)
        ray = np.arange(len(owner), dtype=np.int32) + (line + batch.first_step[row].astype(np.int32) - before)[owner]
        ray -= np.where(ray >= (line + self._steps)[owner], np.int32(self._steps), np.int32(0))
        open_ = np.flatnonzero(self._depth[ray] > batch.nearest_m[row][owner])
        return row[owner[open_]], ray[open_]

    def _cross(self, batch: _Slices, piece: np.ndarray, ray: np.ndarray) -> Crossing:
        """Directions and origins in the frames of the primitives, then the test of their kind."""
        x, y, z = self._directions[:, ray % np.int32(self._directions.shape[1])]
        cosine, sine = batch.turn[:, piece]
        direction = (cosine * x + sine * y, cosine * y - sine * x, z)
        kind = int(self._primitives.kind[batch.primitive[0]])
        primitive = batch.primitive
        if kind == FRUSTUM:
            origin = tuple(batch.origin[:, piece])
            planes = self._planes[:, primitive][:, piece]
            return cross_frusta(origin, direction, planes, self._size[4, primitive][piece])
        size = 1 / self._size[:3, primitive]
        scaled = size[:, piece]
        origin = tuple((batch.origin * size)[:, piece])
        direction = (direction[0] * scaled[0], direction[1] * scaled[1], direction[2] * scaled[2])
        if kind == ELLIPSOID:
            return cross_ellipsoids(origin, direction)
        if kind == WHEEL:
            return cross_cylinders((origin[0], origin[2], origin[1]), (direction[0], direction[2], direction[1]))
        return cross_cylinders(origin, direction)

    def _materials(
        self, crossing: Crossing, kept: np.ndarray, primitive: np.ndarray
    ) -> tuple[Float32[np.ndarray, " hits"], Float32[np.ndarray, " hits"]]:
        """Where a beam really stops: inside foliage, behind glass, or not at all between the bars of a fence."""
        enter, leave, cosine = crossing.enter[kept], crossing.leave[kept], crossing.cosine[kept]
        random, table = self._random, self._primitives
        leafy = np.flatnonzero(table.depth_m[primitive] > 0)
        enter[leafy] += random.standard_exponential(len(leafy), dtype=np.float32) * table.depth_m[primitive[leafy]]
        cosine[leafy] = 0.8
        holes = np.flatnonzero(table.solid[primitive] < 1)
        enter[holes[random.random(len(holes), dtype=np.float32) >= table.solid[primitive[holes]]]] = np.inf
        panes = np.flatnonzero((table.glass[primitive] > 0) & ~crossing.level[kept])
        chance = random.random(len(panes), dtype=np.float32) / table.glass[primitive[panes]]
        cabin = panes[chance < _CABIN_SHARE]
        enter[cabin] += random.uniform(*_CABIN_DEPTH_M, len(cabin)).astype(np.float32)
        enter[panes[(chance >= _CABIN_SHARE) & (chance < 1)]] = np.inf
        np.copyto(enter, np.inf, where=enter > leave)
        return enter, cosine
