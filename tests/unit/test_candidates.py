"""Allocations for one goal: which are looked at, and which of them a true forward lets pass."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from dm3d_deploy.errors import DistortionMissed, InternalError
from dm3d_deploy.pruning.allocation import allocate, cheapest_within
from dm3d_deploy.pruning.contracts import Allocation, Budget, Choice
from dm3d_deploy.recipe import Recipe
from dm3d_deploy.steps import candidates
from dm3d_deploy.steps.candidates import Candidate, candidates_of, verified

RATIOS = np.arange(20) / 20
ITEMS = [
    [
        Choice(layer=name, pattern="tile", step=i, ratio=r, distortion=scale * r**power, cost=size * (1 - r))
        for i, r in enumerate(RATIOS)
    ]
    for name, scale, power, size in (("a", 1.0, 1.0, 10.0), ("b", 4.0, 3.0, 20.0), ("c", 0.5, 2.0, 5.0))
]
DENSE = Budget(value=1.0, denominator=35.0)


def solve(items, limit) -> Allocation:
    if limit is not None:
        return cheapest_within(items, max_distortion=limit, dense=DENSE)
    return allocate(items, budget=dataclasses.replace(DENSE, value=0.4))


def recipe(**changes) -> Recipe:
    return Recipe(**{"model": "m", "target": 0.4, "candidates": 4, **changes})


def test_every_candidate_keeps_the_budget_and_says_its_true_prediction() -> None:
    found = candidates_of(recipe(), ITEMS, solve)
    assert found[0].name == "least sum of distortions"
    assert 2 <= len(found) <= 4
    own = {(item.layer, item.step): item for group in ITEMS for item in group}
    for candidate in found:
        allocation = candidate.allocation
        assert allocation.share <= 0.4
        assert allocation.choices == tuple(own[choice.layer, choice.step] for choice in allocation.choices)
        assert allocation.distortion == pytest.approx(sum(choice.distortion for choice in allocation.choices))
        assert allocation.distortion >= found[0].allocation.distortion * (1 - 1e-12)
        assert allocation.lower_bound == found[0].allocation.lower_bound
    assert len({candidate.allocation.choices for candidate in found}) == len(found)
    capped = [candidate for candidate in found if candidate.name == "no layer beyond 90%"]
    assert all(choice.ratio <= 0.9 for candidate in capped for choice in candidate.allocation.choices)


def test_as_many_as_were_asked_for() -> None:
    assert len(candidates_of(recipe(candidates=1), ITEMS, solve)) == 1


def test_a_distortion_is_tried_at_ever_smaller_predictions() -> None:
    found = candidates_of(recipe(target=None, max_distortion=1.0), ITEMS, solve)
    predicted = [candidate.allocation.distortion for candidate in found]
    costs = [candidate.allocation.cost for candidate in found]
    assert predicted == sorted(predicted, reverse=True)
    assert costs == sorted(costs)
    assert all(one <= 1.0 / 2**k for k, one in enumerate(predicted))


@pytest.fixture
def judge(monkeypatch):
    """`verified` over candidates whose true distortions are given; also how many of them it looked at."""
    looked_at: list[float] = []

    def call(true, *, frames=(3,), estimated=False, costs=None, **changes):
        looked_at.clear()
        plain = solve(ITEMS, None)
        made = [
            Candidate(name=str(i), allocation=dataclasses.replace(plain, cost=cost))
            for i, cost in enumerate(costs or [plain.cost] * len(true))
        ]

        def forwards(run, candidates, frames):
            for value in true:
                looked_at.append(value)
                yield value

        monkeypatch.setattr(candidates, "_true_distortions", forwards)
        monkeypatch.setattr(candidates, "frames_of", lambda run, role: frames if role == "selection" else ())
        run = SimpleNamespace(recipe=recipe(**changes))
        _, rows = verified(run, made, estimated=estimated)
        return rows, list(looked_at)

    return call


def chosen(rows) -> list[str]:
    return [row["name"] for row in rows if row["chosen"]]


def test_the_least_true_distortion_is_taken(judge) -> None:
    rows, looked_at = judge([0.4, 0.2, 0.3])
    assert chosen(rows) == ["1"]
    assert [row["verified"] for row in rows] == looked_at == [0.4, 0.2, 0.3]
    assert not any(row["tie"] for row in rows)


def test_the_first_that_keeps_the_distortion_is_taken_and_no_more_are_tried(judge) -> None:
    rows, looked_at = judge([0.4, 0.2, 0.1, 0.05], target=None, max_distortion=0.2)
    assert chosen(rows) == ["1"]
    assert len(rows) == len(looked_at) == 2


def test_no_candidate_within_the_distortion_is_a_no(judge) -> None:
    with pytest.raises(DistortionMissed) as refusal:
        judge([0.4, 0.3], frames=(1, 2), target=None, max_distortion=0.2)
    assert "The distortion 0.2 was not kept on 2 selection frames: the most faithful of 2" in str(refusal.value)
    assert "raise --max-distortion to 0.3 or more" in str(refusal.value)


def test_not_a_number_keeps_no_distortion(judge) -> None:
    with pytest.raises(DistortionMissed):
        judge([float("nan")], target=None, max_distortion=0.2)


def test_without_frames_nothing_is_called_verified(judge) -> None:
    rows, looked_at = judge([0.4, 0.2], frames=())
    assert looked_at == []
    assert rows[0]["verified"] is None
    assert chosen(rows) == ["0"]


def test_ties_are_within_a_tenth_of_an_estimated_time(judge) -> None:
    rows, _ = judge([0.2, 0.3, 0.4], estimated=True, costs=[10.0, 10.9, 11.1])
    assert [row["tie"] for row in rows] == [False, True, False]


def test_nothing_to_verify_is_a_bug() -> None:
    with pytest.raises(InternalError, match="no allocation to verify"):
        verified(SimpleNamespace(recipe=recipe()), [], estimated=False)
