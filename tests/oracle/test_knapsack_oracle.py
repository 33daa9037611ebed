"""The knapsack against an integer programme, and against every combination of small problems."""

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag, csr_matrix, vstack

from dm3d_deploy.pruning.knapsack import knapsack, solve


def problem(seed: int, groups: int, items: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Layers of very unequal size; convex and bumpy curves, some of them flat or with repeated points."""
    rng = np.random.default_rng(seed)
    sizes = rng.lognormal(0, 1.3, groups)
    ratio = np.arange(items) / items
    costs, losses = [], []
    for size in sizes / sizes.sum():
        loss = rng.lognormal(0, 1.5) * size**0.5 * ratio ** rng.uniform(1.2, 5)
        if rng.random() < 0.5:
            loss *= 1 + 0.4 * np.sin(ratio * rng.uniform(5, 40)) * ratio
        if rng.random() < 0.2:
            loss = loss[np.floor(ratio * 9).astype(int) * (items // 9)]
        costs.append(size * (1 - ratio))
        losses.append(np.maximum.accumulate(loss))
    return costs, losses


def integer_programme(
    costs: list[np.ndarray], losses: list[np.ndarray], limit: float, *, scale: float, whole: bool
) -> tuple[float, float]:
    """The least distortion that HiGHS finds, and the bound it proves; its tolerances are absolute, hence the scale.

    Without `whole` items may be shared out: the linear relaxation, whose optimum is the Lagrangian bound.
    """
    one_each = block_diag([np.ones((1, len(cost))) for cost in costs])
    rows = vstack([one_each, csr_matrix(np.concatenate(costs)[None] / limit)])
    count = len(costs)
    options = {"mip_rel_gap": 1e-4, "time_limit": 20} if whole else {"time_limit": 20}
    result = milp(
        np.concatenate(losses) / scale,
        constraints=LinearConstraint(rows, np.r_[np.ones(count), -np.inf], np.ones(count + 1)),
        integrality=np.full(rows.shape[1], int(whole)),
        bounds=Bounds(0, 1),
        options=options,
    )
    assert result.x is not None, result.message
    return result.fun * scale, (result.mip_dual_bound if whole else result.fun) * scale


@pytest.mark.parametrize("block", range(5))
def test_within_a_thousandth_of_the_integer_programme(block: int) -> None:
    for seed in range(block * 10, block * 10 + 10):
        costs, losses = problem(seed, groups=35, items=99)
        limit = (0.3, 0.5, 0.7)[seed % 3]
        picks, bound = solve(costs, losses, limit)
        ours = sum(loss[pick] for loss, pick in zip(losses, picks, strict=True))
        best, proven = integer_programme(costs, losses, limit, scale=ours / 1000, whole=True)
        relaxed, _ = integer_programme(costs, losses, limit, scale=ours / 1000, whole=False)
        assert sum(cost[pick] for cost, pick in zip(costs, picks, strict=True)) <= limit * (1 + 1e-12)
        assert ours <= best * (1 + 1e-3), seed
        assert ours >= proven * (1 - 1e-6), seed
        assert bound == pytest.approx(relaxed, rel=1e-6), seed


def every_combination(costs: list[np.ndarray], losses: list[np.ndarray], limit: float) -> float:
    best = math.inf
    for picks in itertools.product(*(range(len(cost)) for cost in costs)):
        if sum(cost[pick] for cost, pick in zip(costs, picks, strict=True)) <= limit:
            best = min(best, sum(loss[pick] for loss, pick in zip(losses, picks, strict=True)))
    return best


@pytest.mark.parametrize("seed", range(40))
def test_whole_sizes_are_exact(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = [rng.integers(0, 12, rng.integers(1, 6)) for _ in range(rng.integers(1, 5))]
    losses = [rng.random(len(size)).round(1) for size in sizes]
    for capacity in range(0, 30, 3):
        best = every_combination(sizes, losses, capacity)
        picks = knapsack(sizes, losses, capacity)
        if picks is None:
            assert best == math.inf
            continue
        assert sum(size[pick] for size, pick in zip(sizes, picks, strict=True)) <= capacity
        assert sum(loss[pick] for loss, pick in zip(losses, picks, strict=True)) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_real_costs_lose_no_more_than_their_rounding(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups, bins = int(rng.integers(1, 6)), 2000
    costs = [rng.random(rng.integers(1, 6)) for _ in range(groups)]
    losses = [rng.random(len(cost)) for cost in costs]
    cheapest, dearest = sum(c.min() for c in costs), sum(c.max() for c in costs)
    limit = cheapest + rng.random() * (dearest - cheapest) + 1e-9
    picks, bound = solve(costs, losses, limit, bins=bins)
    ours = sum(loss[pick] for loss, pick in zip(losses, picks, strict=True))
    best = every_combination(costs, losses, limit)
    assert sum(cost[pick] for cost, pick in zip(costs, picks, strict=True)) <= limit * (1 + 1e-12)
    assert bound <= best + 1e-12
    assert best - 1e-12 <= ours <= every_combination(costs, losses, limit - groups * limit / bins) + 1e-12


@pytest.mark.parametrize("seed", range(30))
def test_the_cheapest_within_a_distortion_against_every_combination(seed: int) -> None:
    """Costs and distortions exchanged: what `cheapest_within` asks of the knapsack."""
    rng = np.random.default_rng(seed)
    groups, bins = int(rng.integers(1, 6)), 2000
    costs = [rng.random(rng.integers(1, 6)) for _ in range(groups)]
    losses = [rng.random(len(cost)) * 10 ** rng.uniform(-3, 0) for cost in costs]
    least, most = sum(x.min() for x in losses), sum(x.max() for x in losses)
    allowed = least + rng.random() * (most - least) + 1e-9
    picks, bound = solve(losses, costs, allowed, bins=bins)
    ours = sum(cost[pick] for cost, pick in zip(costs, picks, strict=True))
    best = every_combination(losses, costs, allowed)
    assert sum(loss[pick] for loss, pick in zip(losses, picks, strict=True)) <= allowed * (1 + 1e-12)
    assert bound <= best + 1e-12
    assert best - 1e-12 <= ours <= every_combination(losses, costs, allowed - groups * allowed / bins) + 1e-12
