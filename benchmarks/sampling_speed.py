"""Milliseconds of what PV-RCNN and Voxel R-CNN search in numpy, on one core: keypoints, neighbours, places of RoIs.

Run it on the core it is meant for: `OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.sampling_speed`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from calib.simulator import simulate_frame
from dm3d_deploy.config import DetectorConfig, load_config
from dm3d_deploy.geometry.pooling import PADDING_Z, pooled_geometry, stage_shape
from dm3d_deploy.geometry.sampling import farthest_points
from dm3d_deploy.geometry.voxelize import voxelize
from dm3d_deploy.pointcloud import Boxes3D

POINTS, KEYPOINTS, ROIS, REPEATS = 60_000, 2048, 100, 3
CAR_M = (4.5, 1.9, 1.6)


def best_ms(work: Callable[[], object]) -> float:
    """The shortest of `REPEATS` runs."""
    took = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return min(took) * 1e3


def rois_on(points: np.ndarray, rng: np.random.Generator) -> Boxes3D:
    """Boxes of a car's size, each around a point of the frame."""
    return Boxes3D(
        centre=points[rng.choice(len(points), ROIS), :3].copy(),
        size=np.tile(np.array(CAR_M, np.float32), (ROIS, 1)),
        yaw=rng.uniform(-np.pi, np.pi, ROIS).astype(np.float32),
        velocity=np.zeros((ROIS, 2), np.float32),
    )


def sites_of(config: DetectorConfig, coords: np.ndarray) -> dict[str, np.ndarray]:
    """Cells of the stages: those that a voxel lies in, fewer than the backbone's strided convolutions reach."""
    found = {"x_conv1": coords[:, 1:].astype(np.int64)}
    for stride, name in zip((2, 4, 8), PADDING_Z, strict=True):
        cells = np.minimum(coords[:, 1:] // stride, np.array(stage_shape(config, name)) - 1)
        found[name] = np.unique(cells, axis=0).astype(np.int64)
    return found


def main() -> None:
    rng = np.random.default_rng(0)
    cloud = rng.uniform(-70, 70, (POINTS, 3)).astype(np.float32)
    print(f"ms, best of {REPEATS}")
    print(
        f"{KEYPOINTS:,} of {POINTS:,} points, farthest first: {best_ms(lambda: farthest_points(cloud, KEYPOINTS)):.0f}"
    )
    frame = simulate_frame(0, sensor="hdl64").cloud
    for name in ("pv-rcnn", "voxel-rcnn"):
        config = load_config(name)
        voxels = voxelize(frame, config)
        boxes, sites = rois_on(frame.points, rng), sites_of(config, voxels.coords)
        took = best_ms(lambda config=config, boxes=boxes, sites=sites, points=voxels.points: pooled_geometry(
            config, boxes, sites, points
        ))  # fmt: skip
        print(f"{name}: {ROIS} RoIs in a simulated frame of {voxels.cells:,} voxels, all indices: {took:.0f}")


if __name__ == "__main__":
    main()
