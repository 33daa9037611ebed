"""Suppression against the definition, written box by box, and its rules on ties and cuts."""

import math
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dm3d_deploy.errors import InternalError
from dm3d_deploy.geometry import nms
from dm3d_deploy.geometry.boxes import bev_from_boxes, iou_bev_pairs, select_boxes
from dm3d_deploy.geometry.nms import order_by_score, rotated_nms
from dm3d_deploy.pointcloud import Boxes3D


def random_boxes(count: int, spread_m: float, seed: int) -> Boxes3D:
    rng = np.random.default_rng(seed)
    return Boxes3D(
        centre=rng.uniform(-spread_m, spread_m, (count, 3)).astype(np.float32),
        size=rng.uniform(0.3, 5, (count, 3)).astype(np.float32),
        yaw=rng.uniform(-4, 4, count).astype(np.float32),
        velocity=np.zeros((count, 2), np.float32),
    )


def slow_nms(boxes: Boxes3D, scores: np.ndarray, threshold: float, pre: int, post: int) -> list[int]:
    bev = bev_from_boxes(boxes)
    first, second = np.indices((len(boxes), len(boxes))).reshape(2, -1)
    overlap = iou_bev_pairs(bev[first], bev[second]).reshape(len(boxes), len(boxes)).tolist()
    order = sorted(range(len(boxes)), key=lambda i: (-float(scores[i]), i))[:pre]
    kept: list[int] = []
    for i in order:
        if all(overlap[k][i] <= threshold for k in kept):
            kept.append(i)
    return kept[:post]


@given(
    count=st.integers(0, 60),
    spread_m=st.sampled_from([0.0, 0.5, 4.0, 30.0]),
    levels=st.sampled_from([2, 1000]),
    threshold=st.sampled_from([0.01, 0.2, 0.7, 1.0]),
    pre=st.sampled_from([1, 30, 100]),
    post=st.sampled_from([1, 7, 100]),
    window=st.sampled_from([5, 24, 1024]),
    seed=st.integers(0, 10_000),
)
def test_the_kept_boxes_are_those_of_the_definition(
    count: int, spread_m: float, levels: int, threshold: float, pre: int, post: int, window: int, seed: int
) -> None:
    boxes = random_boxes(count, spread_m, seed)
    scores = (np.random.default_rng(seed).integers(0, levels, count) / levels).astype(np.float32)
    with patch.object(nms, "WINDOW", window):
        found = rotated_nms(boxes, scores, threshold, pre, post)
    assert found.tolist() == slow_nms(boxes, scores, threshold, pre, post)


def test_more_boxes_than_one_block_are_suppressed_across_blocks() -> None:
    boxes = random_boxes(400, 12.0, 3)
    scores = np.random.default_rng(3).uniform(0, 1, 400).astype(np.float32)
    found = rotated_nms(boxes, scores, 0.1, 400, 400)
    assert 50 < len(found) < 300
    assert found.tolist() == slow_nms(boxes, scores, 0.1, 400, 400)


def test_equal_scores_keep_their_index_order() -> None:
    assert order_by_score(np.array([0.5, 0.9, 0.5, 0.9], np.float32)).tolist() == [1, 3, 0, 2]
    twins = select_boxes(random_boxes(1, 1.0, 0), np.zeros(5, np.int64))
    assert rotated_nms(twins, np.full(5, 0.3, np.float32), 0.2, 10, 10).tolist() == [0]


def test_an_overlap_equal_to_the_threshold_stays() -> None:
    boxes = Boxes3D(
        centre=np.array([[0, 0, 0], [1, 0, 0]], np.float32),
        size=np.full((2, 3), 3, np.float32),  # they share 6 m2 of 12 m2
        yaw=np.zeros(2, np.float32),
        velocity=np.zeros((2, 2), np.float32),
    )
    scores = np.array([0.9, 0.8], np.float32)
    assert rotated_nms(boxes, scores, 0.5, 10, 10).tolist() == [0, 1]
    assert rotated_nms(boxes, scores, 0.49, 10, 10).tolist() == [0]


@given(
    length=st.floats(2, 8),
    width=st.floats(0.5, 1),
    yaw=st.floats(-4, 4),
    share=st.floats(0.05, 0.95),
    kind=st.sampled_from(["moved along itself", "inside", "across"]),
)
def test_a_bound_that_is_met_exactly_loses_no_pair(
    length: float, width: float, yaw: float, share: float, kind: str
) -> None:
    """What they share is then all that the bound by extents, by areas or by crossing strips leaves them."""
    other = {
        "moved along itself": (share * length * math.cos(yaw), share * length * math.sin(yaw), length, width, yaw),
        "inside": (0, 0, length, share * width, yaw),
        "across": (0, 0, length, width, yaw + 1.2),
    }[kind]
    bev = np.array([(0, 0, length, width, yaw), other], np.float32)
    boxes = Boxes3D(
        centre=np.c_[bev[:, :2], np.zeros(2, np.float32)],
        size=np.c_[bev[:, 2:4], np.ones(2, np.float32)],
        yaw=bev[:, 4],
        velocity=np.zeros((2, 2), np.float32),
    )
    scores = np.array([0.9, 0.8], np.float32)
    overlap = float(iou_bev_pairs(bev_from_boxes(boxes)[:1], bev_from_boxes(boxes)[1:])[0])
    assert rotated_nms(boxes, scores, overlap, 10, 10).tolist() == [0, 1]
    assert rotated_nms(boxes, scores, math.nextafter(overlap, 0), 10, 10).tolist() == [0]


def test_no_box_gives_no_box_and_nan_is_a_bug_of_ours() -> None:
    none = random_boxes(0, 1.0, 0)
    assert rotated_nms(none, np.zeros(0, np.float32), 0.2, 10, 10).shape == (0,)
    with pytest.raises(InternalError, match="not finite"):
        rotated_nms(random_boxes(1, 1.0, 0), np.array([np.nan], np.float32), 0.2, 10, 10)
