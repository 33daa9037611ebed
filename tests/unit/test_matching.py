"""Matching of two sets of boxes, and the judge of their parity with every excuse that it knows and those it refuses."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dm3d_deploy.config import DetectorConfig, load_config
from dm3d_deploy.errors import InternalError
from dm3d_deploy.evidence import Comparison
from dm3d_deploy.geometry.decode import Decoded, Located, select_located
from dm3d_deploy.geometry.matching import (
    BoxTolerance,
    boxes_comparison,
    by_class_and_range,
    match_detections,
)
from dm3d_deploy.pointcloud import Boxes3D, Detections

CONFIG = load_config("centerpoint")
TOLERANCE = BoxTolerance(centre_m=0.1, size_share=0.05, yaw_rad=0.05, velocity_mps=0.2, score=0.02)


def boxes(*rows: Mapping[str, object], class_names: tuple[str, ...] = CONFIG.class_names) -> Detections:
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


def side(*rows: Mapping[str, object], cuts: dict[str, float] | None = None) -> Decoded:
    """What one side decoded: a row is a candidate, kept by NMS unless it says `kept=False`; each metre is a cell.

    `cuts` gives the lowest score of the full lists by the first class of their tasks.
    """

    def cell(row: Mapping[str, object]) -> int:
        x, y, _ = row.get("at", (0, 0, 0))
        return int(row.get("cell", 1000 * round(y) + round(x)))

    tasks = CONFIG.head.classes_by_task
    whole = Located(
        detections=boxes(*rows),
        cells=np.array([cell(row) for row in rows], dtype=np.int64),
        headings=np.array([row.get("heading", 1.0) for row in rows], dtype=np.float32),
    )
    kinds = [str(row.get("kind", "car")) for row in rows]
    return Decoded(
        before_nms=tuple(
            select_located(whole, np.array([i for i, kind in enumerate(kinds) if kind in task], dtype=np.int64))
            for task in tasks
        ),
        cut_scores=tuple((cuts or {}).get(task[0]) for task in tasks),
        kept=select_located(whole, np.array([i for i, r in enumerate(rows) if r.get("kept", True)], dtype=np.int64)),
    )


def judge(a: Decoded, b: Decoded, config: DetectorConfig = CONFIG) -> tuple[Comparison, Comparison]:
    return boxes_comparison([a], [b], names=("model", "engine"), tolerance=TOLERANCE, config=config)


def verdicts(a: Decoded, b: Decoded, config: DetectorConfig = CONFIG) -> tuple[bool, bool]:
    """Before NMS and after it; they do not depend on which side is called the reference."""
    before, after = (row.passed for row in judge(a, b, config))
    assert (before, after) == tuple(row.passed for row in judge(b, a, config))
    return before, after


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
    assert found.size_share == pytest.approx([0.25])  # the width: 0.5 of 2 m, more than 0.2 of 4 m
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


def test_a_size_of_nothing_is_met_exactly_or_not_at_all() -> None:
    flat = {"size": (4, 2, 0)}
    assert match_detections(boxes(flat), boxes(flat), max_centre_m=1.0).size_share.tolist() == [0.0]
    assert match_detections(boxes(flat), boxes({"size": (4, 2, 0.1)}), max_centre_m=1.0).size_share.tolist() == [np.inf]


ANCHOR: dict[str, object] = {"at": (10, 0, 0)}


def test_equal_boxes_pass_and_say_what_was_seen() -> None:
    a = side(ANCHOR, {"at": (20, 0, 0), "kind": "bus"}, {"at": (11, 0, 0), "kept": False})
    before, after = judge(a, a)
    assert (before.output, after.output) == ("boxes before NMS", "boxes")
    for found, count in ((before, 3), (after, 2)):
        assert found.passed
        assert (found.max_abs, found.max_relative, found.frames, found.worst) == (0.0, 0.0, 1, "")
        assert found.detail.startswith(
            f"{count} matched, 0 missing (0 excused), 0 extra (0 excused); largest difference: centre_m 0"
        )
        limits = "centre_m <= 0.1, size_share <= 0.05, yaw_rad <= 0.05, velocity_mps <= 0.2, score <= 0.02"
        assert found.tolerance == limits


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"at": (10.2, 0, 0)}, "centre_m 0.2"),
        ({"size": (4, 2, 1.6)}, "size_share 0.06667"),
        ({"yaw": math.pi}, "yaw_rad 3.142"),
        ({"velocity": (0.3, 0)}, "velocity_mps 0.3"),
        ({"score": 0.83}, "score 0.03"),
    ],
)
def test_one_difference_beyond_its_tolerance_fails_and_is_named(change: dict[str, object], said: str) -> None:
    near: dict[str, object] = {"at": (10.05, 0, 0), "size": (4.1, 2, 1.5), "yaw": 0.04, "velocity": (0.1, 0)}
    near["score"] = 0.81
    assert verdicts(side(ANCHOR), side(near)) == (True, True)
    assert verdicts(side(ANCHOR), side(near | change)) == (False, False)
    for row in judge(side(ANCHOR), side(near | change)):
        assert row.worst == f"frame 0: car 0.8000 at (10.00, 0.00, 0.00) m differs: {said}"


def test_a_wrong_box_that_nms_hides_fails_before_nms_alone() -> None:
    hidden = {"at": (11, 0, 0), "score": 0.7, "kept": False}
    assert verdicts(side(ANCHOR, hidden), side(ANCHOR, hidden | {"yaw": 0.3})) == (False, True)
    assert verdicts(side(ANCHOR, hidden), side(ANCHOR)) == (False, True)


def test_large_boxes_may_differ_by_more_metres_than_small_ones() -> None:
    large, small = {"at": (30, 0, 0), "size": (50, 50, 50)}, {"at": (30, 0, 0), "size": (0.5, 0.5, 0.5)}
    assert verdicts(side(large), side(large | {"size": (52, 50, 50)})) == (True, True)
    assert verdicts(side(small), side(small | {"size": (0.53, 0.5, 0.5)})) == (False, False)


def test_the_same_box_is_that_of_the_same_cell_and_class_however_near_another_lies() -> None:
    one, other = {"at": (30, 0, 0), "cell": 5, "score": 0.5}, {"at": (30.01, 0, 0), "cell": 6, "score": 0.7}
    moved = ({"at": (30.011, 0, 0), "cell": 5, "score": 0.5}, {"at": (29.999, 0, 0), "cell": 6, "score": 0.7})
    assert verdicts(side(one, other), side(*moved)) == (True, True)
    swapped = ({**one, "cell": 6}, {**other, "cell": 5})
    assert verdicts(side(one, other), side(*swapped)) == (False, False)
    assert verdicts(side(ANCHOR, one), side(ANCHOR, one | {"kind": "bus"})) == (False, False)
    next_class = {"kind": CONFIG.class_names[1], "cell": 4}
    assert verdicts(side(ANCHOR, one), side(ANCHOR, one | next_class)) == (False, False)


def test_no_box_on_either_side_is_no_evidence() -> None:
    nothing = boxes_comparison([], [], names=("a", "b"), tolerance=TOLERANCE, config=CONFIG)
    for row in (*judge(side(), side()), *nothing):
        assert not row.passed
        assert row.detail == "0 matched, 0 missing (0 excused), 0 extra (0 excused); no evidence"
    assert [row.frames for row in nothing] == [0, 0]
    at_threshold = side({"score": CONFIG.post.score_threshold})
    assert verdicts(at_threshold, side()) == (False, False)  # one excused box is no evidence either


@pytest.mark.parametrize("field", ["at", "size", "yaw", "velocity", "score"])
def test_what_is_not_a_number_fails(field: str) -> None:
    nan = {"at": (20, 0, math.nan), "size": (4, math.nan, 1), "velocity": (math.nan, 0)}.get(field, math.nan)
    one = {"at": (20, 0, 0)}
    assert verdicts(side(ANCHOR, one), side(ANCHOR, one | {field: nan})) == (False, False)
    for row in judge(side(ANCHOR, one), side(ANCHOR, one | {field: nan})):
        assert row.worst.endswith(" nan")
    lone = {"at": (30, 0, 0), "score": math.nan}
    assert verdicts(side(ANCHOR, lone), side(ANCHOR, cuts={"car": 0.8})) == (False, False)


def test_frames_of_different_number_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        boxes_comparison([side({})], [], names=("a", "b"), tolerance=TOLERANCE, config=CONFIG)


def test_every_frame_is_judged() -> None:
    good, bad = side(ANCHOR), side(ANCHOR, {"at": (30, 0, 0)})
    rows = boxes_comparison([good, good], [good, bad], names=("a", "b"), tolerance=TOLERANCE, config=CONFIG)
    assert [(row.passed, row.frames, row.worst[:14]) for row in rows] == [(False, 2, "frame 1: extra")] * 2


ABSENT = "car 30 to 50 m 1 and 1, bus 30 to 50 m 1 and 0"


def test_a_missing_box_fails_and_the_highest_score_is_named() -> None:
    a = side(ANCHOR, {"at": (30, 0, 0), "score": 0.5}, {"at": (0, 30, 1), "score": 0.7, "kind": "bus"})
    for found in judge(a, side(ANCHOR, {"at": (32, 0, 0), "score": 0.6})):
        assert not found.passed
        said = "frame 0: missing bus 0.7000 at (0.00, 30.00, 1.00) m; the other side has none of its class"
        assert found.worst == said
        assert "1 matched, 2 missing (0 excused), 1 extra (0 excused)" in found.detail
        assert found.detail.endswith("; missing and extra by class and range: " + ABSENT)
    assert all(row.worst.startswith("frame 0: extra bus") for row in judge(side(ANCHOR), a))
    for row in judge(side(ANCHOR), side(ANCHOR, {"at": (30, 0, 0)})):
        assert row.worst.endswith("extra car 0.8000 at (30.00, 0.00, 0.00) m; the nearest of its class lies 20 m away")


@pytest.mark.parametrize(("score", "excused"), [(0.119, True), (0.125, False), (0.95, False)])
def test_a_box_at_the_score_threshold_is_excused_and_one_above_the_margin_is_not(score: float, excused: bool) -> None:
    a = side(ANCHOR, {"at": (30, 0, 0), "score": score})
    assert verdicts(a, side(ANCHOR)) == (excused, excused)
    kinds = "1 excused: 1 at the score threshold" if excused else "0 excused"
    assert all(f"1 missing ({kinds}), 0 extra (0 excused)" in row.detail for row in judge(a, side(ANCHOR)))


def test_a_box_at_the_end_of_a_full_list_is_excused_only_where_the_other_side_is_full() -> None:
    last, instead = {"at": (20, 0, 0), "score": 0.5}, {"at": (30, 0, 0), "score": 0.51}
    a, b = side(ANCHOR, last, cuts={"car": 0.5}), side(ANCHOR, instead, cuts={"car": 0.51})
    assert verdicts(a, b) == (True, True)
    assert all("1 missing (1 excused: 1 at a full list)" in row.detail for row in judge(a, b))
    assert verdicts(a, side(ANCHOR, instead)) == (False, False)  # nothing was cut off there
    assert verdicts(a, side(ANCHOR, instead, cuts={"truck": 0.51})) == (False, False)  # another task's list
    low = {"at": (20, 0, 0), "score": 0.4}
    assert verdicts(side(ANCHOR, low), side(ANCHOR, cuts={"car": 0.5})) == (
        False,
        False,
    )  # far below the cut
    kind = {"kind": CONFIG.head.classes_by_task[2][1]}
    c, first = side(ANCHOR, last | kind), CONFIG.head.classes_by_task[2][0]
    assert verdicts(c, side(ANCHOR, cuts={first: 0.51})) == (True, True)
    assert verdicts(c, side(ANCHOR, cuts={"car": 0.51})) == (False, False)
    above = side(ANCHOR, instead | {"score": 0.55}, cuts={"car": 0.55})
    assert verdicts(a, above) == (False, False)  # not near the lowest score


ONE, OTHER = {"at": (30, 0, 0), "score": 0.5}, {"at": (31, 0, 0), "score": 0.51}


def test_a_box_that_nms_dropped_on_one_side_is_excused_after_nms() -> None:
    a, b = side(ANCHOR, ONE, OTHER | {"kept": False, "score": 0.495}), side(ANCHOR, ONE | {"kept": False}, OTHER)
    assert verdicts(a, b) == (True, True)
    detail = judge(a, b)[1].detail
    assert "1 matched, 1 missing (1 excused: 1 by NMS), 1 extra (1 excused: 1 by NMS)" in detail
    touching = side(ANCHOR, ONE | {"kept": False}, OTHER), side(ANCHOR, ONE, OTHER)  # only one of the two is lost
    assert verdicts(*touching) == (True, True)


def test_a_box_lost_at_nms_without_a_reason_is_not_excused() -> None:
    a, lost = side(ANCHOR, ONE), ONE | {"kept": False}
    far, low = {"at": (33.5, 0, 0), "score": 0.6}, {"at": (31, 0, 0), "score": 0.4}
    bus = {"at": (31, 0, 0), "score": 0.6, "kind": "bus"}
    assert verdicts(a, side(ANCHOR, lost)) == (True, False)
    for neighbour in (far, low, bus):  # it does not overlap, comes later, or is of another task
        assert verdicts(side(ANCHOR, ONE, neighbour), side(ANCHOR, lost, neighbour)) == (True, False)


def test_a_box_lost_at_nms_with_other_numbers_is_not_excused() -> None:
    lost = ONE | {"kept": False}
    assert verdicts(side(ANCHOR, ONE, OTHER), side(ANCHOR, lost | {"score": 0.47}, OTHER)) == (False, False)
    assert verdicts(side(ANCHOR, ONE, OTHER), side(ANCHOR, lost | {"cell": 77}, OTHER)) == (False, False)
    assert verdicts(side(ANCHOR, ONE, OTHER), side(ANCHOR, OTHER)) == (False, False)


def test_nms_that_stopped_at_a_limit_excuses_what_it_did_not_reach() -> None:
    a, b = side(ANCHOR, ONE), side(ANCHOR, ONE | {"kept": False})
    assert verdicts(a, b, post(nms_post=2)) == (True, False)
    assert verdicts(a, b, post(nms_post=1)) == (True, True)
    assert verdicts(a, b, post(nms_pre=2)) == (True, False)
    assert verdicts(a, b, post(nms_pre=1)) == (True, True)


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


def test_a_yaw_without_heading_is_no_evidence_either_way() -> None:
    a, b = {"yaw": 0.3}, {"yaw": 0.9}
    assert verdicts(side(a), side(b)) == (False, False)
    assert verdicts(side({**a, "heading": 0.05}), side({**b, "heading": 0.2})) == (True, True)
    assert verdicts(side({**a, "heading": 0.2}), side({**b, "heading": 0.2})) == (False, False)
