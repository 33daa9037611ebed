"""The comparison with real frames: what it measures, and that the simulator is within its bars."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from calib.simulator import compare
from calib.simulator.compare import FRAMES, Scan, car_points, ground_m, measures, read_kitti, simulate_scan
from dm3d_deploy.errors import FrameError


def write_frame(root: Path, name: str) -> None:
    for kind in ("velodyne", "label_2", "calib"):
        (root / "training" / kind).mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    ground = np.column_stack([random.uniform(-14, 14, (3000, 2)), np.full(3000, -1.7), np.full(3000, 0.3)])
    car = np.column_stack([random.uniform([11, -0.5, -1.4], [13, 0.5, -0.4], (200, 3)), np.full(200, 0.1)])
    cloud = np.concatenate([ground, car]).astype(np.float32)
    cloud.tofile(root / "training" / "velodyne" / f"{name}.bin")
    (root / "training" / "calib" / f"{name}.txt").write_text(
        "P2: 1 0 0 0 0 1 0 0 0 0 1 0\nR0_rect: 1 0 0 0 1 0 0 0 1\nTr_velo_to_cam: 0 -1 0 0 0 0 -1 0 1 0 0 0\n"
    )
    (root / "training" / "label_2" / f"{name}.txt").write_text(
        "Car 0 0 0 0 0 0 0 1.6 1.8 4.0 0.0 1.7 12.0 -1.5707963\nDontCare -1 -1 -10 0 0 0 0 -1 -1 -1 0 0 0 0\n"
    )


def test_boxes_of_the_camera_arrive_in_the_lidar_frame(tmp_path: Path) -> None:
    write_frame(tmp_path, "000000")
    scan = read_kitti(tmp_path, "000000")
    assert scan.cars == pytest.approx(np.array([[12.0, 0.0, -0.9, 4.0, 1.8, 1.6, 0.0]]), abs=1e-6)
    assert car_points(scan).tolist() == [[12.0, 200.0]]
    assert ground_m(scan.points) == pytest.approx(-1.7, abs=0.026)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_frame(tmp_path, "000000")
    (tmp_path / "training" / "calib" / "000000.txt").unlink()
    with pytest.raises(FrameError, match=r"there is no .*000000\.txt\. Fix: name a folder in the layout of the KITTI"):
        read_kitti(tmp_path, "000000")


def test_bins_without_cars_say_so() -> None:
    cloud = np.array([[10, 0, -1.7, 0.2], [10, 0, 0.5, 0.4]], dtype=np.float32)
    table = measures([Scan(points=cloud, cars=np.zeros((0, 7)))])
    assert table["points per car, 10-20 m, median (cars)"] == "- (0)"
    assert table["share of points above -1.2 m"] == "0.500 (0.50 to 0.50)"


def test_the_command_prints_both_sides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in FRAMES:
        write_frame(tmp_path, name)
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path), "--frames", "1"])
    compare.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "|  | KITTI | simulated |"
    assert "| points per frame | 3200 |" in lines[3]


@pytest.mark.data
def test_simulated_frames_are_within_their_bars(shared: Path) -> None:
    real = [read_kitti(shared / "data" / "kitti", name) for name in FRAMES]
    simulated = [simulate_scan(seed) for seed in range(60)]

    def mean(scans: list[Scan], measure: object) -> float:
        assert callable(measure)
        return float(np.mean([measure(scan.points) for scan in scans]))

    assert mean(simulated, len) == pytest.approx(mean(real, len), rel=0.10)
    assert mean(simulated, ground_m) == pytest.approx(mean(real, ground_m), abs=0.05)

    def structure(points: np.ndarray) -> float:
        return float((points[:, 2] > -1.2).mean())

    assert mean(simulated, structure) == pytest.approx(mean(real, structure), abs=0.05)
    seen = [np.concatenate([car_points(scan) for scan in scans]) for scans in (real, simulated)]
    compared = 0
    for near in (0, 10, 20, 30):
        chosen = [cars[(cars[:, 0] >= near) & (cars[:, 0] < near + 10), 1] for cars in seen]
        if len(chosen[0]):
            assert np.median(chosen[1]) == pytest.approx(np.median(chosen[0]), rel=0.30)
            compared += 1
    assert compared == 2
