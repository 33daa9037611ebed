"""From curves to masks: budgets hold, choices are legal, refusals say why."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dm3d_deploy.errors import InfeasibleBudget, InternalError, UsageError
from dm3d_deploy.pruning.allocation import allocate, items_for
from dm3d_deploy.pruning.contracts import Budget, Choice, Layer
from dm3d_deploy.pruning.curves import layer_curve
from dm3d_deploy.pruning.knapsack import knapsack, solve, undominated
from dm3d_deploy.pruning.macs import dense_macs, kept_macs
from dm3d_deploy.pruning.masks import mask_of, masks_of
from dm3d_deploy.pruning.patterns import eligible_patterns, is_2_4, ratio_grid, taps_from_native
from dm3d_deploy.pruning.ranking import scores

LAYERS = [
    Layer(name="a", part="3d", kind="sparse", shape=(32, 3, 1, 1, 16), positions=np.array([90.5, 700, 81])),
    Layer(name="b", part="3d", kind="sparse", shape=(40, 1, 3, 3, 40), positions=np.linspace(10, 50, 9)),
    Layer(name="c", part="2d", kind="conv2d", shape=(12, 16, 3, 3), positions=np.full(9, 64.0)),
    Layer(name="d", part="2d", kind="deconv2d", shape=(12, 9, 2, 2), positions=np.full(4, 64.0)),
    Layer(name="e", part="2d", kind="conv2d", shape=(12, 9, 3, 3), positions=np.full(9, 64.0)),
]
DENSE = sum(dense_macs(LAYERS).values())


def curves_of(layer: Layer, seed: int = 0):
    rng = np.random.default_rng(seed)
    weight = rng.normal(0, 1, layer.shape)
    gradients = rng.normal(0, rng.lognormal(0, 1), (4, *layer.shape))
    ranked = scores(weight, np.square(gradients).mean(axis=0))
    curves = [
        layer_curve(layer, weight, gradients, ranked, pattern, ratio_grid(), kappa=1e-7)
        for pattern in eligible_patterns(layer, ("2:4", "tile"))[0]
    ]
    return curves, ranked


CURVES = {layer.name: curves_of(layer, seed)[0] for seed, layer in enumerate(LAYERS)}
SCORES = {layer.name: curves_of(layer, seed)[1] for seed, layer in enumerate(LAYERS)}


def items(mode: str) -> list[tuple[Choice, ...]]:
    return [items_for(layer, CURVES[layer.name], mode) for layer in LAYERS]


@pytest.mark.parametrize("mode", ["auto", "unstructured"])
@settings(max_examples=40)
@given(target=st.floats(0.08, 1.0), fixed=st.floats(0, 0.04))
def test_masks_keep_what_was_allocated_and_never_more_than_the_target(mode: str, target: float, fixed: float) -> None:
    budget = Budget(value=target, denominator=DENSE * (1 + fixed))
    allocation = allocate(items(mode), budget=budget, fixed_cost=DENSE * fixed)
    masks = masks_of(LAYERS, SCORES, allocation, {})
    kept = sum(kept_macs(layer, mask.keep) for layer, mask in zip(LAYERS, masks, strict=True))
    assert kept + DENSE * fixed == pytest.approx(allocation.cost, rel=1e-12)
    assert allocation.share <= target * (1 + 1e-12)
    assert 0 <= allocation.gap <= 1
    assert allocation.lower_bound <= allocation.distortion * (1 + 1e-12)
    for layer, mask in zip(LAYERS, masks, strict=True):
        choice = allocation.choice(layer.name)
        assert mask.density == pytest.approx(1 - choice.ratio, abs=1e-12)
        if choice.pattern == "2:4":
            assert is_2_4(taps_from_native(layer, mask.keep))


def test_a_target_of_one_prunes_nothing() -> None:
    for denominator in (DENSE, sum(reversed([layer.macs for layer in LAYERS]))):
        allocation = allocate(items("auto"), budget=Budget(value=1.0, denominator=denominator))
        assert [choice.ratio for choice in allocation.choices] == [0.0] * len(LAYERS)
        assert allocation.distortion == 0
        assert allocation.gap == 0
        assert all(mask.keep.all() for mask in masks_of(LAYERS, SCORES, allocation, {}))


def test_what_each_mode_offers() -> None:
    sparse, conv = LAYERS[0], LAYERS[2]
    assert {item.pattern for item in items_for(sparse, CURVES["a"], "auto")} == {"tile"}
    assert {item.pattern for item in items_for(sparse, CURVES["a"], "unstructured")} == {"unstructured"}
    mixed = items_for(conv, CURVES["c"], "auto")
    assert [item.pattern for item in mixed] == ["unstructured"] * 50 + ["2:4"] * 49
    assert max(item.ratio for item in mixed[:50]) < 0.5 <= min(item.ratio for item in mixed[50:])
    assert [item.step for item in mixed] == [*range(50), *range(49)]
    assert {item.pattern for item in items_for(conv, CURVES["c"], "unstructured")} == {"unstructured"}
    assert {item.pattern for item in items_for(LAYERS[4], CURVES["e"], "auto")} == {"unstructured"}


def test_modes_and_curves_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match=r"no pattern mode 'unstructred'\. Fix: did you mean 'unstructured'"):
        items_for(LAYERS[0], CURVES["a"], "unstructred")
    with pytest.raises(InternalError, match="another layer or double"):
        items_for(LAYERS[0], CURVES["b"], "auto")
    with pytest.raises(InternalError, match="another layer or double"):
        items_for(LAYERS[0], CURVES["a"] * 2, "auto")
    with pytest.raises(InternalError, match="no unstructured curve"):
        items_for(LAYERS[0], CURVES["a"][1:], "unstructured")


def test_a_budget_out_of_reach_names_the_cheapest() -> None:
    with pytest.raises(InfeasibleBudget) as refusal:
        allocate(items("auto"), budget=Budget(value=0.05, denominator=DENSE), fixed_cost=0.1 * DENSE)
    cheapest = 0.1 + sum(min(item.cost for item in group) for group in items("auto")) / DENSE
    assert refusal.value.cheapest == pytest.approx(cheapest, rel=1e-12)
    text = re.fullmatch(
        r"The target 0\.05 of the backbone's MACs cannot be reached: pruned as far as patterns allow, (0\.\d+) are "
        r"left, 0\.1000 of them in layers that stay dense\. Fix: raise --target to (0\.\d+) or more",
        str(refusal.value),
    )
    assert text
    assert float(text[1]) == pytest.approx(cheapest, abs=1e-4)
    again = allocate(items("auto"), budget=Budget(value=float(text[2]), denominator=DENSE), fixed_cost=0.1 * DENSE)
    assert again.share <= float(text[2])


def test_allocations_without_items_are_refused() -> None:
    budget = Budget(value=0.5, denominator=DENSE)
    both = (*items("auto")[0], *items("auto")[1])
    for wrong in ([], [()], [both]):
        with pytest.raises(InternalError, match="each with items of its own"):
            allocate(wrong, budget=budget)


def item(cost: float, distortion: float, *, layer: str = "x", step: int = 0) -> Choice:
    return Choice(layer=layer, pattern="unstructured", step=step, ratio=0.0, distortion=distortion, cost=cost)


def test_ties_go_to_the_lowest_cost_then_to_the_first() -> None:
    group = [item(9, 1, step=0), item(4, 1, step=1), item(4, 1, step=2), item(2, 5, step=3)]
    for target in (0.4, 0.5, 1.0):
        assert allocate([group], budget=Budget(value=target, denominator=10)).choices[0].step == 1
    assert undominated(np.array([9.0, 4, 4, 2]), np.array([1.0, 1, 1, 5])).tolist() == [3, 1]


@settings(max_examples=60)
@given(
    groups=st.lists(
        st.lists(st.tuples(st.integers(0, 20), st.floats(0, 1)), min_size=1, max_size=6), min_size=1, max_size=5
    ),
    capacity=st.integers(0, 60),
)
def test_more_capacity_is_never_worse(groups: list[list[tuple[int, float]]], capacity: int) -> None:
    sizes = [np.array([size for size, _ in group]) for group in groups]
    losses = [np.array([loss for _, loss in group]) for group in groups]
    totals = []
    for room in (capacity, capacity + 1, capacity + 7):
        picks = knapsack(sizes, losses, room)
        totals.append(np.inf if picks is None else sum(float(x[pick]) for x, pick in zip(losses, picks, strict=True)))
    assert totals[0] >= totals[1] >= totals[2]


def test_a_larger_target_is_never_worse() -> None:
    targets = np.linspace(0.08, 1, 60)
    found = [allocate(items("auto"), budget=Budget(value=t, denominator=DENSE)).distortion for t in targets]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(found))
    assert found[0] > found[-1] == 0


def test_knapsacks_that_make_no_sense_are_refused() -> None:
    one = [np.array([1.0, 2.0])]
    for costs, losses, bins in (([], [], 10), (one, [np.zeros(3)], 10), (one, one, 0), ([np.zeros(0)],) * 2 + (10,)):
        with pytest.raises(InternalError, match="as many costs as distortions"):
            solve(costs, losses, 3.0, bins=bins)
    with pytest.raises(InternalError, match="must be finite"):
        solve(one, [np.array([0, np.nan])], 3.0)
    with pytest.raises(InternalError, match=r"the cheapest items cost 1, the limit is 0\.5"):
        solve(one, one, 0.5)
    with pytest.raises(InternalError, match="too many items"):
        knapsack([np.zeros(40_000, dtype=int)], [np.zeros(40_000)], 1)


def test_masks_are_of_their_choice() -> None:
    dense = Choice(layer="c", pattern="dense", step=0, ratio=0.0, distortion=0.0, cost=LAYERS[2].macs)
    assert mask_of(LAYERS[2], SCORES["c"], dense).keep.all()
    with pytest.raises(InternalError, match="the choice for c is no choice for a"):
        mask_of(LAYERS[0], SCORES["a"], dense)
    wrong = items("unstructured")[0][40]
    with pytest.raises(InternalError, match="its choice counted"):
        mask_of(LAYERS[0], SCORES["a"][:, ::-1] * np.arange(1, 4)[:, None, None, None], wrong)


def test_a_layer_without_gradient_is_refused() -> None:
    layer = LAYERS[2]
    with pytest.raises(UsageError, match=r"The layer c received no gradient from 3 samples.*--lambda-box"):
        layer_curve(
            layer, np.ones(layer.shape), np.zeros((3, *layer.shape)), np.ones(layer.shape), "unstructured",
            ratio_grid(), kappa=1e-7,
        )  # fmt: skip
    with pytest.raises(InternalError, match="do not fit"):
        layer_curve(
            layer, np.ones(layer.shape), np.zeros((3, 5)), np.ones(layer.shape), "unstructured", ratio_grid(), kappa=0.0
        )


def test_rankings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InternalError, match="disagree"):
        scores(np.ones(3), np.ones(4))
    for square, damping in ((-np.ones(3), 1.0), (np.full(3, np.inf), 1.0), (np.ones(3), -1.0)):
        with pytest.raises(InternalError, match="not negative"):
            scores(np.ones(3), square, damping=damping)
