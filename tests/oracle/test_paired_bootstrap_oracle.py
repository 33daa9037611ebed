"""The paired bootstrap against a plain twin that copies frames, matches them one by one and averages by hand."""

import math
import random

import numpy as np
import pytest

from dm3d_deploy.evaluation.nuscenes import Truth
from dm3d_deploy.evaluation.paired import class_hits, paired_changes, resampled_ap
from dm3d_deploy.pointcloud import Boxes3D, Detections

NAMES = ("car", "pedestrian", "bus")
GRID = np.linspace(0, 1, 101).tolist()  # rounding decides whether a recall of 0.29 was reached: the devkit's grid
REACH_M = {"car": 50.0, "pedestrian": 40.0, "bus": 50.0}


def plain_ap(frames, name, radius_m):
    """`frames` are ([(class, x, y, score)], [(class, x, y)]) pairs; the AP of the devkit, in lists and loops."""
    taken = [[False] * len(truth) for _, truth in frames]
    near = lambda x, y: math.hypot(x, y) < REACH_M[name]  # noqa: E731
    wanted = sum(1 for _, truth in frames for c, x, y in truth if c == name and near(x, y))
    if not wanted:
        return None
    rows = [(s, i, x, y) for i, (found, _) in enumerate(frames) for c, x, y, s in found if c == name and near(x, y)]
    rows.sort(key=lambda row: -row[0])
    curve, right = [], 0
    for count, (_, i, x, y) in enumerate(rows, start=1):
        best, at = radius_m, None
        for place, (c, u, v) in enumerate(frames[i][1]):
            away = math.hypot(u - x, v - y)
            if c == name and near(u, v) and not taken[i][place] and away < best:
                best, at = away, place
        if at is not None:
            taken[i][at] = True
            right += 1
        curve.append((right / wanted, right / count))
    total = 0.0
    for recall in GRID[11:]:
        total += max(0.0, read(curve, recall) - 0.1) / 0.9 if right else 0.0
    return total / 90


def read(curve, recall):
    """Linear between the points, of one recall's points the last; constant before the first, 0 behind the last."""
    if recall > curve[-1][0]:
        return 0.0
    before = [point for point in curve if point[0] <= recall]
    after = [point for point in curve if point[0] > recall]
    if not before:
        return curve[0][1]
    if not after or before[-1][0] == recall:
        return before[-1][1]
    share = (recall - before[-1][0]) / (after[0][0] - before[-1][0])
    return before[-1][1] + share * (after[0][1] - before[-1][1])


def mean_ap(frames, name):
    values = [plain_ap(frames, name, radius) for radius in (0.5, 1.0, 2.0, 4.0)]
    return None if values[0] is None else sum(values) / 4


def world(seed, frames=9):
    """Truth, and two detectors that see it with noise; no two scores are alike."""
    dice = random.Random(seed)
    scores = [i / 10_000 for i in range(1, 10_000)]
    dice.shuffle(scores)
    truths, seen = [], ([], [])
    for _ in range(frames):
        objects = range(dice.randrange(3, 11))
        truth = [(dice.choice(NAMES), dice.uniform(-45, 45), dice.uniform(-15, 15)) for _ in objects]
        truths.append(truth)
        for found, noise, hits in ((seen[0], 0.5, 0.9), (seen[1], 1.2, 0.7)):
            rows = [
                (c, x + dice.gauss(0, noise), y + dice.gauss(0, noise), scores.pop())
                for c, x, y in truth if dice.random() < hits
            ]  # fmt: skip
            rows += [(dice.choice(NAMES), dice.uniform(-45, 45), dice.uniform(-9, 9), scores.pop()) for _ in range(3)]
            found.append(rows)
    return truths, seen


def boxes(rows):
    centre = np.array([(row[1], row[2], 0.0) for row in rows], dtype=np.float32).reshape(-1, 3)
    count = len(centre)
    return Boxes3D(
        centre=centre, size=np.ones((count, 3), np.float32), yaw=np.zeros(count, np.float32),
        velocity=np.zeros((count, 2), np.float32),
    )  # fmt: skip


def labels(rows):
    return np.array([NAMES.index(row[0]) for row in rows], dtype=np.int64)


def detections(rows):
    ordered = sorted(rows, key=lambda row: -row[3])
    scores = np.array([row[3] for row in ordered], dtype=np.float32)
    return Detections(boxes=boxes(ordered), scores=scores, labels=labels(ordered), class_names=NAMES)


def as_stored(rows):
    """Places and scores as the arrays hold them, in 32 bits."""
    return [(row[0], *(float(np.float32(v)) for v in row[1:])) for row in rows]


@pytest.mark.parametrize("seed", range(6))
def test_changes_and_intervals_are_those_of_copied_frames(seed: int) -> None:
    truths, seen = world(seed)
    found = [[detections(rows) for rows in own] for own in seen]
    truth = [Truth(boxes=boxes(rows), labels=labels(rows)) for rows in truths]
    plain = [list(zip(map(as_stored, own), map(as_stored, truths), strict=True)) for own in seen]
    times = np.random.default_rng(seed).multinomial(len(truths), np.full(len(truths), 1 / len(truths)), size=40)
    groups = {"car": ("car",), "everything": NAMES}
    told = paired_changes(*found, truth, groups, times=times)
    present = [name for name in NAMES if mean_ap(plain[0], name) is not None]
    for group, members in groups.items():
        members = [name for name in members if name in present]
        drawn = []
        for draw in (np.ones(len(truths), dtype=int), *times):
            copies = [[frame for frame, n in zip(own, draw, strict=True) for _ in range(n)] for own in plain]
            pairs = [(mean_ap(copies[0], name), mean_ap(copies[1], name)) for name in members]
            own = [100 * (b - a) for a, b in pairs if a is not None]
            drawn.append(sum(own) / len(own) if own else None)
        assert told[group].points == pytest.approx(drawn[0], abs=1e-9)
        assert told[group].interval_points == pytest.approx(
            tuple(np.percentile([v for v in drawn[1:] if v is not None], [2.5, 97.5])), abs=1e-9
        )


def test_the_twin_differs_where_a_detector_does() -> None:
    """A guard on the oracle: its two detectors are not equally good, and neither is perfect."""
    truths, seen = world(0)
    values = [mean_ap(list(zip(own, truths, strict=True)), "car") for own in seen]
    assert 0.05 < values[1] < values[0] < 0.99


def test_every_frame_once_is_the_plain_ap() -> None:
    truths, seen = world(1)
    truth = [Truth(boxes=boxes(rows), labels=labels(rows)) for rows in truths]
    hits = class_hits([detections(rows) for rows in seen[0]], truth, 0)
    plain = mean_ap(list(zip(map(as_stored, seen[0]), map(as_stored, truths), strict=True)), "car")
    assert resampled_ap(hits, np.ones(len(truths), dtype=np.int64)) == pytest.approx(plain, abs=1e-12)
