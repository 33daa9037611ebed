"""Matching of two sets of boxes, and the judge of their parity with every excuse that it knows and those it refuses."""

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dm3d_deploy.config import DetectorConfig, load_config
from dm3d_deploy.errors import InternalError
from dm3d_deploy.evidence import Comparison
from dm3d_deploy.geometry.matching import (
    BoxTolerance,
    boxes_comparison,
    by_class_and_range,
    match_detections,
)
from dm3d_deploy.pointcloud import Boxes3D, Detections

CONFIG = load_config("centerpoint")
TOLERANCE = BoxTolerance(centre_m=0.1, size_m=0.1, yaw_rad=0.05, velocity_mps=0.2, score=0.02)


def boxes(*rows: dict[str, object], class_names: tuple[str, ...] = CONFIG.class_names) -> Detections:
    """One car of 4 x 2 x 1.5 m per row, unless the row says otherwise."""

    def column(name: str, default: object) -> np.ndarray:
        return np.array([row.get(name, default) for row in rows], dtype=np.float32)

    return Detections(
        boxes=Boxes3D(
            centre=column("at", (0, 0, 0)).reshape(-1, 3),
            size=column("size", (4, 2, 1.5)).reshape(-1, 3),
            yaw=column("yaw", 0.0).reshape(-1),
            velocity=column("velocity", (0, 0)).reshape(-1, 2),
        ),
        scores=column("score", 0.8).reshape(-1),
        labels=np.array([class_names.index(str(row.get("kind", "car"))) for row in rows], dtype=np.int64),
        class_names=class_names,
    )


def judge(a: Detections, b: Detections, config: DetectorConfig = CONFIG) -> Comparison:
    return boxes_comparison([a], [b], names=("model", "engine"), tolerance=TOLERANCE, config=config)


def post(**values: object) -> DetectorConfig:
    return dataclasses.replace(CONFIG, post=dataclasses.replace(CONFIG.post, **values))


def test_nearest_pairs_go_first_within_their_class() -> None:
    a = boxes({"at": (0, 0, 0)}, {"at": (1, 0, 0)}, {"at": (5, 0, 0), "kind": "bus"})
    b = boxes({"at": (0.9, 0, 0)}, {"at": (5, 0, 0)}, {"at": (-0.6, 0, 0)})
    found = match_detections(a, b, max_centre_m=2.0)
    assert found.pairs.tolist() == [[0, 2], [1, 0]]
    assert found.missing.tolist() == [2]
    assert found.extra.tolist() == [1]
    assert found.centre_delta_m == pytest.approx([0.6, 0.1], abs=1e-6)


def test_equal_distances_go_to_the_lower_index_of_the_reference_then_of_the_candidate() -> None:
    a = boxes({"at": (0, 0, 0)}, {"at": (2, 0, 0)})
    assert match_detections(a, boxes({"at": (1, 0, 0)}), max_centre_m=2.0).pairs.tolist() == [[0, 0]]
    b = boxes({"at": (1, 0, 0)}, {"at": (-1, 0, 0)})
    assert match_detections(boxes({}), b, max_centre_m=2.0).pairs.tolist() == [[0, 0]]


def test_centres_too_far_apart_and_low_scores_take_no_part() -> None:
    a, b = boxes({"score": 0.5}, {"at": (9, 0, 0), "score": 0.2}), boxes({"at": (0, 0, 1.1), "score": 0.4})
    found = match_detections(a, b, max_centre_m=1.0, min_score=0.3)
    assert (found.pairs.tolist(), found.missing.tolist(), found.extra.tolist()) == ([], [0], [0])
    assert match_detections(a, b, max_centre_m=1.0, min_score=0.6).missing.tolist() == []


def test_differences_are_measured_pair_by_pair() -> None:
    a = boxes({"yaw": 3.1, "velocity": (1, 1), "score": 0.9})
    b = boxes({"at": (0.3, 0.4, 0), "size": (4.2, 1.5, 1.5), "yaw": -3.1, "velocity": (4, 5), "score": 0.6})
    found = match_detections(a, b, max_centre_m=1.0)
    assert found.centre_delta_m == pytest.approx([0.5])
    assert found.size_delta_m == pytest.approx([0.5])
    assert found.yaw_delta_rad == pytest.approx([2 * math.pi - 6.2], abs=1e-6)
    assert found.velocity_delta_mps == pytest.approx([5.0])
    assert found.score_delta == pytest.approx([0.3])


