"""Seconds to simulate a frame on one core: `OMP_NUM_THREADS=1 python -m benchmarks.simulator_speed`.

The time of the process is taken, so that other work on the machine counts little.
"""

from __future__ import annotations

import time

import numpy as np

from calib.simulator import SENSORS, simulate_frame
from calib.simulator.cast import Pose
from calib.simulator.frame import lay_out

SEEDS = range(40)


def primitives_in(sensor: str, seed: int) -> int:
    """Primitives of a street drawn for a sensor that stands still."""
    random = np.random.Generator(np.random.PCG64(seed))
    pose = Pose(origin=np.array([0.0, 0.0, SENSORS[sensor].height_m]), yaw=0.0, lag_s=0.0)
    return len(lay_out(SENSORS[sensor], [pose], random).primitives)


def main() -> None:
    print("| sensor | rays | sweeps | primitives, median | points, mean | median s | p90 s | max s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, sensor in SENSORS.items():
        simulate_frame(0, sensor=name)
        seconds, points = [], []
        for seed in SEEDS:
            start = time.process_time()
            frame = simulate_frame(seed, sensor=name)
            seconds.append(time.process_time() - start)
            points.append(len(frame.cloud.points))
        middle = np.median([primitives_in(name, seed) for seed in SEEDS])
        p90 = np.quantile(seconds, 0.9)
        rays = f"{len(sensor.elevation_rad)} x {sensor.azimuth_steps}"
        shown = f"{np.median(seconds):.3f} | {p90:.3f} | {max(seconds):.3f}"
        print(f"| {name} | {rays} | {sensor.sweeps} | {middle:.0f} | {np.mean(points):.0f} | {shown} |")


if __name__ == "__main__":
    main()
