"""What a simulated frame promises, whatever the seed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from calib.simulator import CLASS_NAMES, SENSORS, SimulatedFrame, simulate_frame
from dm3d_deploy.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
SEEDS = range(8)
DIGEST = """
import hashlib
from calib.simulator import simulate_frame
frame = simulate_frame(7, sweeps=2)
print(hashlib.sha256(frame.cloud.points.tobytes() + frame.boxes.centre.tobytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def frames() -> dict[str, list[SimulatedFrame]]:
    return {sensor: [simulate_frame(seed, sensor=sensor) for seed in SEEDS] for sensor in SENSORS}


@pytest.mark.parametrize("sensor", sorted(SENSORS))
def test_the_same_seed_gives_the_same_bits(sensor: str, frames: dict[str, list[SimulatedFrame]]) -> None:
    first, second, other = frames[sensor][6], simulate_frame(6, sensor=sensor), frames[sensor][7]
    assert first.cloud.points.tobytes() == second.cloud.points.tobytes()
    assert first.boxes.centre.tobytes() == second.boxes.centre.tobytes()
    assert np.array_equal(first.num_points, second.num_points)
    assert first.cloud.points.tobytes() != other.cloud.points.tobytes()


def test_neither_threads_nor_hash_seeds_change_a_bit() -> None:
    frame = simulate_frame(7, sweeps=2)
    expected = hashlib.sha256(frame.cloud.points.tobytes() + frame.boxes.centre.tobytes()).hexdigest()
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2", "PYTHONHASHSEED": "123"}
    found = subprocess.run(
        [sys.executable, "-c", DIGEST], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == expected


def test_columns_and_scales_are_those_of_the_data_set(frames: dict[str, list[SimulatedFrame]]) -> None:
    for frame in frames["hdl64"]:
        assert frame.cloud.columns == ("x", "y", "z", "intensity")
        intensity = frame.cloud.column("intensity")
        assert intensity.min() >= 0
        assert 0.1 < np.median(intensity) < 0.5
        assert intensity.max() <= 1
    for frame in frames["nuscenes32"]:
        assert frame.cloud.columns == ("x", "y", "z", "intensity", "timestamp")
        intensity = frame.cloud.column("intensity")
        assert np.array_equal(intensity, np.rint(intensity))
        assert intensity.max() <= 255
        assert np.allclose(np.unique(frame.cloud.column("timestamp")), np.arange(10) * 0.05)
    medians = [float(np.median(frame.cloud.column("intensity"))) / 255 for frame in frames["nuscenes32"]]
    assert 0.03 < np.median(medians) < 0.08


def test_every_point_is_finite_and_within_reach_of_its_sensor(frames: dict[str, list[SimulatedFrame]]) -> None:
    for name, some in frames.items():
        sensor = SENSORS[name]
        for frame in some:
            points = frame.cloud.points
            assert np.isfinite(points).all()
            key = points if "timestamp" not in sensor.columns else points[frame.cloud.column("timestamp") == 0]
            reach = np.linalg.norm(key[:, :3] - [0, 0, sensor.lift_m.mean()], axis=1)
            assert reach.max() < sensor.max_range_m + 6 * sensor.range_noise_m + 0.6
            if not sensor.ego_returns:
                assert reach.min() > sensor.min_range_m - 0.6


def test_the_own_roof_shows_only_in_the_key_sweep(frames: dict[str, list[SimulatedFrame]]) -> None:
    for frame in frames["nuscenes32"]:
        near = (np.abs(frame.cloud.points[:, :2]) < 0.7).all(axis=1)
        near &= frame.cloud.points[:, 2] > -1.4
        lags = frame.cloud.column("timestamp")[near]
        assert (lags == 0).sum() > 5000
        assert (lags > 0).sum() < 100


def test_frames_are_about_as_large_as_real_ones(frames: dict[str, list[SimulatedFrame]]) -> None:
    for name, low, high in (("hdl64", 95_000, 130_000), ("nuscenes32", 190_000, 300_000), ("once40", 45_000, 72_000)):
        assert all(low < len(frame.cloud.points) < high for frame in frames[name]), name


def test_boxes_hold_the_points_they_count(frames: dict[str, list[SimulatedFrame]]) -> None:
    for frame in frames["hdl64"][:3]:
        points = frame.cloud.points[:, :3].astype(np.float64)
        for row in np.flatnonzero(frame.num_points):
            away = points - frame.boxes.centre[row]
            yaw = float(frame.boxes.yaw[row])
            turned = away @ np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
            inside = (np.abs(turned) <= frame.boxes.size[row] / 2 + 0.051).all(axis=1).sum()
            assert inside >= frame.num_points[row]


def test_labels_stand_on_the_ground(frames: dict[str, list[SimulatedFrame]]) -> None:
    gaps = []
    for frame in frames["hdl64"]:
        points = frame.cloud.points
        for centre, size in zip(frame.boxes.centre, frame.boxes.size, strict=True):
            if np.hypot(*centre[:2]) < 20:
                around = np.hypot(points[:, 0] - centre[0], points[:, 1] - centre[1]) < size[0] / 2 + 1.0
                if around.sum() > 100:
                    gaps.append(centre[2] - size[2] / 2 - np.quantile(points[around, 2], 0.02))
    assert len(gaps) > 50
    assert abs(np.median(gaps)) < 0.08
    assert np.mean(np.abs(gaps) < 0.5) > 0.95


def test_every_class_is_seen_and_rare_ones_more_when_asked() -> None:
    def seen(rare: float) -> np.ndarray:
        total = np.zeros(10, dtype=int)
        for seed in range(20):
            frame = simulate_frame(seed, sensor="once40", rare=rare)
            total += np.bincount(frame.labels[frame.num_points >= 5], minlength=10)
        return total

    plain, more = seen(1.0), seen(4.0)
    assert (plain > 0).all(), dict(zip(CLASS_NAMES, plain.tolist(), strict=True))
    large = [CLASS_NAMES.index(name) for name in ("truck", "construction_vehicle", "bus", "trailer")]
    assert more[large].sum() > 1.5 * plain[large].sum()


def test_objects_do_not_overlap(frames: dict[str, list[SimulatedFrame]]) -> None:
    for frame in frames["once40"]:
        centre, width = frame.boxes.centre[:, :2], frame.boxes.size[:, 1]
        apart = np.linalg.norm(centre[:, None] - centre, axis=2) + 1e3 * np.eye(len(centre))
        assert (apart > 0.35 * (width[:, None] + width)).all()


def test_an_unknown_sensor_is_refused_with_the_nearest_spelling() -> None:
    with pytest.raises(UsageError, match=r"no simulated sensor 'hdl46'; did you mean 'hdl64'\?"):
        simulate_frame(0, sensor="hdl46")


def test_no_sweep_is_no_frame() -> None:
    with pytest.raises(UsageError, match="a frame of 0 sweeps has no points"):
        simulate_frame(0, sweeps=0)


@pytest.mark.parametrize("rare", [-1.0, float("nan")])
def test_an_impossible_share_of_rare_classes_is_refused(rare: float) -> None:
    with pytest.raises(UsageError, match="share of rare classes cannot be multiplied by"):
        simulate_frame(0, rare=rare)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(UsageError, match="-3 is no seed"):
        simulate_frame(-3)


def test_class_names_are_nuscenes_in_the_order_of_openpcdet() -> None:
    assert CLASS_NAMES[:5] == ("car", "truck", "construction_vehicle", "bus", "trailer")
    assert CLASS_NAMES[5:] == ("barrier", "motorcycle", "bicycle", "pedestrian", "traffic_cone")
