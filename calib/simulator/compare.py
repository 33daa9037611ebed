"""Compare simulated HDL-64 frames with real ones: `python -m calib.simulator.compare FOLDER`.

FOLDER has the layout of the KITTI object benchmark (training/velodyne, label_2, calib). Only the frames that the
simulator was tuned on are read, 000000 to 000005; both sides are measured by the same functions.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64

from calib.readers import read_points
from calib.simulator.frame import simulate_frame
from calib.simulator.objects import CLASS_NAMES
from dm3d_deploy.errors import FrameError

FRAMES = tuple(f"{number:06d}" for number in range(6))
STRUCTURE_M = -1.2
CAR_BINS_M = ((5, 10), (10, 20), (20, 30), (30, 40))
_MIN_CAR_POINTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """Points x, y, z, intensity and the boxes of its cars: centre, size, yaw."""

    points: Float32[np.ndarray, "points 4"]
    cars: Float64[np.ndarray, "cars 7"]


def read_kitti(root: Path, name: str) -> Scan:
    """One labelled frame, its boxes moved from the camera into the LiDAR frame."""
    files = {
        kind: root / "training" / kind / f"{name}.{suffix}"
        for kind, suffix in (("velodyne", "bin"), ("label_2", "txt"), ("calib", "txt"))
    }
    for path in files.values():
        if not path.is_file():
            raise FrameError(f"there is no {path}.", fix="name a folder in the layout of the KITTI object benchmark")
    points = read_points(files["velodyne"], ("x", "y", "z", "intensity")).points
    entries = (line.split(":", 1) for line in files["calib"].read_text().splitlines() if ":" in line)
    matrices = {key: np.array(values.split(), dtype=np.float64) for key, values in entries}
    camera = np.eye(4)
    camera[:3] = matrices["R0_rect"].reshape(3, 3) @ matrices["Tr_velo_to_cam"].reshape(3, 4)
    lidar = np.linalg.inv(camera)
    cars = []
    for line in files["label_2"].read_text().splitlines():
        words = line.split()
        if words[0] == "Car":
            height, width, length, x, y, z, turn = map(float, words[8:15])
            centre = lidar @ np.array([x, y - height / 2, z, 1.0])
            cars.append([*centre[:3], length, width, height, -turn - np.pi / 2])
    return Scan(points=points, cars=np.array(cars).reshape(-1, 7))


def simulate_scan(seed: int) -> Scan:
    """One simulated frame with the cars in front, where the camera of the real set would label them."""
    frame = simulate_frame(seed, sensor="hdl64")
    centre = frame.boxes.centre
    cars = (frame.labels == CLASS_NAMES.index("car")) & (np.abs(centre[:, 1]) < centre[:, 0])
    boxes = np.column_stack([centre, frame.boxes.size, frame.boxes.yaw])[cars]
    return Scan(points=frame.cloud.points, cars=boxes.astype(np.float64))


def ground_m(points: Float32[np.ndarray, "points 4"]) -> float:
    """Height of the road: the densest 5 cm between 4 and 15 m."""
    distance = np.hypot(points[:, 0], points[:, 1])
    counts, edges = np.histogram(points[(distance > 4) & (distance < 15), 2], np.arange(-3.0, 0.0, 0.05))
    return float(edges[counts.argmax()] + 0.025)


def car_points(scan: Scan) -> Float64[np.ndarray, "cars 2"]:
    """Distance (m) and number of points in the box of every car that has at least five."""
    rows = []
    for x, y, z, length, width, height, yaw in scan.cars:
        away = scan.points[:, :3] - np.array([x, y, z])
        along = np.abs(np.cos(yaw) * away[:, 0] + np.sin(yaw) * away[:, 1])
        across = np.abs(np.cos(yaw) * away[:, 1] - np.sin(yaw) * away[:, 0])
        count = ((along < length / 2) & (across < width / 2) & (np.abs(away[:, 2]) < height / 2)).sum()
        if count >= _MIN_CAR_POINTS:
            rows.append((np.hypot(x, y), count))
    return np.array(rows, dtype=np.float64).reshape(-1, 2)


def measures(scans: list[Scan]) -> dict[str, str]:
    """What is compared, as text: means or medians over the frames."""
    clouds = [scan.points for scan in scans]
    shares = [float((cloud[:, 2] > STRUCTURE_M).mean()) for cloud in clouds]
    brightness = np.quantile(np.concatenate([cloud[:, 3] for cloud in clouds]), [0.1, 0.5, 0.9])
    distance = np.quantile(np.concatenate([np.hypot(cloud[:, 0], cloud[:, 1]) for cloud in clouds]), [0.1, 0.5, 0.9])
    table = {
        "frames": f"{len(scans)}",
        "points per frame": f"{np.mean([len(cloud) for cloud in clouds]):.0f}",
        "height of the road (m)": f"{np.mean([ground_m(cloud) for cloud in clouds]):.3f}",
        f"share of points above {STRUCTURE_M} m": f"{np.mean(shares):.3f} ({min(shares):.2f} to {max(shares):.2f})",
        "share of points above 0 m": f"{np.mean([float((cloud[:, 2] > 0).mean()) for cloud in clouds]):.3f}",
        "distance, 10 / 50 / 90 % (m)": " / ".join(f"{value:.1f}" for value in distance),
        "intensity, 10 / 50 / 90 %": " / ".join(f"{value:.2f}" for value in brightness),
    }
    cars = np.concatenate([car_points(scan) for scan in scans])
    for near, far in CAR_BINS_M:
        chosen = cars[(cars[:, 0] >= near) & (cars[:, 0] < far), 1]
        median = f"{np.median(chosen):.0f}" if len(chosen) else "-"
        table[f"points per car, {near}-{far} m, median (cars)"] = f"{median} ({len(chosen)})"
    return table


def main() -> None:
    """Print the comparison as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--frames", type=int, default=100, help="simulated frames, seeds 0 upwards")
    options = parser.parse_args()
    real = measures([read_kitti(options.folder, name) for name in FRAMES])
    simulated = measures([simulate_scan(seed) for seed in range(options.frames)])
    rows = [("", "KITTI", "simulated"), ("---", "---", "---")]
    rows += [(name, real[name], simulated[name]) for name in real]
    print("\n".join("| " + " | ".join(row) + " |" for row in rows))


if __name__ == "__main__":
    main()
