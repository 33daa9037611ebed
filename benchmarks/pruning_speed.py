"""Seconds for the curves of CenterPoint's 35 backbone layers and their allocation, with random gradients.

Run it on the cores it is meant for: `taskset -c 0,1 python benchmarks/pruning_speed.py`.
"""

from __future__ import annotations

import time

import numpy as np

from dm3d_deploy.device import device_named
from dm3d_deploy.pruning.allocation import allocate, cheapest_within, items_for
from dm3d_deploy.pruning.contracts import Budget, Choice, Curve, Layer
from dm3d_deploy.pruning.costs import executed_costs, time_costs
from dm3d_deploy.pruning.curves import layer_curve
from dm3d_deploy.pruning.estimate import estimated_profile
from dm3d_deploy.pruning.knapsack import knapsack
from dm3d_deploy.pruning.macs import dense_macs
from dm3d_deploy.pruning.masks import masks_of
from dm3d_deploy.pruning.patterns import eligible_patterns, ratio_grid
from dm3d_deploy.pruning.ranking import scores

ROWS = 16  # 8 frames, 2 sketches each
RATIOS = 100


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
    """The 21 sparse and 14 dense backbone layers of CenterPoint, voxels of 0.1 m, nuScenes."""
    layers = [sparse("conv_input", 5, 16, 60_000)]
    layers += [sparse(f"conv1.{i}", 16, 16, 60_000) for i in range(4)]
    for stage, (inputs, outputs, sites) in enumerate([(16, 32, 66_727), (32, 64, 33_770), (64, 128, 13_163)], start=2):
        layers.append(sparse(f"conv{stage}.0", inputs, outputs, sites))
        layers += [sparse(f"conv{stage}.{i}", outputs, outputs, sites) for i in range(1, 5)]
    layers.append(sparse("conv_out", 128, 128, 10_675, (3, 1, 1)))
    layers.append(dense("blocks.0.0", 256, 128, 128))
    layers += [dense(f"blocks.0.{i}", 128, 128, 128) for i in range(1, 6)]
    layers.append(dense("blocks.1.0", 128, 256, 64))
    layers += [dense(f"blocks.1.{i}", 256, 256, 64) for i in range(1, 6)]
    return [*layers, transposed("deblocks.0", 128, 256, 128, 1), transposed("deblocks.1", 256, 256, 64, 2)]


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
    cells = {layer.name: round(layer.positions[0]) * (4 if layer.name == "blocks.1.0" else 1) for layer in layers}
    flat = {name: count for name, count in cells.items() if not name.startswith("conv")}
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
    print(f"{'prices':>14}  {time.perf_counter() - start:7.2f} s")
    for unit, (costs, fixed, dense) in priced.items():
        least = (sum(cost.min() for cost in costs) + fixed) / dense
        budget = Budget(value=(1 + least) / 2, denominator=dense, unit=unit)
        start = time.perf_counter()
        found = allocate(items, budget=budget, costs=costs, fixed_cost=fixed)
        took = time.perf_counter() - start
        print(f"{unit:>14}  {took:7.2f} s  share {found.share:.4f} of {budget.value:.4f}, gap {found.gap:.2e}")
        whole = Budget(value=1.0, denominator=dense, unit=unit)
        start = time.perf_counter()
        back = cheapest_within(items, max_distortion=found.distortion, dense=whole, costs=costs, fixed_cost=fixed)
        took = time.perf_counter() - start
        print(f"{'within':>14}  {took:7.2f} s  share {back.share:.4f} at the same distortion, gap {back.gap:.2e}")


def main() -> None:
    rng = np.random.default_rng(0)
    layers = centerpoint()
    seconds = {"scores": 0.0, "unstructured": 0.0, "2:4": 0.0, "tile": 0.0, "allocate": 0.0, "masks": 0.0}
    kept_scores: dict[str, np.ndarray] = {}
    items: list[tuple[Choice, ...]] = []
    for layer in layers:
        weight = rng.normal(0, 0.05, layer.shape).astype(np.float32)
        spread = rng.lognormal(0, 1, layer.shape).astype(np.float32)
        gradients = rng.normal(0, 1, (ROWS, *layer.shape)).astype(np.float32) * spread
        start = time.perf_counter()
        kept_scores[layer.name] = scores(weight, np.square(gradients).mean(axis=0))
        seconds["scores"] += time.perf_counter() - start
        curves: list[Curve] = []
        for pattern in eligible_patterns(layer, ("2:4", "tile"))[0]:
            start = time.perf_counter()
            ranked = kept_scores[layer.name]
            curves.append(layer_curve(layer, weight, gradients, ranked, pattern, ratio_grid(RATIOS), kappa=1e-7))
            seconds[pattern] += time.perf_counter() - start
        items.append(items_for(layer, curves, "auto"))
    budget = Budget(value=0.5, denominator=sum(dense_macs(layers).values()))
    start = time.perf_counter()
    allocation = allocate(items, budget=budget)
    seconds["allocate"] = time.perf_counter() - start
    start = time.perf_counter()
    masks_of(layers, kept_scores, allocation, {})
    seconds["masks"] = time.perf_counter() - start

    weights = sum(layer.weights for layer in layers)
    print(f"{len(layers)} layers, {weights:,} weights, {ROWS} gradient rows, {RATIOS} ratios")
    for stage, took in {**seconds, "all": sum(seconds.values())}.items():
        print(f"{stage:>14}  {took:7.2f} s")
    print(f"{'60 x 150 items':>14}  {hardest_knapsack():7.2f} s  (knapsack alone, nothing struck out)")
    every_cost(layers, items)
    print(f"target {budget.value:g}: kept {allocation.share:.6f}, gap to the bound {allocation.gap:.2e}")


if __name__ == "__main__":
    main()
