"""The caster against a twin that walks along each ray in small steps and asks whether it is inside anything."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from calib.simulator.cast import Echoes, Pose, cast
from calib.simulator.ground import Ground, cast_ground
from calib.simulator.primitives import GROUND, Material, PrimitiveList, Primitives
from calib.simulator.sensor import SENSORS, Sensor

STEP_M = 0.01
STONE = Material(0.5)


def coarse_sensor() -> Sensor:
    """Few rays, two blocks of beams with different origins."""
    return dataclasses.replace(
        SENSORS["hdl64"],
        elevation_rad=tuple(np.deg2rad(np.linspace(-20, 12, 16)).tolist()),
        azimuth_steps=180,
        blocks=((7, 0.0), (9, 0.4)),
        max_range_m=40.0,
        min_range_m=0.5,
    )


def bumpy_ground(amplitude_m: float) -> Ground:
    nodes = np.arange(-40, 40.1, 0.25)
    height = amplitude_m * (np.sin(0.5 * nodes)[:, None] * np.cos(0.4 * nodes)[None, :] + 0.05 * nodes[None, :])
    flat = np.zeros_like(height, dtype=np.float32)
    return Ground(height=height.astype(np.float32), albedo=flat + 0.3, grass=flat, cell_m=0.25)


def random_solids(random: np.random.Generator, count: int) -> PrimitiveList:
    solids = PrimitiveList()
    for _ in range(count):
        course, far, yaw = random.uniform(-np.pi, np.pi), random.uniform(4, 20), random.uniform(-4, 4)
        foot = float(far * np.cos(course)), float(far * np.sin(course)), random.uniform(-0.5, 2)
        size = random.uniform(0.3, 2.5, 5)
        kind = random.integers(4)
        if kind == 0:
            shift = random.uniform(-0.5, 0.5)
            solids.frustum(foot, yaw, (size[0], size[1]), (size[2], size[3]), size[4], STONE, shift=shift)
        elif kind == 1:
            solids.ellipsoid(foot, yaw, (size[0], size[1], size[2]), STONE)
        elif kind == 2:
            solids.cylinder(foot, size[0], size[1], STONE)
        else:
            solids.wheel(foot, yaw, size[0], size[1], STONE)
    return solids


def inside_any(table: Primitives, moved: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Index of a primitive that holds each point, -1 for none."""
    found = np.full(len(points), -1)
    for row in range(len(table)):
        x, y, z = (points - moved[row]).T
        yaw = table.yaw[row]
        x, y = np.cos(yaw) * x + np.sin(yaw) * y, -np.sin(yaw) * x + np.cos(yaw) * y
        a, b, c, d, height, shift = table.size[row]
        if table.kind[row] == 0:
            up = z / height
            long, wide = a + (c - a) * up, b + (d - b) * up
            within = (up > 0) & (up < 1) & (np.abs(x - shift * up) < long / 2) & (np.abs(y) < wide / 2)
        elif table.kind[row] == 1:
            within = (x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2 < 1
        elif table.kind[row] == 2:
            within = (np.hypot(x, y) < a) & (np.abs(z) < c)
        else:
            within = (np.hypot(x, z) < a) & (np.abs(y) < b)
        found[within] = row
    return found


def walk(
    sensor: Sensor, pose: Pose, ground: Ground, table: Primitives, velocity: np.ndarray, rays: np.ndarray
) -> np.ndarray:
    """First distance along each ray that lies in a solid or under the ground, infinite for none."""
    steps = np.arange(STEP_M, sensor.max_range_m, STEP_M)
    moved = table.position.copy()
    moved[:, :2] -= velocity * pose.lag_s
    first = []
    for ray in rays:
        ring, column = divmod(int(ray), sensor.azimuth_steps)
        azimuth, slope = sensor.azimuth[column] + pose.yaw, sensor.elevation_rad[ring]
        along = np.array([np.cos(slope) * np.cos(azimuth), np.cos(slope) * np.sin(azimuth), np.sin(slope)])
        points = pose.origin + [0, 0, sensor.lift_m[ring]] + steps[:, None] * along
        met = (inside_any(table, moved, points) >= 0) | (points[:, 2] < ground.height_at(points[:, 0], points[:, 1]))
        first.append(steps[met.argmax()] if met.any() else np.inf)
    return np.array(first)


def depth_of(echoes: Echoes, count: int) -> np.ndarray:
    depth = np.full(count, np.inf)
    depth[echoes.ray] = echoes.range_m
    return depth


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ranges_agree_with_a_walk_along_each_ray(seed: int) -> None:
    random = np.random.Generator(np.random.PCG64(seed))
    sensor, ground = coarse_sensor(), bumpy_ground(0.3)
    table = random_solids(random, 25).table()
    velocity = random.uniform(-8, 8, (25, 2))
    poses = [
        Pose(origin=np.array([0.0, 0.0, 1.7]), yaw=0.0, lag_s=0.0),
        Pose(origin=np.array([-1.5, 0.4, 1.7]), yaw=-0.3, lag_s=0.2),
    ]
    echoes = cast(sensor, poses, ground, table, velocity, random)
    count = len(sensor.elevation_rad) * sensor.azimuth_steps
    depth = depth_of(echoes, 2 * count)
    for sweep, pose in enumerate(poses):
        rays = random.choice(count, 150, replace=False)
        expected = walk(sensor, pose, ground, table, velocity, rays)
        found = depth[sweep * count + rays]
        close = np.isclose(found, expected, atol=0.06) | (np.isinf(found) & np.isinf(expected))
        assert close.mean() > 0.97, (found[~close], expected[~close])


def test_no_echo_lies_inside_a_solid() -> None:
    random = np.random.Generator(np.random.PCG64(5))
    sensor, ground = SENSORS["hdl64"], bumpy_ground(0.0)
    table = random_solids(random, 60).table()
    pose = Pose(origin=np.array([0.0, 0.0, 1.7]), yaw=0.0, lag_s=0.0)
    echoes = cast(sensor, [pose], ground, table, np.zeros((60, 2)), random)
    start = pose.origin + np.outer(sensor.lift_m[echoes.ray // sensor.azimuth_steps], [0, 0, 1])
    reach = np.maximum(echoes.range_m - 0.01, 0)
    points = start + reach[:, None] * sensor.directions[:, echoes.ray].T
    on_solid = echoes.primitive >= 0
    assert on_solid.sum() > 2000
    assert (inside_any(table, table.position, points[on_solid]) >= 0).mean() < 0.002
    deeper = start + (reach + 0.03)[:, None] * sensor.directions[:, echoes.ray].T
    assert (inside_any(table, table.position, deeper[on_solid]) >= 0).mean() > 0.97


def test_a_moving_box_was_where_its_velocity_says() -> None:
    solids = PrimitiveList()
    solids.box((10.0, 0.0, 0.0), 0.0, (2.0, 2.0, 1.5), STONE)
    poses = [Pose(origin=np.array([0.0, 0.0, 1.7]), yaw=0.0, lag_s=lag) for lag in (0.0, 0.4)]
    sensor, random = coarse_sensor(), np.random.Generator(np.random.PCG64(0))
    echoes = cast(sensor, poses, bumpy_ground(0.0), solids.table(), np.array([[5.0, 0.0]]), random)
    count = len(sensor.elevation_rad) * sensor.azimuth_steps
    fronts = []
    for sweep in (0, 1):
        rows = (echoes.primitive == 0) & (echoes.ray // count == sweep)
        x = echoes.range_m[rows] * sensor.directions[0, echoes.ray[rows] % count]
        fronts.append(x.min())
    assert fronts[0] == pytest.approx(9.0, abs=1e-3)
    assert fronts[1] == pytest.approx(7.0, abs=1e-3)


def test_a_hill_hides_what_lies_behind_it() -> None:
    nodes = np.arange(-40, 40.1, 0.25)
    hill = 4 * np.exp(-np.square((np.broadcast_to(nodes[None, :], (len(nodes), len(nodes))) - 12) / 2))
    flat = np.zeros_like(hill, dtype=np.float32)
    ground = Ground(height=hill.astype(np.float32), albedo=flat, grass=flat, cell_m=0.25)
    sensor = coarse_sensor()
    ranges, cosine = cast_ground(ground, sensor, np.array([0.0, 0.0, 1.7]), 0.0)
    ahead = sensor.azimuth_steps // 2
    assert (ranges[:, ahead][np.asarray(sensor.elevation_rad) < np.deg2rad(8)] < 13).all()
    assert np.isinf(ranges[-1, 0])
    assert ((cosine >= 0) & (cosine <= 1)).all()


def test_flat_ground_is_met_at_height_over_sine() -> None:
    sensor = coarse_sensor()
    ranges, _ = cast_ground(bumpy_ground(0.0), sensor, np.array([0.0, 0.0, 1.7]), 0.4)
    sine = np.sin(sensor.elevation_rad)
    exact = np.where(sine < 0, -(1.7 + sensor.lift_m) / np.where(sine < 0, sine, -1), np.inf)
    seen = exact * np.cos(sensor.elevation_rad) < sensor.max_range_m
    assert np.allclose(ranges[seen], exact[seen, None], rtol=1e-4)
    assert np.isinf(ranges[sine > 0]).all()


def test_foliage_glass_and_fences_do_what_their_material_says() -> None:
    def shares(material: Material) -> tuple[float, float]:
        solids = PrimitiveList()
        solids.box((10.0, 0.0, -1.0), 0.0, (2.0, 30.0, 9.0), material)
        sensor, random = SENSORS["hdl64"], np.random.Generator(np.random.PCG64(0))
        pose = Pose(origin=np.array([0.0, 0.0, 1.7]), yaw=0.0, lag_s=0.0)
        echoes = cast(sensor, [pose], bumpy_ground(0.0), solids.table(), np.zeros((1, 2)), random)
        x = (echoes.range_m * sensor.directions[0, echoes.ray])[echoes.primitive == 0]
        return float(len(x)), float((x > 9.02).mean())

    full, none = shares(STONE)
    assert none == 0
    fence, _ = shares(Material(0.5, solid=0.4))
    assert fence / full == pytest.approx(0.4, abs=0.02)
    glass, behind = shares(Material(0.5, glass=0.5))
    assert glass / full == pytest.approx(0.5 + 0.5 * 0.35, abs=0.02)
    assert behind == pytest.approx(0.175 / 0.675, abs=0.02)
    leaves, inside = shares(Material(0.5, depth_m=0.5))
    assert inside > 0.9
    assert 0.95 < leaves / full < 1


def test_nothing_but_ground_gives_only_ground() -> None:
    random = np.random.Generator(np.random.PCG64(0))
    pose = Pose(origin=np.array([0.0, 0.0, 1.7]), yaw=0.0, lag_s=0.0)
    echoes = cast(coarse_sensor(), [pose], bumpy_ground(0.1), PrimitiveList().table(), np.zeros((0, 2)), random)
    assert (echoes.primitive == GROUND).all()
    assert len(echoes.ray) > 1000
