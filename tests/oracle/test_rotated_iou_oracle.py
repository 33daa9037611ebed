"""Rotated overlap and suppression against a plain polygon clipper that shares no code and no formula with them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dm3d_deploy.geometry import nms
from dm3d_deploy.geometry.boxes import intersection_bev, iou_bev_pairs
from dm3d_deploy.pointcloud import Boxes3D

Point = tuple[float, float]
Rectangle = tuple[float, float, float, float, float]


def polygon(rectangle: Rectangle) -> list[Point]:
    x, y, length, width, yaw = rectangle
    corners = [(length / 2, width / 2), (-length / 2, width / 2), (-length / 2, -width / 2), (length / 2, -width / 2)]
    turn = complex(math.cos(yaw), math.sin(yaw))
    return [((turn * complex(u, v)).real + x, (turn * complex(u, v)).imag + y) for u, v in corners]


def clipped(subject: list[Point], clip: list[Point]) -> list[Point]:
    """Sutherland-Hodgman, one half-plane after the other."""
    for (ax, ay), (bx, by) in zip(clip, clip[1:] + clip[:1], strict=True):
        source, subject = subject, []
        for p, q in zip(source, source[1:] + source[:1], strict=True):
            side_p = (bx - ax) * (p[1] - ay) - (by - ay) * (p[0] - ax)
            side_q = (bx - ax) * (q[1] - ay) - (by - ay) * (q[0] - ax)
            if side_p >= 0:
                subject.append(p)
            if (side_p >= 0) != (side_q >= 0):
                t = side_p / (side_p - side_q)
                subject.append((p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1])))
    return subject


def shoelace(points: list[Point]) -> float:
    return sum(p[0] * q[1] - q[0] * p[1] for p, q in zip(points, points[1:] + points[:1], strict=True)) / 2


def slow_intersection(a: Rectangle, b: Rectangle) -> float:
    moved = (b[0] - a[0], b[1] - a[1], *b[2:])
    return shoelace(clipped(polygon((0.0, 0.0, *a[2:])), polygon(moved)))


def fast_intersection(a: Rectangle, b: Rectangle) -> float:
    return float(intersection_bev(np.array([a]), np.array([b]))[0])


angles = st.one_of(st.sampled_from([0.0, math.pi / 2, -math.pi / 2, math.pi, math.pi / 4]), st.floats(-7, 7))
sizes = st.one_of(st.sampled_from([1e-6, 1.0, 2.0, 4.0]), st.floats(1e-3, 30))
places = st.one_of(st.sampled_from([0.0, 1.0, 2.0, -2.0]), st.floats(-40, 40))
rectangles = st.tuples(places, places, sizes, sizes, angles)


@given(a=rectangles, b=rectangles)
def test_areas_agree_with_the_clipper(a: Rectangle, b: Rectangle) -> None:
    assert fast_intersection(a, b) == pytest.approx(slow_intersection(a, b), rel=1e-9, abs=1e-10)


@given(a=rectangles, b=rectangles)
def test_overlap_is_symmetric_and_at_most_the_smaller_area(a: Rectangle, b: Rectangle) -> None:
    forth, back = fast_intersection(a, b), fast_intersection(b, a)
    assert forth == pytest.approx(back, rel=1e-9, abs=1e-10)
    assert 0 <= forth <= min(a[2] * a[3], b[2] * b[3]) * (1 + 1e-9) + 1e-12


@given(a=rectangles, turns=st.integers(-2, 2), noise=st.sampled_from([0.0, 1e-17, 1e-15, 1e-12]))
def test_a_box_turned_by_quarters_is_itself(a: Rectangle, turns: int, noise: float) -> None:
    length, width = (a[2], a[3]) if turns % 2 == 0 else (a[3], a[2])
    turned = (a[0] + noise, a[1] - noise, length, width, a[4] + turns * math.pi / 2)
    expected = 1.0 if noise == 0 or min(a[2:4]) > 1e-3 else None
    found = float(iou_bev_pairs(np.array([a]), np.array([turned]))[0])
    assert expected is None or found == pytest.approx(1.0, abs=1e-8)


@given(a=rectangles, share=st.floats(0.01, 1), quarter=st.integers(0, 3))
def test_a_contained_box_shares_its_whole_area(a: Rectangle, share: float, quarter: int) -> None:
    side = min(a[2], a[3]) * share / math.sqrt(2)
    inner = (a[0], a[1], side, side, a[4] + quarter * 0.7)
    assert fast_intersection(a, inner) == pytest.approx(side * side, rel=1e-9)


@given(a=rectangles, gap=st.sampled_from([0.0, 1e-9, 0.5]))
def test_boxes_end_to_end_share_nothing(a: Rectangle, gap: float) -> None:
    shift = a[2] + gap
    beside = (a[0] + shift * math.cos(a[4]), a[1] + shift * math.sin(a[4]), *a[2:])
    assert fast_intersection(a, beside) <= 1e-12 * a[3] * 40


def test_areas_agree_with_counted_points() -> None:
    """Monte-Carlo, as a third opinion that knows neither polygons nor Green."""
    rng = np.random.default_rng(5)
    a, b = (0.4, -0.2, 4.2, 1.9, 0.6), (1.0, 0.5, 3.0, 2.4, -0.9)

    def inside(points: np.ndarray, r: Rectangle) -> np.ndarray:
        local = (points - np.array(r[:2])) @ np.array(
            [[math.cos(r[4]), -math.sin(r[4])], [math.sin(r[4]), math.cos(r[4])]]
        )
        return (np.abs(local) <= np.array([r[2], r[3]]) / 2).all(axis=1)

    points = rng.uniform(-3, 4, (400_000, 2))
    counted = float((inside(points, a) & inside(points, b)).mean()) * 49
    assert fast_intersection(a, b) == pytest.approx(counted, rel=0.02)


def greedy(rectangles: list[Rectangle], threshold: float) -> list[int]:
    """The definition, pair by pair: a box stays unless a better one that stays overlaps it by more."""
    kept: list[int] = []
    for i, box in enumerate(rectangles):
        shared = ((slow_intersection(rectangles[k], box), rectangles[k]) for k in kept)
        if all(area <= threshold * (k[2] * k[3] + box[2] * box[3] - area) for area, k in shared):
            kept.append(i)
    return kept


@pytest.mark.parametrize("threshold", [0.01, 0.2, 0.7])
@pytest.mark.parametrize(
    ("piles", "heading", "size_m"),
    [
        (1, math.pi, (4.5, 1.9)),
        (4, math.pi, (4.5, 1.9)),
        (2, 0.1, (4.5, 1.9)),
        (4, math.pi, (0.8, 0.7)),
        (200, 1, (4, 2)),
    ],
)
def test_of_boxes_in_piles_those_of_the_definition_stay(
    piles: int, heading: float, size_m: tuple[float, float], threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nms, "WINDOW", 64)
    rng = np.random.default_rng(piles)
    pile = rng.integers(0, piles, 200)
    bev = np.c_[
        (rng.uniform(-20, 20, (piles, 2))[pile] + rng.normal(0, 0.12 * size_m[0], (200, 2))),
        np.array(size_m) * rng.uniform(0.8, 1.2, (200, 2)),
        rng.uniform(-math.pi, math.pi, piles)[pile] + rng.normal(0, heading, 200),
    ].astype(np.float32)
    boxes = Boxes3D(
        centre=np.c_[bev[:, :2], np.zeros(200, np.float32)],
        size=np.c_[bev[:, 2:4], np.ones(200, np.float32)],
        yaw=bev[:, 4],
        velocity=np.zeros((200, 2), np.float32),
    )
    found = nms.rotated_nms(boxes, np.linspace(1, 0, 200, dtype=np.float32), threshold, 200, 200)
    assert found.tolist() == greedy([tuple(row) for row in bev.astype(float).tolist()], threshold)
