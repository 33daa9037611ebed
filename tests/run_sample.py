"""A tiny recipe with frames of its own, for the tests that need a whole run."""

from pathlib import Path

import numpy as np

from dm3d_deploy.recipe import Recipe

TINY = Path(__file__).parent / "fixtures" / "centerpoint-tiny.yaml"
FRAMES = 5
POINTS = 1500


def points_of(seed, columns=4):
    """Ground and a few boxes within the tiny model's range; column 4 is the intensity, column 5 the ring."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(-12, 12, (POINTS, columns)).astype(np.float32)
    points[:, 2] = rng.normal(-1.7, 0.05, POINTS)
    centres = rng.uniform(-9, 9, (6, 2))
    chosen = rng.integers(0, 6, POINTS // 2)
    points[: len(chosen), :2] = centres[chosen] + rng.uniform(-1, 1, (len(chosen), 2))
    points[: len(chosen), 2] = rng.uniform(-1.7, 0, len(chosen))
    points[:, 3] = rng.integers(0, 256, POINTS)
    if columns > 4:
        points[:, 4] = rng.integers(0, 32, POINTS)
    return points


def write_frames(folder, count=FRAMES):
    """Frames as .npy, and the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        np.save(folder / f"frame{seed}.npy", points_of(seed))
    return folder


def tiny_recipe(frames, **changes):
    """Two frames calibrate; `orin` has no engine that is built here, so the recipe needs no TensorRT."""
    given = {
        "model": str(TINY), "target": 0.5, "frames": str(frames), "device": "orin", "calibration_frames": 2,
        "bench_repeats": 2, "sketches": 1, "ratios": 20, "box_cells": 50,
    }  # fmt: skip
    return Recipe(**{**given, **changes})


def tree(root):
    """Every file below a folder: relative path -> (modification time in ns, bytes)."""
    return {
        str(path.relative_to(root)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


class Noted:
    """A watch that remembers which stages ran and which were fresh."""

    def __init__(self):
        self.ran, self.fresh, self.notes = [], [], []

    def started(self, stage, says):
        pass

    def advanced(self, done, total):
        assert 0 <= done <= total

    def finished(self, stage, seconds, fresh):
        (self.fresh if fresh else self.ran).append(stage)

    def noted(self, text):
        self.notes.append(text)
