"""The solids that every simulated thing is made of, and where a ray enters and leaves each of them.

All stand upright: a primitive has a centre, a heading about z and sizes. A frustum has a rectangular foot and a
rectangular top that may be smaller and shifted, so boxes, wedges and leaning beams are frusta. A wheel is a cylinder
lying across its heading.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

FRUSTUM, ELLIPSOID, CYLINDER, WHEEL = range(4)
CLUTTER = -1
GROUND = -2
OWN_CAR = -3
_FIELDS = 17
_ROW = tuple[float, ...]
_Local = tuple[np.ndarray, np.ndarray, np.ndarray]
_FAR = np.float32(1e9)


@dataclass(frozen=True, slots=True)
class Material:
    """What a surface does to a beam.

    `albedo` is the reflectivity, `glass` the chance that a side lets the beam in, `solid` the chance that the beam
    meets anything at all (a fence is mostly holes), `depth_m` the mean way into foliage before a leaf stops it, and
    `glow` the factor of a retro-reflector.
    """

    albedo: float
    glass: float = 0.0
    solid: float = 1.0
    depth_m: float = 0.0
    glow: float = 1.0


class PrimitiveList:
    """Collects primitives while a scene is laid out; `table` freezes them."""

    def __init__(self) -> None:
        self._rows: list[_ROW] = []

    def __len__(self) -> int:
        return len(self._rows)

    def frustum(
        self,
        foot: tuple[float, float, float],
        yaw: float,
        lower: tuple[float, float],
        upper: tuple[float, float],
        height: float,
        material: Material,
        *,
        shift: float = 0.0,
        owner: int = CLUTTER,
    ) -> None:
        """A foot of `lower` length x width at the point `foot`, a top of `upper` moved `shift` m along the heading."""
        self._add(FRUSTUM, foot, yaw, (*lower, *upper, height, shift), material, owner)

    def box(
        self,
        foot: tuple[float, float, float],
        yaw: float,
        size: tuple[float, float, float],
        material: Material,
        *,
        owner: int = CLUTTER,
    ) -> None:
        """A box of length x width x height standing on the point `foot`."""
        self._add(FRUSTUM, foot, yaw, (size[0], size[1], size[0], size[1], size[2], 0.0), material, owner)

    def ellipsoid(
        self,
        centre: tuple[float, float, float],
        yaw: float,
        radii: tuple[float, float, float],
        material: Material,
        *,
        owner: int = CLUTTER,
    ) -> None:
        """An ellipsoid with radii along heading, across it, and up."""
        self._add(ELLIPSOID, centre, yaw, (*radii, 0.0, 0.0, 0.0), material, owner)

    def cylinder(
        self,
        foot: tuple[float, float, float],
        radius: float,
        height: float,
        material: Material,
        *,
        owner: int = CLUTTER,
    ) -> None:
        """An upright cylinder standing on the point `foot`."""
        centre = (foot[0], foot[1], foot[2] + height / 2)
        self._add(CYLINDER, centre, 0.0, (radius, radius, height / 2, 0.0, 0.0, 0.0), material, owner)

    def wheel(
        self,
        centre: tuple[float, float, float],
        yaw: float,
        radius: float,
        width: float,
        material: Material,
        *,
        owner: int = CLUTTER,
    ) -> None:
        """A cylinder whose axis lies across the heading."""
        self._add(WHEEL, centre, yaw, (radius, width / 2, radius, 0.0, 0.0, 0.0), material, owner)

    def _add(
        self, kind: int, at: tuple[float, float, float], yaw: float, size: _ROW, material: Material, owner: int
    ) -> None:
        surface = (material.albedo, material.glass, material.solid, material.depth_m, material.glow)
        self._rows.append((kind, *at, yaw, *size, *surface, owner))

    def table(self) -> Primitives:
        """The primitives as arrays."""
        rows = np.array(self._rows, dtype=np.float64).reshape(-1, _FIELDS)
        return Primitives(
            kind=rows[:, 0].astype(np.int64),
            position=rows[:, 1:4],
            yaw=rows[:, 4],
            size=rows[:, 5:11],
            albedo=rows[:, 11].astype(np.float32),
            glass=rows[:, 12].astype(np.float32),
            solid=rows[:, 13].astype(np.float32),
            depth_m=rows[:, 14].astype(np.float32),
            glow=rows[:, 15].astype(np.float32),
            owner=rows[:, 16].astype(np.int64),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Primitives:
    """Primitives as columns; `owner` is the index of an object, `CLUTTER` or `OWN_CAR`."""

    kind: Int64[np.ndarray, " primitives"]
    position: Float64[np.ndarray, "primitives 3"]
    yaw: Float64[np.ndarray, " primitives"]
    size: Float64[np.ndarray, "primitives 6"]
    albedo: Float32[np.ndarray, " primitives"]
    glass: Float32[np.ndarray, " primitives"]
    solid: Float32[np.ndarray, " primitives"]
    depth_m: Float32[np.ndarray, " primitives"]
    glow: Float32[np.ndarray, " primitives"]
    owner: Int64[np.ndarray, " primitives"]

    def __len__(self) -> int:
        return len(self.kind)

    def extent(self) -> Float64[np.ndarray, "primitives 6"]:
        """Bounds in the primitive's own frame: x low, x high, y low, y high, z low, z high."""
        a, b, c, d, h, shift = self.size.T
        frustum = self.kind == FRUSTUM
        x_low = np.where(frustum, np.minimum(-a / 2, shift - c / 2), -a)
        x_high = np.where(frustum, np.maximum(a / 2, shift + c / 2), a)
        y_high = np.where(frustum, np.maximum(b, d) / 2, b)
        z_low, z_high = np.where(frustum, 0.0, -c), np.where(frustum, h, c)
        return np.stack([x_low, x_high, -y_high, y_high, z_low, z_high], axis=1)


