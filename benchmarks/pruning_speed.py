"""Seconds for the curves of CenterPoint's 35 backbone layers and their allocation, with random gradients.

Run it on the cores it is meant for: `taskset -c 0,1 python benchmarks/pruning_speed.py`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import numpy as np

from dm3d_deploy.device import device_named
from dm3d_deploy.pruning.allocation import allocate, cheapest_within, items_for
from dm3d_deploy.pruning.channels import group_curve
from dm3d_deploy.pruning.contracts import Budget, Choice, Curve, Layer, Pattern
from dm3d_deploy.pruning.costs import executed_costs, time_costs
from dm3d_deploy.pruning.curves import layer_curve
from dm3d_deploy.pruning.estimate import estimated_profile
from dm3d_deploy.pruning.groups import channel_groups
from dm3d_deploy.pruning.knapsack import knapsack
from dm3d_deploy.pruning.macs import dense_macs
from dm3d_deploy.pruning.masks import masks_of
from dm3d_deploy.pruning.patterns import eligible_patterns, ratio_grid
from dm3d_deploy.pruning.ranking import scores
from dm3d_deploy.steps.slim import Whole, candidates_within

ROWS = 16  # 8 frames, 2 sketches each
RATIOS = 100
OFFERED: tuple[Pattern, ...] = ("2:4", "tile")


def sparse(name: str, inputs: int, outputs: int, sites: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> Layer:
    """A sparse layer whose centre tap has `sites` pairs and whose other taps have fewer, the farther the fewer."""
    offsets = np.indices(kernel).reshape(3, -1).T - (np.array(kernel) - 1) / 2
    positions = sites * 0.45 ** np.abs(offsets).sum(axis=1)
    return Layer(name=name, part="3d", kind="sparse", shape=(outputs, *kernel, inputs), positions=positions)


def dense(name: str, inputs: int, outputs: int, side: int, kernel: int = 3) -> Layer:
    """A 2D convolution with a square output of that side."""
    positions = np.full(kernel * kernel, float(side * side))
    return Layer(name=name, part="2d", kind="conv2d", shape=(outputs, inputs, kernel, kernel), positions=positions)


def transposed(name: str, inputs: int, outputs: int, side: int, kernel: int) -> Layer:
    """A transposed convolution with a square input of that side and a stride of its kernel."""
    positions = np.full(kernel * kernel, float(side * side))
    return Layer(name=name, part="2d", kind="deconv2d", shape=(inputs, outputs, kernel, kernel), positions=positions)


def centerpoint() -> list[Layer]:
    """The 21 sparse and 14 dense backbone layers of CenterPoint, voxels of 0.1 m, nuScenes, under their names."""
    layers = [sparse("backbone_3d.conv_input.0", 5, 16, 60_000), *blocks("backbone_3d.conv1", (0, 1), 16, 60_000)]
    for stage, (inputs, outputs, sites) in enumerate([(16, 32, 66_727), (32, 64, 33_770), (64, 128, 13_163)], start=2):
        name = f"backbone_3d.conv{stage}"
        layers += [sparse(f"{name}.0.0", inputs, outputs, sites), *blocks(name, (1, 2), outputs, sites)]
    layers.append(sparse("backbone_3d.conv_out.0", 128, 128, 10_675, (3, 1, 1)))
    layers.append(dense("backbone_2d.blocks.0.1", 256, 128, 128))
    layers += [dense(f"backbone_2d.blocks.0.{4 + 3 * i}", 128, 128, 128) for i in range(5)]
    layers.append(transposed("backbone_2d.deblocks.0.0", 128, 256, 128, 1))
    layers.append(dense("backbone_2d.blocks.1.1", 128, 256, 64))
    layers += [dense(f"backbone_2d.blocks.1.{4 + 3 * i}", 256, 256, 64) for i in range(5)]
    return [*layers, transposed("backbone_2d.deblocks.1.0", 256, 256, 64, 2)]


def blocks(stage: str, numbers: tuple[int, ...], channels: int, sites: int) -> list[Layer]:
    """The two convolutions of each residual block."""
    names = (f"{stage}.{number}.conv{half}" for number in numbers for half in (1, 2))
    return [sparse(name, channels, channels, sites) for name in names]


class Clock:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def counts(self, what: str) -> Iterator[None]:
        """Add what happens within."""
        start = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start

    def print(self, title: str) -> None:
        """Everything so far, and its sum."""
        for what, took in {**self.seconds, f"all, {title}": sum(self.seconds.values())}.items():
            print(f"{what:>16}  {took:7.2f} s")


def hardest_knapsack() -> float:
    """Seconds for 60 groups of 150 items over 50,000 bins when no item can be struck out beforehand."""
    rng = np.random.default_rng(0)
    sizes = [np.sort(rng.integers(0, 3000, 150))[::-1].copy() for _ in range(60)]
    losses = [np.sort(rng.random(150)) for _ in range(60)]
    start = time.perf_counter()
    assert knapsack(sizes, losses, 50_000) is not None
    return time.perf_counter() - start


def every_cost(layers: list[Layer], items: list[tuple[Choice, ...]]) -> None:
    """Print the seconds of one allocation for each goal and cost, each at a limit that these items can reach."""
    cells = {
        layer.name: round(layer.positions[0]) * (4 if layer.name == "backbone_2d.blocks.1.1" else 1) for layer in layers
    }
    flat = {name: count for name, count in cells.items() if name.startswith("backbone_2d")}
    profile = estimated_profile(layers, flat, device_named("orin"), voxels=60_000, model_name="centerpoint")
    times = profile.times()
    pairs = list(zip(layers, items, strict=True))
    macs = sum(dense_macs(layers).values())
    start = time.perf_counter()
    priced = {
        "macs": ([np.array([item.cost for item in group]) for group in items], 0.0, macs),
        "executed": ([executed_costs(layer, group) for layer, group in pairs], 0.0, macs),
        "ms": ([time_costs(times[layer.name], layer, group) for layer, group in pairs], 6.3, profile.dense_ms),
    }
    print(f"{'prices':>16}  {time.perf_counter() - start:7.2f} s")
    for unit, (costs, fixed, dense) in priced.items():
        least = (sum(cost.min() for cost in costs) + fixed) / dense
        budget = Budget(value=(1 + least) / 2, denominator=dense, unit=unit)
        start = time.perf_counter()
        found = allocate(items, budget=budget, costs=costs, fixed_cost=fixed)
        took = time.perf_counter() - start
        print(f"{unit:>16}  {took:7.2f} s  share {found.share:.4f} of {budget.value:.4f}, gap {found.gap:.2e}")
        whole = Budget(value=1.0, denominator=dense, unit=unit)
        start = time.perf_counter()
        back = cheapest_within(items, max_distortion=found.distortion, dense=whole, costs=costs, fixed_cost=fixed)
        took = time.perf_counter() - start
        print(f"{'within':>16}  {took:7.2f} s  share {back.share:.4f} at the same distortion, gap {back.gap:.2e}")


def main() -> None:
    rng = np.random.default_rng(0)
    layers = centerpoint()
    clock = Clock()
    kept_scores: dict[str, np.ndarray] = {}
    weights: dict[str, np.ndarray] = {}
    gradients: dict[str, np.ndarray] = {}
    curves: list[Curve] = []
    items: list[tuple[Choice, ...]] = []
    for layer in layers:
        name, spread = layer.name, rng.lognormal(0, 1, layer.shape).astype(np.float32)
        weights[name] = rng.normal(0, 0.05, layer.shape).astype(np.float32)
        gradients[name] = rng.normal(0, 1, (ROWS, *layer.shape)).astype(np.float32) * spread
        with clock.counts("scores"):
            kept_scores[name] = scores(weights[name], np.square(gradients[name]).mean(axis=0))
        own: list[Curve] = []
        for pattern in eligible_patterns(layer, OFFERED)[0]:
            with clock.counts(pattern):
                given = weights[name], gradients[name], kept_scores[name]
                own.append(layer_curve(layer, *given, pattern, ratio_grid(RATIOS), kappa=1e-7))
        items.append(items_for(layer, own, "auto"))
        curves += own
    budget = Budget(value=0.5, denominator=sum(dense_macs(layers).values()))
    with clock.counts("allocate"):
        allocation = allocate(items, budget=budget)
    with clock.counts("masks"):
        masks_of(layers, kept_scores, allocation, {})

    print(f"{len(layers)} layers, {sum(layer.weights for layer in layers):,} weights, {ROWS} rows, {RATIOS} ratios")
    clock.print("patterns alone")
    whole(layers, curves, kept_scores, weights, gradients, clock)
    print(f"{'60 x 150 items':>16}  {hardest_knapsack():7.2f} s  (knapsack alone, nothing struck out)")
    every_cost(layers, items)
    print(f"target {budget.value:g}: kept {allocation.share:.6f}, gap to the bound {allocation.gap:.2e}")


def whole(
    layers: list[Layer],
    curves: list[Curve],
    kept_scores: dict[str, np.ndarray],
    weights: dict[str, np.ndarray],
    gradients: dict[str, np.ndarray],
    clock: Clock,
) -> None:
    """Add channels, residual blocks and both before patterns, by executed MACs: all that a build may choose from."""
    by_name, groups = {layer.name: layer for layer in layers}, channel_groups(layers)
    with clock.counts("channel curves"):
        made = {
            group.name: group_curve(group, by_name, weights, gradients, multiple=8, kappa=1e-7, damping=1.0)
            for group in groups
        }
    lost = {name.removesuffix(".conv1"): 0.1 for name in by_name if name.endswith(".conv1")}
    offer = Whole(every=tuple(layers), layers=tuple(layers), groups=groups, curves=made, blocks=lost)
    budget = Budget(value=0.5, denominator=sum(dense_macs(layers).values()), unit="executed")
    with clock.counts("channels, blocks"):
        candidates_within(offer, budget, curves=[], offered=set(), scores={})
    with clock.counts("and with patterns"):
        candidates_within(offer, budget, curves=curves, offered=set(OFFERED), scores=kept_scores)
    clock.print(f"with channels of {len(groups)} groups, {len(lost)} blocks and four candidates")


if __name__ == "__main__":
    main()
