"""Centre-distance AP against values worked out by hand and against a plain twin."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dm3d_deploy.errors import InternalError
from dm3d_deploy.evaluation.nuscenes import (
    DISTANCES_M,
    Truth,
    average_precision,
    match_by_distance,
    score_frames,
)
from dm3d_deploy.pointcloud import Boxes3D, Detections

NAMES = ("car", "pedestrian")


def boxes_at(places):
    places = np.array(places, dtype=np.float32).reshape(-1, 2)
    count = len(places)
    return Boxes3D(
        centre=np.concatenate([places, np.zeros((count, 1), np.float32)], axis=1),
        size=np.ones((count, 3), np.float32),
        yaw=np.zeros(count, np.float32),
        velocity=np.zeros((count, 2), np.float32),
    )


def truth(places, labels=None):
    boxes = boxes_at(places)
    return Truth(boxes=boxes, labels=np.array([0] * len(boxes) if labels is None else labels, dtype=np.int64))


def found(places, scores, labels=None):
    boxes = boxes_at(places)
    return Detections(
        boxes=boxes,
        scores=np.array(scores, dtype=np.float32),
        labels=np.array([0] * len(boxes) if labels is None else labels, dtype=np.int64),
        class_names=NAMES,
    )


def test_ground_truth_as_predictions_gives_one() -> None:
    places = [(5.0 * i, 3.0) for i in range(7)]
    labels = [0, 0, 1, 0, 1, 0, 1]
    score = score_frames([found(places, np.linspace(0.9, 0.3, 7), labels)], [truth(places, labels)])
    assert score.mean_ap == pytest.approx(1.0, abs=1e-12)
    assert {name: part.objects for name, part in score.classes.items()} == {"car": 4, "pedestrian": 3}
    assert set(score.classes["car"].ap_at_m) == set(DISTANCES_M)


def test_one_of_two_objects_found() -> None:
    """Recall ends at 0.5 with precision 1: of the 90 recalls 0.11..1.00, those up to 0.50 count 0.9 of 0.9."""
    score = score_frames([found([(10, 0)], [0.9])], [truth([(10, 0), (20, 0)])])
    assert score.classes["car"].ap == pytest.approx(40 / 90, abs=1e-12)


def test_a_better_false_alarm_halves_the_precision() -> None:
    """Order: miss, hit. Recall is 0 at precision 0, then 1 at 0.5; between, precision is 0.5 * recall."""
    score = score_frames([found([(30, 0), (10, 0)], [0.9, 0.8])], [truth([(10, 0)])])
    expected = sum(max(0.5 * r / 100 - 0.1, 0) for r in range(11, 101)) / 90 / 0.9
    assert score.classes["car"].ap == pytest.approx(expected, abs=1e-12)


def test_distance_decides() -> None:
    """1.5 m away: no hit at 0.5 and 1 m, a hit at 2 and 4 m; a distance equal to the limit is no hit."""
    score = score_frames([found([(11.5, 0)], [0.9])], [truth([(10, 0)])])
    assert score.classes["car"].ap_at_m == pytest.approx({0.5: 0, 1.0: 0, 2.0: 1, 4.0: 1})
    hits = match_by_distance([np.array([[12.0, 0]])], np.array([0.9]), [np.array([[10.0, 0]])], 2.0)
    assert not hits.any()


def test_an_object_is_found_once_by_the_better_score() -> None:
    hits = match_by_distance(
        [np.array([[10.2, 0], [10.0, 0]])], np.array([0.9, 0.8]), [np.array([[10.0, 0], [40.0, 0]])], 2.0
    )
    assert hits.tolist() == [True, False]


def test_the_nearest_free_object_is_taken() -> None:
    objects = [np.array([[0.0, 0], [1.0, 0]])]
    hits = match_by_distance([np.array([[0.9, 0], [0.8, 0]])], np.array([0.9, 0.8]), objects, 1.0)
    assert hits.tolist() == [True, True]


def test_frames_are_kept_apart() -> None:
    score = score_frames([found([(10, 0)], [0.9]), found([], [])], [truth([]), truth([(10, 0)])])
    assert score.classes["car"].ap == 0


def test_classes_are_cut_at_their_range() -> None:
    """A pedestrian counts to 40 m, a car to 50 m."""
    places = [(45, 0), (45, 3)]
    score = score_frames([found(places, [0.9, 0.9], [0, 1])], [truth(places, [0, 1])])
    assert set(score.classes) == {"car"}
    near = score_frames([found([(10, 0), (30, 0)], [0.9, 0.9])], [truth([(10, 0)])], between_m=(0, 20))
    assert near.classes["car"].ap == pytest.approx(1.0)


def test_no_hit_is_zero() -> None:
    assert average_precision(np.zeros(0, dtype=bool), 3) == 0
    assert average_precision(np.zeros(4, dtype=bool), 3) == 0


def test_no_evidence_is_refused() -> None:
    with pytest.raises(InternalError, match="0 frames of detections and 0 of truth"):
        score_frames([], [])
    with pytest.raises(InternalError, match="1 frames hold no object"):
        score_frames([found([(1, 1)], [0.5])], [truth([])])
    with pytest.raises(InternalError, match="1 boxes have 2 labels"):
        Truth(boxes=boxes_at([(1, 1)]), labels=np.zeros(2, dtype=np.int64))


def twin(detections, objects, limit):
    """The devkit's accumulate and calc_ap in plain loops; detections are (frame, x, y, score)."""
    total = sum(len(places) for places in objects)
    order = sorted(range(len(detections)), key=lambda i: (detections[i][3], i), reverse=True)
    taken, true, false, recalls, precisions = set(), 0, 0, [], []
    for i in order:
        frame, x, y, _ = detections[i]
        best, which = float("inf"), None
        for j, (ox, oy) in enumerate(objects[frame]):
            away = ((x - ox) ** 2 + (y - oy) ** 2) ** 0.5
            if (frame, j) not in taken and away < best:
                best, which = away, j
        if best < limit:
            taken.add((frame, which))
            true += 1
        else:
            false += 1
        recalls.append(true / total)
        precisions.append(true / (true + false))
    if not true:
        return 0.0
    ap = 0.0
    for r in range(11, 101):
        recall = r / 100
        if recall > recalls[-1] + 1e-12:
            break
        k = next((k for k in range(len(recalls)) if recalls[k] > recall + 1e-12), len(recalls))
        if k == len(recalls) or k == 0:
            value = precisions[-1] if k else precisions[0]
        else:
            part = (recall - recalls[k - 1]) / (recalls[k] - recalls[k - 1])
            value = precisions[k - 1] + part * (precisions[k] - precisions[k - 1])
        ap += max(value - 0.1, 0)
    return ap / 90 / 0.9


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_against_the_plain_twin(seed: int) -> None:
    random = np.random.default_rng(seed)
    # Seven objects: no recall k/7 but 1 falls on a hundredth, where the two would differ by rounding.
    counts = [3, 4, 0]
    objects = [random.uniform(0, 10, (count, 2)) for count in counts]
    places = [random.uniform(0, 10, (int(random.integers(0, 9)), 2)) for _ in counts]
    scores = random.permutation(np.linspace(0.1, 0.9, sum(map(len, places)) or 1))[: sum(map(len, places))]
    rows = [(frame, *place) for frame, part in enumerate(places) for place in part]
    plain = [(*row, score) for row, score in zip(rows, scores, strict=True)]
    for limit in DISTANCES_M:
        hits = match_by_distance(places, scores, objects, limit)
        assert average_precision(hits, 7) == pytest.approx(twin(plain, objects, limit), abs=1e-9)