@given(st.lists(st.integers(0, 12), max_size=6), st.lists(st.integers(0, 12), max_size=6))
def test_matching_is_greedy_one_to_one_and_complete(left: list[int], right: list[int]) -> None:
    a, b = boxes(*({"at": (x, 0, 0)} for x in left)), boxes(*({"at": (x, 0, 0)} for x in right))
    found = match_detections(a, b, max_centre_m=2.0)
    expected: list[tuple[int, int]] = []
    every = itertools.product(range(len(left)), range(len(right)))
    for i, j in sorted(every, key=lambda pair: (abs(left[pair[0]] - right[pair[1]]), *pair)):
        if abs(left[i] - right[j]) <= 2 and all(i != p and j != q for p, q in expected):
            expected.append((i, j))
    assert found.pairs.tolist() == [list(pair) for pair in sorted(expected)]
    assert sorted([*found.pairs[:, 0], *found.missing]) == list(range(len(left)))
    assert sorted([*found.pairs[:, 1], *found.extra]) == list(range(len(right)))


def test_sets_of_different_classes_are_a_bug_of_ours() -> None:
    with pytest.raises(InternalError, match="cannot be matched"):
        match_detections(boxes({}), boxes({"kind": "x"}, class_names=("x",)), max_centre_m=1.0)


def test_the_table_counts_by_class_and_horizontal_range() -> None:
    a = boxes(
        {"at": (3, 4, 14)}, {"at": (0, 15, 0)}, {"at": (40, 0, 0), "kind": "bus"}, {"at": (80, 0, 0), "score": 0.05}
    )
    b = boxes({"at": (3, 4, 14)}, {"at": (0, 29, 0)})
    rows = by_class_and_range(match_detections(a, b, max_centre_m=1.0, min_score=0.1), a, b)
    assert len(rows) == 4 * len(CONFIG.class_names)
    found = {(r.class_name, r.from_m): (r.reference, r.missing, r.extra) for r in rows if r.reference or r.extra}
    assert found == {("car", 0.0): (1, 0, 0), ("car", 15.0): (1, 1, 1), ("bus", 30.0): (1, 1, 0)}


def test_equal_boxes_pass_and_say_what_was_seen() -> None:
    a = boxes({"at": (10, 0, 0)}, {"at": (20, 0, 0), "kind": "bus"})
    found = judge(a, a)
    assert found.passed
    assert (found.max_abs, found.max_relative, found.frames) == (0.0, 0.0, 1)
    assert found.detail.startswith(
        "2 matched, 0 missing (0 excused), 0 extra (0 excused); largest difference: centre_m 0"
    )
    assert found.tolerance == "centre_m <= 0.1, size_m <= 0.1, yaw_rad <= 0.05, velocity_mps <= 0.2, score <= 0.02"


@pytest.mark.parametrize(
    "change",
    [{"at": (10.2, 0, 0)}, {"size": (4.2, 2, 1.5)}, {"yaw": math.pi}, {"velocity": (0.3, 0)}, {"score": 0.83}],
)
def test_one_difference_beyond_its_tolerance_fails(change: dict[str, object]) -> None:
    near = {"at": (10.05, 0, 0), "size": (4.05, 2, 1.5), "yaw": 0.04, "velocity": (0.1, 0), "score": 0.81}
    a = boxes({"at": (10, 0, 0)})
    assert judge(a, boxes(near)).passed
    assert not judge(a, boxes(near | change)).passed


def test_no_box_on_either_side_is_no_evidence() -> None:
    found = judge(boxes(), boxes())
    assert not found.passed
    assert found.detail.endswith("no evidence")
    nothing = boxes_comparison([], [], names=("a", "b"), tolerance=TOLERANCE, config=CONFIG)
    assert (nothing.passed, nothing.frames) == (False, 0)


def test_frames_of_different_number_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        boxes_comparison([boxes({})], [], names=("a", "b"), tolerance=TOLERANCE, config=CONFIG)


def test_a_missing_box_fails_and_the_highest_score_is_named() -> None:
    shared_box = {"at": (10, 0, 0)}
    a = boxes(shared_box, {"at": (30, 0, 0), "score": 0.5}, {"at": (0, 30, 1), "score": 0.7, "kind": "bus"})
    found = judge(a, boxes(shared_box, {"at": (30.5, 0, 0), "score": 0.6}))
    assert not found.passed
    assert found.worst == "frame 0: missing bus 0.7000 at (0.00, 30.00, 1.00) m; the other side has none of its class"
    assert "1 matched, 2 missing (0 excused), 1 extra (0 excused)" in found.detail
    other = judge(boxes(shared_box), a)
    assert other.worst.startswith("frame 0: extra bus")
    lone = judge(boxes(shared_box), boxes(shared_box, {"at": (30, 0, 0)}))
    assert lone.worst.endswith("extra car 0.8000 at (30.00, 0.00, 0.00) m; the nearest of its class lies 20 m away")


