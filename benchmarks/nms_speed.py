"""Milliseconds of rotated NMS over 4,096 boxes on one core, by how the boxes lie and by threshold.

Run it on the core it is meant for: `OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.nms_speed`.
"""

from __future__ import annotations

import time

import numpy as np

from dm3d_deploy.geometry.nms import rotated_nms
from dm3d_deploy.pointcloud import Boxes3D

BOXES, REACH_M, REPEATS = 4096, 50.0, 5
CAR_M = (4.5, 1.9, 1.6)
OBJECTS = {"every box alone": 4096, "512 objects": 512, "64 objects": 64, "8 piles of 512": 8, "one pile": 1}
THRESHOLDS = (0.01, 0.2, 0.7)  # those of OpenPCDet's anchor heads, centre heads and proposals
POST = 500


def scene(objects: int, rng: np.random.Generator) -> Boxes3D:
    """Cars of any heading: each object's boxes lie within half a metre and a tenth of a radian of it."""
    each = BOXES // objects
    centre = rng.uniform(-REACH_M, REACH_M, (objects, 2)).repeat(each, axis=0) + rng.normal(0, 0.5, (BOXES, 2))
    yaw = rng.uniform(-np.pi, np.pi, objects).repeat(each) + rng.normal(0, 0.1, BOXES)
    return Boxes3D(
        centre=np.c_[centre, np.zeros(BOXES)].astype(np.float32),
        size=(np.array(CAR_M) * rng.uniform(0.8, 1.2, (BOXES, 3))).astype(np.float32),
        yaw=yaw.astype(np.float32),
        velocity=np.zeros((BOXES, 2), np.float32),
    )


def main() -> None:
    rng = np.random.default_rng(0)
    print(f"{BOXES:,} boxes, at most {POST} kept: ms, best of {REPEATS}, and how many stayed")
    print(f"{'threshold':>16}" + "".join(f"{threshold:>18g}" for threshold in THRESHOLDS))
    for name, objects in OBJECTS.items():
        boxes, scores = scene(objects, rng), rng.random(BOXES).astype(np.float32)
        cells = []
        for threshold in THRESHOLDS:
            took = []
            for _ in range(REPEATS):
                start = time.perf_counter()
                kept = rotated_nms(boxes, scores, threshold, BOXES, POST)
                took.append(time.perf_counter() - start)
            cells.append(f"{min(took) * 1e3:10.1f} ({len(kept):4})")
        print(f"{name:>16}" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    main()
