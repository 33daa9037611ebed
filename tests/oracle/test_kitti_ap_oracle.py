"""KITTI's AP against a slow twin that clips polygons and loops over thresholds, objects and detections one by one."""

import math

import numpy as np
import pytest

from dm3d_deploy.evaluation.kitti import KittiFound, KittiTruth, kitti_rows
from dm3d_deploy.pointcloud import Boxes3D

LIMITS = {"easy": (40, 0, 0.15), "moderate": (25, 1, 0.3), "hard": (25, 2, 0.5)}
RANGES = {"0-30 m": (0, 30), "30-50 m": (30, 50), "50+ m": (50, 1e9)}
LEAST = {"Car": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5}
BESIDE = {"Car": "Van", "Pedestrian": "Person_sitting"}


def corners(box):
    x, y, _, length, width, _, yaw = box
    c, s = math.cos(yaw), math.sin(yaw)
    return [(x + c * a - s * b, y + s * a + c * b)
            for a, b in ((length / 2, width / 2), (-length / 2, width / 2), (-length / 2, -width / 2),
                         (length / 2, -width / 2))]  # fmt: skip


def clipped(polygon, a, b):
    """The part of a polygon left of the line a -> b."""
    kept = []
    for index, p in enumerate(polygon):
        q = polygon[(index + 1) % len(polygon)]
        side_p = (b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0])
        side_q = (b[0] - a[0]) * (q[1] - a[1]) - (b[1] - a[1]) * (q[0] - a[0])
        if side_p >= 0:
            kept.append(p)
        if side_p * side_q < 0:
            t = side_p / (side_p - side_q)
            kept.append((p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1])))
    return kept


def overlap(one, other, measure):
    if math.dist(one[:2], other[:2]) > 10:
        return 0.0
    polygon, frame = corners(one), corners(other)
    for index in range(4):
        if polygon:
            polygon = clipped(polygon, frame[index], frame[(index + 1) % 4])
    area = 0.0
    for index, p in enumerate(polygon):
        q = polygon[(index + 1) % len(polygon)]
        area += (p[0] * q[1] - q[0] * p[1]) / 2
    if measure == "bev":
        return area / (one[3] * one[4] + other[3] * other[4] - area)
    top = min(one[2] + one[5] / 2, other[2] + other[5] / 2)
    shared = area * max(0.0, top - max(one[2] - one[5] / 2, other[2] - other[5] / 2))
    return shared / (one[3] * one[4] * one[5] + other[3] * other[4] * other[5] - shared)


def in_area(box, area, least):
    wide = min(box[2], area[2]) - max(box[0], area[0])
    high = min(box[3], area[3]) - max(box[1], area[1])
    return wide > 0 and high > 0 and wide * high / ((box[2] - box[0]) * (box[3] - box[1])) > least


def flags(frame, name, subset):
    """Lists of 0 counts, 1 ignored, -1 absent; objects, then detections."""
    height, occlusion, truncation = LIMITS.get(subset, LIMITS["hard"])
    near, far = RANGES.get(subset, (0, 1e9))
    objects, found = [], []
    for o in frame["objects"]:
        if o["type"] == name:
            hidden = o["occlusion"] > occlusion or o["truncation"] > truncation or o["px"][3] - o["px"][1] <= height
            objects.append(1 if hidden or not near <= math.hypot(*o["box"][:2]) < far else 0)
        else:
            objects.append(1 if o["type"] == BESIDE.get(name) else -1)
    for d in frame["found"]:
        flag = 0 if d["type"] == name else -1
        outside = flag == 0 and not near <= math.hypot(*d["box"][:2]) < far
        if outside or d["px"][3] - d["px"][1] < height:
            flag = 1
        found.append(flag)
    return objects, found


def hits_of(frame, objects, found, overlaps, least):
    scores, taken = [], set()
    for i, flag in enumerate(objects):
        if flag == -1:
            continue
        best = None
        for j, d in enumerate(frame["found"]):
            good = found[j] != -1 and j not in taken and overlaps[i][j] > least
            if good and (best is None or d["score"] > frame["found"][best]["score"]):
                best = j
        if best is not None:
            taken.add(best)
            if flag == 0 and found[best] == 0:
                scores.append(frame["found"][best]["score"])
    return scores


def counts_at(frame, objects, found, overlaps, least, threshold):
    true, taken = 0, set()
    for i, flag in enumerate(objects):
        if flag == -1:
            continue
        best, best_overlap, is_ignored = None, 0.0, False
        for j, d in enumerate(frame["found"]):
            if found[j] == -1 or j in taken or d["score"] < threshold or not overlaps[i][j] > least:
                continue
            if found[j] == 0 and (overlaps[i][j] > best_overlap or is_ignored):
                best, best_overlap, is_ignored = j, overlaps[i][j], False
            elif found[j] == 1 and best is None:
                best, is_ignored = j, True
        if best is not None:
            taken.add(best)
            true += flag == 0 and not is_ignored
    false = 0
    for j, d in enumerate(frame["found"]):
        if found[j] == 0 and j not in taken and d["score"] >= threshold:
            false += not any(in_area(d["px"], area, least) for area in frame["areas"])
    return true, false


def overlaps_of(frame, measure):
    return [[overlap(o["box"], d["box"], measure) for d in frame["found"]] for o in frame["objects"]]


