"""What a choice costs before its mask exists, against what the mask says afterwards; budgets in each cost."""

import numpy as np
import pytest

from dm3d_deploy.errors import InfeasibleBudget, InternalError, UsageError
from dm3d_deploy.pruning.allocation import allocate, cheapest_within, items_for
from dm3d_deploy.pruning.contracts import Allocation, Budget, Choice, Layer
from dm3d_deploy.pruning.costs import executed_costs, executed_of_choice
from dm3d_deploy.pruning.curves import layer_curve
from dm3d_deploy.pruning.macs import executed_macs
from dm3d_deploy.pruning.masks import mask_of
from dm3d_deploy.pruning.patterns import eligible_patterns, ratio_grid
from dm3d_deploy.pruning.ranking import scores

LAYERS = [
    Layer(name="a", part="3d", kind="sparse", shape=(32, 3, 1, 1, 16), positions=np.array([90.5, 700, 81])),
    Layer(name="b", part="3d", kind="sparse", shape=(40, 1, 3, 3, 40), positions=np.linspace(10, 50, 9)),
    Layer(name="c", part="2d", kind="conv2d", shape=(12, 16, 3, 3), positions=np.full(9, 64.0)),
    Layer(name="d", part="2d", kind="conv2d", shape=(12, 9, 3, 3), positions=np.full(9, 64.0)),
]
DENSE = sum(layer.macs for layer in LAYERS)


def curves_and_scores(layer: Layer, seed: int):
    rng = np.random.default_rng(seed)
    weight, gradients = rng.normal(0, 1, layer.shape), rng.normal(0, 1, (4, *layer.shape))
    ranked = scores(weight, np.square(gradients).mean(axis=0))
    patterns = eligible_patterns(layer, ("2:4", "tile"))[0]
    return [layer_curve(layer, weight, gradients, ranked, p, ratio_grid(20), kappa=1e-7) for p in patterns], ranked


PRICED = {layer.name: curves_and_scores(layer, seed) for seed, layer in enumerate(LAYERS)}
ITEMS = [items_for(layer, PRICED[layer.name][0], "auto") for layer in LAYERS]
EXECUTED = [executed_costs(layer, items) for layer, items in zip(LAYERS, ITEMS, strict=True)]


def budget(value: float, unit: str = "executed") -> Budget:
    return Budget(value=value, denominator=DENSE, unit=unit)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_the_price_of_a_choice_is_that_of_its_mask(layer: Layer) -> None:
    curves, ranked = PRICED[layer.name]
    seen = set()
    for mode in ("auto", "unstructured"):
        for item in items_for(layer, curves, mode):
            mask = mask_of(layer, ranked, item)
            pattern = "dense" if mask.keep.all() else item.pattern
            assert executed_of_choice(layer, item) == pytest.approx(executed_macs(layer, mask.keep, pattern), rel=1e-12)
            seen.add(pattern)
    assert len(seen) >= 2


def test_a_pattern_of_which_nobody_said_what_is_run_is_refused() -> None:
    choice = Choice(layer="a", pattern="spiral", step=1, ratio=0.5, distortion=0.0, cost=1.0)
    with pytest.raises(InternalError, match="a: nobody said what hardware runs of the pattern 'spiral'"):
        executed_of_choice(LAYERS[0], choice)


def test_an_executed_budget_buys_only_what_hardware_leaves_out() -> None:
    allocation = allocate(ITEMS, budget=budget(0.6), costs=EXECUTED)
    for layer, choice in zip(LAYERS, allocation.choices, strict=True):
        assert choice.ratio == 0 or choice.pattern in ("2:4", "tile"), layer.name
        assert choice.pattern != "2:4" or choice.ratio == 0.5  # a sparser 2:4 costs distortion and saves nothing
    executed = sum(executed_of_choice(layer, choice) for layer, choice in zip(LAYERS, allocation.choices, strict=True))
    assert allocation.cost == pytest.approx(executed, rel=1e-12)
    assert allocation.share <= 0.6
    assert sum(choice.cost for choice in allocation.choices) <= executed * (1 + 1e-12)


def test_what_is_out_of_reach_is_said_in_its_own_unit() -> None:
    with pytest.raises(InfeasibleBudget, match=r"The target 0\.02 of the backbone's executed MACs cannot be reached"):
        allocate(ITEMS, budget=budget(0.02), costs=EXECUTED)
    times = [np.full(len(items), 10.0) - np.linspace(0, 4, len(items)) for items in ITEMS]
    with pytest.raises(InfeasibleBudget) as refusal:
        allocate(ITEMS, budget=Budget(value=0.25, denominator=45.0, unit="ms"), costs=times, fixed_cost=5.0)
    assert str(refusal.value) == (
        "The target of 11.25 ms cannot be reached: pruned as far as patterns allow, 29 ms of 45 ms are left, 5 ms of "
        "them in what stays dense. Fix: raise --target to 29.000ms or more"
    )
    assert refusal.value.cheapest == pytest.approx(29 / 45)
    again = allocate(ITEMS, budget=Budget(value=29 / 45, denominator=45.0, unit="ms"), costs=times, fixed_cost=5.0)
    assert again.cost == pytest.approx(29)


@pytest.mark.parametrize("costs", [None, EXECUTED])
def test_the_cheapest_within_a_distortion_is_the_best_at_its_price(costs: list[np.ndarray] | None) -> None:
    unit = "macs" if costs is None else "executed"
    worst = sum(max(item.distortion for item in items) for items in ITEMS)
    for share in (1e-3, 0.03, 0.3):
        found = cheapest_within(ITEMS, max_distortion=share * worst, dense=budget(1.0, unit), costs=costs)
        assert found.distortion <= share * worst * (1 + 1e-12)
        assert 0 <= found.gap <= 1
        assert found.lower_bound <= found.cost * (1 + 1e-12)
        assert found.budget.value == pytest.approx(found.share)
        back = allocate(ITEMS, budget=found.budget, costs=costs)
        assert back.distortion <= found.distortion * (1 + 1e-9)
    assert cheapest_within(ITEMS, max_distortion=worst, dense=budget(1.0, unit), costs=costs).gap == 0


def test_a_distortion_below_the_most_faithful_choice_is_refused() -> None:
    with pytest.raises(UsageError, match=r"distortion 0\.1 cannot be reached.*--max-distortion above 0\.5"):
        cheapest_within(
            [[Choice(layer="a", pattern="2:4", step=0, ratio=0.5, distortion=0.5, cost=1.0)]],
            max_distortion=0.1,
            dense=budget(1.0),
        )


def test_an_allocation_beyond_its_distortion_is_a_bug() -> None:
    choice = Choice(layer="a", pattern="tile", step=0, ratio=0.5, distortion=0.5, cost=1.0)
    with pytest.raises(InternalError, match=r"a distortion of 0\.5 exceeds 0\.1"):
        Allocation(choices=(choice,), distortion=0.5, cost=1.0, budget=budget(1.0), lower_bound=0.0, max_distortion=0.1)
