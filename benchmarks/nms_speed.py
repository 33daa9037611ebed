"""Milliseconds of rotated NMS over 4,096 boxes on one core, by how the boxes lie and by threshold.

Run it on the core it is meant for: `OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.nms_speed`.
"""

from __future__ import annotations

import time

import numpy as np

from dm3d_deploy.geometry.nms import rotated_nms
from dm3d_deploy.pointcloud import Boxes3D

BOXES, REACH_M, REPEATS = 4096, 50.0, 30
CAR_M = (4.5, 1.9, 1.6)
ALIKE, ANY_HEADING = 0.1, np.pi  # radians that the boxes of one object differ by
SCENES = {  # how many objects, and how alike their boxes' headings are
    "every box alone": (4096, ALIKE),
    "512 objects": (512, ALIKE),
    "64 objects": (64, ALIKE),
    "8 piles of 512": (8, ALIKE),
    "one pile": (1, ALIKE),
    "64 objects, any heading": (64, ANY_HEADING),
    "8 piles, any heading": (8, ANY_HEADING),
    "one pile, any heading": (1, ANY_HEADING),
}
THRESHOLDS = (0.01, 0.2, 0.7)  # those of OpenPCDet's anchor heads, centre heads and proposals
POST = 500  # the most that OpenPCDet's models ask for


def scene(objects: int, heading: float, rng: np.random.Generator) -> Boxes3D:
    """Cars: each object's boxes lie within half a metre and `heading` radians of it, by their standard deviation."""
    each = BOXES // objects
    centre = rng.uniform(-REACH_M, REACH_M, (objects, 2)).repeat(each, axis=0) + rng.normal(0, 0.5, (BOXES, 2))
    yaw = rng.uniform(-np.pi, np.pi, objects).repeat(each) + rng.normal(0, heading, BOXES)
    return _boxes(centre, np.array(CAR_M) * rng.uniform(0.8, 1.2, (BOXES, 3)), yaw)


def anchor_candidates(rng: np.random.Generator) -> Boxes3D:
    """What an anchor head hands over: half of it around 32 cars, half of it pedestrians' anchors all over the map."""
    cars = scene(32, ALIKE, rng)
    anywhere = np.arange(BOXES) % 2 == 1
    cell = np.round(rng.uniform(-REACH_M, REACH_M, (BOXES, 2)) / 0.4) * 0.4
    small = np.array([0.8, 0.6, 1.73]) * rng.normal(1, 0.05, (BOXES, 3))
    quarter = rng.integers(0, 2, BOXES) * np.pi / 2 + rng.normal(0, 0.1, BOXES)
    return _boxes(
        np.where(anywhere[:, None], cell, cars.centre[:, :2]),
        np.where(anywhere[:, None], small, cars.size),
        np.where(anywhere, quarter, cars.yaw),
    )


def _boxes(centre: np.ndarray, size: np.ndarray, yaw: np.ndarray) -> Boxes3D:
    return Boxes3D(
        centre=np.c_[centre, np.zeros(BOXES)].astype(np.float32),
        size=size.astype(np.float32),
        yaw=yaw.astype(np.float32),
        velocity=np.zeros((BOXES, 2), np.float32),
    )


def main() -> None:
    rng = np.random.default_rng(0)
    scenes = {name: scene(*how, rng) for name, how in SCENES.items()} | {"anchors": anchor_candidates(rng)}
    print(f"{BOXES:,} boxes, at most {POST} kept: ms, best, median and worst of {REPEATS}, and how many stayed")
    print(f"{'threshold':>24}" + "".join(f"{threshold:>30g}" for threshold in THRESHOLDS))
    for name, boxes in scenes.items():
        scores = rng.random(BOXES).astype(np.float32)
        cells = []
        for threshold in THRESHOLDS:
            took = []
            for _ in range(REPEATS):
                start = time.perf_counter()
                kept = rotated_nms(boxes, scores, threshold, BOXES, POST)
                took.append((time.perf_counter() - start) * 1e3)
            cells.append(f"{min(took):.1f} {np.median(took):.1f} {max(took):.1f} ({len(kept)})")
        print(f"{name:>24}" + "".join(f"{cell:>30}" for cell in cells))


if __name__ == "__main__":
    main()