def test_a_box_at_the_score_threshold_is_excused_and_one_above_the_margin_is_not() -> None:
    shared_box = {"at": (10, 0, 0)}
    for score, excused in ((0.119, True), (0.125, False)):
        a = boxes(shared_box, {"at": (30, 0, 0), "score": score})
        assert judge(a, boxes(shared_box)).passed is excused
        assert judge(boxes(shared_box), a).passed is excused
        assert f"1 missing ({int(excused)} excused)" in judge(a, boxes(shared_box)).detail


def test_a_box_at_a_full_count_is_excused_only_where_the_other_side_is_full() -> None:
    first, last, instead = ({"at": (x, 0, 0), "score": s} for x, s in ((10, 0.9), (20, 0.5), (30, 0.51)))
    full, wide = post(nms_post=2), post(nms_post=3)
    a, b = boxes(first, last), boxes(first, instead)
    assert judge(a, b, full).passed
    assert not judge(a, b, wide).passed
    assert not judge(a, boxes(first, instead | {"score": 0.55}), full).passed  # not near the lowest kept score
    assert not judge(a, boxes(first, instead | {"kind": "bus"}), full).passed  # its task is not full


def test_two_boxes_that_suppress_each_other_excuse_each_other_once() -> None:
    anchor = {"at": (10, 0, 0)}
    one, other = {"at": (30, 0, 0), "score": 0.5}, {"at": (31, 0, 0), "score": 0.51}
    assert judge(boxes(anchor, one), boxes(anchor, other)).passed
    assert not judge(boxes(anchor, one), boxes(anchor, other | {"score": 0.55})).passed
    assert not judge(boxes(anchor, one), boxes(anchor, other | {"at": (33.5, 0, 0)})).passed  # they do not suppress
    assert not judge(boxes(anchor, one | {"kind": "bus"}), boxes(anchor, other)).passed  # another task
    third = {"at": (29, 0, 0), "score": 0.51}
    assert "2 extra (1 excused)" in judge(boxes(anchor, one), boxes(anchor, other, third)).detail


def published(file: Path) -> Detections:
    """KITTI lines in the camera frame, into ours with the sensor's axes."""
    names = ("Car", "Pedestrian", "Cyclist")
    rows = [line.split() for line in file.read_text().splitlines()]
    h, w, length, x, y, z, turn, score = np.array([row[8:16] for row in rows], dtype=np.float64).T
    return Detections(
        boxes=Boxes3D(
            centre=np.stack([z, -x, h / 2 - y], axis=1).astype(np.float32),
            size=np.stack([length, w, h], axis=1).astype(np.float32),
            yaw=(-turn - math.pi / 2).astype(np.float32),
            velocity=np.zeros((len(rows), 2), np.float32),
        ),
        scores=score.astype(np.float32),
        labels=np.array([names.index(row[0]) for row in rows], dtype=np.int64),
        class_names=names,
    )


@pytest.mark.data
def test_the_published_gap_of_a_tensorrt_port_is_reproduced(shared: Path) -> None:
    """PyTorch against TensorRT, six frames: largest difference per frame 0.03-0.24 m and 0.01-0.32 of score."""
    folder = shared / "data/pointpillars_published"
    found = []
    for frame in (1, 2, 4, 5, 6, 8):
        a, b = (published(folder / side / f"{frame:06d}.txt") for side in ("pcdet", "pred"))
        found.append(match_detections(a, b, max_centre_m=1.0))
    centres = [float(m.centre_delta_m.max()) for m in found]
    scores = [float(m.score_delta.max()) for m in found]
    assert (round(min(centres), 2), round(max(centres), 2)) == (0.03, 0.24)
    assert (round(min(scores), 2), round(max(scores), 2)) == (0.01, 0.32)
    assert [len(m.pairs) for m in found] == [9, 11, 15, 8, 18, 24]
    assert max(float(m.yaw_delta_rad.max()) for m in found) > 3  # a heading flip, which centres alone would not show