def slow_ap(frames, matrices, name, subset):
    """(objects, R40, R11)."""
    least = LEAST[name]
    sides = [flags(frame, name, subset) for frame in frames]
    objects = sum(side[0].count(0) for side in sides)
    if objects == 0:
        return 0, None, None
    scores = []
    for frame, (own, found), matrix in zip(frames, sides, matrices, strict=True):
        scores += hits_of(frame, own, found, matrix, least)
    scores.sort(reverse=True)
    thresholds, wanted = [], 0.0
    for i, score in enumerate(scores):
        left = (i + 1) / objects
        right = (i + 2) / objects if i < len(scores) - 1 else left
        if right - wanted < wanted - left and i < len(scores) - 1:
            continue
        thresholds.append(score)
        wanted += 1 / 40
        while objects < 41 and left + right + 1e-6 > 2 * wanted and len(thresholds) < 41:
            thresholds.append(score)
            wanted += 1 / 40
    precision = [0.0] * 41
    for place, threshold in enumerate(thresholds):
        true = false = 0
        for frame, (own, found), matrix in zip(frames, sides, matrices, strict=True):
            t, f = counts_at(frame, own, found, matrix, least, threshold)
            true, false = true + t, false + f
        precision[place] = true / (true + false) if true + false else 0.0
    best = [max(precision[place:]) for place in range(41)]
    return objects, 100 * sum(best[1:]) / 40, 100 * sum(best[::4]) / 11


def scene(rng, crowd):
    """Objects of all types around the sensor, detections near most of them and some of nothing."""
    types = ["Car", "Car", "Van", "Pedestrian", "Person_sitting", "Cyclist", "Truck"]
    sizes = {"Pedestrian": (0.8, 0.6, 1.7), "Person_sitting": (0.8, 0.6, 1.3), "Cyclist": (1.8, 0.6, 1.7)}
    objects, found = [], []
    for _ in range(crowd):
        word = str(rng.choice(types))
        size = np.array(sizes.get(word, (4.2, 1.8, 1.6))) * rng.uniform(0.9, 1.1, 3)
        x, y = rng.uniform(5, 70), rng.uniform(-15, 15)
        box = [x, y, rng.uniform(-1, -0.5), *size, rng.uniform(-3.1, 3.1)]
        left, top = rng.uniform(0, 1100), rng.uniform(100, 200)
        pixels = [left, top, left + 40, top + float(rng.choice([20, 25, 30, 40, 60]))]
        objects.append({"type": word, "box": box, "px": pixels, "occlusion": int(rng.integers(0, 4)) // 2,
                        "truncation": float(rng.choice([0, 0, 0.2, 0.4]))})  # fmt: skip
        for _ in range(int(rng.integers(0, 3))):
            moved = np.array(box) + rng.normal(0, 1, 7) * (0.05, 0.05, 0.05, 0.1, 0.05, 0.05, 0.05)
            guess = word if rng.random() < 0.8 else str(rng.choice(types))
            shifted = [p + rng.normal(0, 3) for p in pixels[:3]] + [pixels[3] + abs(rng.normal(0, 3))]
            found.append({"type": guess, "box": moved.tolist(), "px": shifted, "score": round(rng.random(), 2)})
    for _ in range(crowd // 3):
        box = [rng.uniform(5, 70), rng.uniform(-15, 15), -1, 4, 1.7, 1.5, rng.uniform(-3, 3)]
        left = rng.uniform(0, 1100)
        found.append({"type": "Car", "box": box, "px": [left, 150, left + 50, 195], "score": round(rng.random(), 2)})
    areas = [[a, 120, a + 250, 260] for a in rng.uniform(0, 1000, 2)]
    return {"objects": objects, "found": found, "areas": areas}


def boxes_of(rows):
    table = np.array([row["box"] for row in rows], dtype=np.float64).reshape(-1, 7).astype(np.float32)
    rest = np.zeros((len(table), 2), np.float32)
    return Boxes3D(centre=table[:, :3], size=table[:, 3:6], yaw=table[:, 6], velocity=rest)


def ours(frame):
    objects, found = frame["objects"], frame["found"]
    truth = KittiTruth(
        boxes=boxes_of(objects),
        types=tuple(o["type"] for o in objects),
        image_px=np.array([o["px"] for o in objects]).reshape(-1, 4),
        truncation=np.array([o["truncation"] for o in objects]),
        occlusion=np.array([o["occlusion"] for o in objects], dtype=np.int64),
        dont_care_px=np.array(frame["areas"]).reshape(-1, 4),
    )
    seen = KittiFound(
        boxes=boxes_of(found),
        types=tuple(d["type"] for d in found),
        scores=np.array([d["score"] for d in found], dtype=np.float64),
        image_px=np.array([d["px"] for d in found]).reshape(-1, 4),
    )
    return truth, seen


@pytest.mark.parametrize(("seed", "frames", "crowd"), [(0, 1, 6), (1, 4, 12), (2, 6, 60), (3, 2, 1), (4, 3, 30)])
def test_every_row_is_that_of_the_slow_twin(seed: int, frames: int, crowd: int) -> None:
    rng = np.random.default_rng(seed)
    scenes = [scene(rng, crowd) for _ in range(frames)]
    truths, founds = zip(*[ours(frame) for frame in scenes], strict=True)
    rows = kitti_rows(truths, founds)
    assert len(rows) == 2 * 3 * 6 * 2
    matrices = {measure: [overlaps_of(frame, measure) for frame in scenes] for measure in ("3d", "bev")}
    positive = 0
    for row in rows:
        measure, kind = row.measure.split()
        objects, r40, r11 = slow_ap(scenes, matrices[measure], row.class_name, row.subset)
        expected = r40 if kind == "R40" else r11
        assert row.objects == objects
        if expected is None:
            assert row.ap_percent is None
        else:
            assert row.ap_percent == pytest.approx(expected, abs=1e-9), row
            positive += expected > 0
    assert positive >= (4 if crowd > 1 else 0)
    assert (max(row.objects for row in rows) > 41) == (crowd == 60)
