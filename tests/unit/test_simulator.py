"""What a simulated frame promises, whatever the seed."""

from __future__ import annotations

import numpy as np
import pytest

from calib.simulator import CLASS_NAMES, SENSORS, simulate_frame
from dm3d_deploy.errors import UsageError


@pytest.mark.parametrize("sensor", sorted(SENSORS))
def test_the_same_seed_gives_the_same_bits(sensor: str) -> None:
    first, second = (simulate_frame(7, sensor=sensor, sweeps=2) for _ in range(2))
    assert first.cloud.points.tobytes() == second.cloud.points.tobytes()
    assert first.boxes.centre.tobytes() == second.boxes.centre.tobytes()
    assert np.array_equal(first.num_points, second.num_points)
    other = simulate_frame(8, sensor=sensor, sweeps=2)
    assert other.cloud.points.tobytes() != first.cloud.points.tobytes()


def test_an_unknown_sensor_is_refused_with_the_nearest_spelling() -> None:
    with pytest.raises(UsageError, match=r"no simulated sensor 'hdl46'; did you mean 'hdl64'\?"):
        simulate_frame(0, sensor="hdl46")


def test_no_sweep_is_no_frame() -> None:
    with pytest.raises(UsageError, match="a frame of 0 sweeps has no points"):
        simulate_frame(0, sweeps=0)


def test_a_negative_share_of_rare_classes_is_refused() -> None:
    with pytest.raises(UsageError, match=r"cannot be multiplied by -1\.0"):
        simulate_frame(0, rare=-1.0)


def test_class_names_are_nuscenes_in_the_order_of_openpcdet() -> None:
    assert CLASS_NAMES[:5] == ("car", "truck", "construction_vehicle", "bus", "trailer")
    assert CLASS_NAMES[5:] == ("barrier", "motorcycle", "bicycle", "pedestrian", "traffic_cone")
