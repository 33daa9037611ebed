"""A scene while it is being laid out: what stands where, and what is still free."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float64, Int64

from calib.simulator.cast import Pose
from calib.simulator.ground import Ground
from calib.simulator.objects import CLASS_NAMES, Placed, build, draw_size
from calib.simulator.primitives import PrimitiveList
from calib.simulator.road import Road

REACH_M = 58.0
_GAP_M = 0.1
_CLEARANCE_M = 2.1
_PATH_M = 1.5


class Scene:
    """Road, ground, primitives and labelled objects; circles on the ground say what is taken."""

    def __init__(self, road: Road, ground: Ground, poses: list[Pose], random: np.random.Generator) -> None:
        self.road, self.ground, self.random = road, ground, random
        self._poses = poses
        self.primitives = PrimitiveList()
        self._objects: list[tuple[float, ...]] = []
        self._labels: list[int] = []
        self._circles = np.zeros((4096, 3))
        self._taken = 0
        for place, pose in enumerate(poses):
            self.claim(float(pose.origin[0]), float(pose.origin[1]), _PATH_M if place else _CLEARANCE_M)

    def floor(self, x: float, y: float) -> float:
        """Height of the ground at a point (m), to the nearest cell."""
        cells, size = self.ground.height, self.ground.cell_m
        edge = len(cells) - 1
        column = min(max(round(x / size + edge / 2), 0), edge)
        row = min(max(round(y / size + edge / 2), 0), edge)
        return float(cells[row, column])

    def foot(self, u: float, v: float) -> tuple[float, float, float]:
        """A point of the road frame on the ground, in the ego frame."""
        x, y = self.road.place(u, v)
        return x, y, self.floor(x, y)

    def is_free(self, x: float, y: float, radius: float) -> bool:
        """Whether a circle stands clear of everything that was claimed."""
        taken = self._circles[: self._taken]
        near = np.square(taken[:, 0] - x) + np.square(taken[:, 1] - y)
        return bool((near > np.square(taken[:, 2] + (radius + _GAP_M))).all())

    def claim(self, x: float, y: float, radius: float) -> None:
        """Mark a circle as taken."""
        if self._taken == len(self._circles):
            self._circles = np.concatenate([self._circles, np.zeros_like(self._circles)])
        self._circles[self._taken] = x, y, radius
        self._taken += 1

    def is_free_strip(self, u: float, v: float, length: float, width: float) -> bool:
        """Whether no claimed circle touches a rectangle that lies along the road."""
        x, y = self.road.place(u, v)
        along, across = math.cos(self.road.heading), math.sin(self.road.heading)
        taken = self._circles[: self._taken]
        dx, dy = taken[:, 0] - x, taken[:, 1] - y
        beside = np.abs(along * dx + across * dy) - length / 2, np.abs(along * dy - across * dx) - width / 2
        return bool((np.maximum(*beside) > taken[:, 2]).all())

    def add(
        self,
        name: str,
        u: float,
        v: float,
        yaw: float,
        *,
        speed: float = 0.0,
        size: tuple[float, float, float] | None = None,
        slack: float = 1.0,
    ) -> bool:
        """Stand an object on the ground of the road frame, if there is room; `slack` below 1 allows a tight fit."""
        length, width, height = draw_size(name, self.random) if size is None else size
        x, y = self.road.place(u, v)
        if math.hypot(x, y) > REACH_M:
            return False
        heading = yaw + self.road.heading
        count = max(1, math.ceil(length / max(width, 0.3)))
        radius = 0.95 * slack * math.hypot(width / 2, length / count / 2)
        places = [((i + 0.5) / count - 0.5) * length for i in range(count)]
        circles = [(x + math.cos(heading) * s, y + math.sin(heading) * s) for s in places]
        velocity = speed * math.cos(heading), speed * math.sin(heading)
        if not all(self.is_free(*circle, radius) for circle in circles):
            return False
        if speed and self._met_own_car(circles, radius, velocity):
            return False
        for circle in circles:
            self.claim(*circle, radius)
        ground = self.floor(x, y)
        owner = len(self._labels)
        self._labels.append(CLASS_NAMES.index(name))
        self._objects.append((x, y, ground + height / 2, length, width, height, heading, *velocity))
        thing = Placed(x=x, y=y, ground=ground, yaw=heading, length=length, width=width, height=height, owner=owner)
        build(name, thing, self.primitives, self.random)
        return True

    def _met_own_car(self, circles: list[tuple[float, float]], radius: float, velocity: tuple[float, float]) -> bool:
        """Whether a moving object would have been where the own car was during an earlier sweep."""
        for pose in self._poses:
            own_x, own_y = pose.origin[0] + velocity[0] * pose.lag_s, pose.origin[1] + velocity[1] * pose.lag_s
            if any(math.hypot(x - own_x, y - own_y) < radius + _PATH_M for x, y in circles):
                return True
        return False

    def objects(self) -> Float64[np.ndarray, "objects 9"]:
        """Centre, size, yaw and velocity of the labelled objects, in the ego frame on the ground."""
        return np.array(self._objects, dtype=np.float64).reshape(-1, 9)

    def labels(self) -> Int64[np.ndarray, " objects"]:
        """Index of each object's class in `CLASS_NAMES`."""
        return np.array(self._labels, dtype=np.int64)