def frustum_planes(size: Float64[np.ndarray, "frusta 6"]) -> Float64[np.ndarray, "frusta 9"]:
    """Sloping faces as n . p = d: front (nx, nz, d), back (nx, nz, d), sides (ny, nz, d); outward unit normals."""
    length, width, top_length, top_width, height, shift = size.T
    front = np.stack([height, length / 2 - shift - top_length / 2], axis=1)
    back = np.stack([-height, length / 2 + shift - top_length / 2], axis=1)
    side = np.stack([height, (width - top_width) / 2], axis=1)
    front, back, side = (n / np.linalg.norm(n, axis=1, keepdims=True) for n in (front, back, side))
    offsets = (front[:, 0] * length / 2, -back[:, 0] * length / 2, side[:, 0] * width / 2)
    parts = zip((front, back, side), offsets, strict=True)
    return np.concatenate([np.column_stack([n, d]) for n, d in parts], axis=1)


@dataclass(frozen=True, slots=True)
class Crossing:
    """Along each ray: where it enters and leaves (m), whether it does, and the cosine of incidence."""

    enter: Float32[np.ndarray, " rays"]
    leave: Float32[np.ndarray, " rays"]
    hit: Bool[np.ndarray, " rays"]
    cosine: Float32[np.ndarray, " rays"]
    level: Bool[np.ndarray, " rays"]


def cross_frusta(
    origin: _Local, direction: _Local, planes: Float32[np.ndarray, "9 rays"], height: Float32[np.ndarray, " rays"]
) -> Crossing:
    """Clip each ray against the six faces of its frustum; `level` marks an entry through top or bottom."""
    (ox, oy, oz), (dx, dy, dz) = origin, direction
    fx, fz, fd, bx, bz, bd, sy, sz, sd = planes
    faces = (
        (fx * dx + fz * dz, fd - fx * ox - fz * oz),
        (bx * dx + bz * dz, bd - bx * ox - bz * oz),
        (sy * dy + sz * dz, sd - sy * oy - sz * oz),
        (sz * dz - sy * dy, sd + sy * oy - sz * oz),
        (dz, height - oz),
        (-dz, oz),
    )
    enter = np.full(len(dx), -_FAR, dtype=np.float32)
    leave = np.full(len(dx), _FAR, dtype=np.float32)
    cosine = np.zeros(len(dx), dtype=np.float32)
    level = np.zeros(len(dx), dtype=bool)
    for number, (slope, gap) in enumerate(faces):
        slope = np.where(slope == 0, np.float32(1e-9), slope)
        at = gap / slope
        inward = slope < 0
        later = inward & (at > enter)
        np.copyto(enter, at, where=later)
        np.copyto(cosine, -slope, where=later)
        level[later] = number >= 4
        np.minimum(leave, at, out=leave, where=~inward)
    return Crossing(enter, leave, enter < leave, cosine, level)


def cross_ellipsoids(origin: _Local, direction: _Local) -> Crossing:
    """Ray and unit sphere, in coordinates scaled by the radii; written about the nearest point to spare float32."""
    (ox, oy, oz), (dx, dy, dz) = origin, direction
    square = dx * dx + dy * dy + dz * dz
    middle = -(ox * dx + oy * dy + oz * dz) / square
    px, py, pz = ox + middle * dx, oy + middle * dy, oz + middle * dz
    inside = 1.0 - (px * px + py * py + pz * pz)
    hit = inside > 0
    root = np.sqrt(np.maximum(inside, 0.0))
    half = root / np.sqrt(square)
    return Crossing(middle - half, middle + half, hit, root, np.zeros(len(dx), dtype=bool))


def cross_cylinders(origin: _Local, direction: _Local) -> Crossing:
    """Ray and the unit cylinder about the third axis, scaled likewise; `level` marks an entry through an end."""
    (ox, oy, oz), (dx, dy, dz) = origin, direction
    square = dx * dx + dy * dy + np.float32(1e-12)
    middle = -(ox * dx + oy * dy) / square
    px, py = ox + middle * dx, oy + middle * dy
    inside = 1.0 - (px * px + py * py)
    root = np.sqrt(np.maximum(inside, 0.0))
    half = root / np.sqrt(square)
    axial = np.where(dz == 0, np.float32(1e-9), dz)
    first, second = (-1.0 - oz) / axial, (1.0 - oz) / axial
    near, far = np.minimum(first, second), np.maximum(first, second)
    level = near > middle - half
    enter = np.maximum(middle - half, near)
    leave = np.minimum(middle + half, far)
    cosine = np.where(level, np.float32(0.5), root)
    return Crossing(enter, leave, (inside > 0) & (enter < leave), cosine, level)
