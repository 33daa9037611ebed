"""A run against torch, stage by stage: sites, features, map, tiles; and two runs against each other, byte by byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from benchmarks.sparse3d_gpu.cases import TOLERANCE, Case, Precision
from benchmarks.sparse3d_gpu.findings import Finding, judged
from benchmarks.sparse3d_gpu.kernels import compared
from engines.sparse3d.interpreter import PlanRun
from engines.sparse3d.plan import Plan

Reference = Mapping[str, tuple[np.ndarray, np.ndarray]]


def check_stages(
    case: Case, plan: Plan, run: PlanRun, reference: Reference, *, part: str, precision: Precision
) -> Iterator[Finding]:
    """One finding for each module of the backbone, for the map and for the tiles that were multiplied."""
    by_name = {layer.name: layer for layer in case.backbone.layers}
    tolerance = TOLERANCE[precision]
    for name, (keys, features) in reference.items():
        stage = by_name[name].stage_out
        apart, words = compared(run.kept[f"{stage}.sites"][: len(keys)], keys)
        error, far = compared(run.kept[name][: len(keys), : features.shape[1]], features)
        right = run.status[stage] == len(keys) and apart == 0 and error <= tolerance
        words = f"{run.status[stage]} sites of {len(keys)}, {words}; features: {far}, at most {tolerance:g}"
        yield judged(part, f"{name} ({stage})", right, words)
    keys, features = reference[case.backbone.layers[-1].name]
    grid = case.backbone.stages[-1].grid
    dense = np.zeros((features.shape[1], int(np.prod(grid))), np.float32)
    dense[:, keys] = features.T
    if case.backbone.tells_active:
        dense = np.concatenate([dense, np.zeros_like(dense[:1])])
        dense[-1, keys] = 1
    error, words = compared(run.outputs["bev"].reshape(dense.shape), dense)
    yield judged(part, "bev", error <= tolerance, f"{words}, at most {tolerance:g}")
    executed, predicted = run.kept["executed"].tolist(), list(plan.meta["cost"]["tile_products"].values())
    words = f"{sum(executed)} tile products counted by the kernels, {sum(predicted):.0f} predicted"
    yield judged(part, "tiles", executed == predicted, words)


def check_repeats(runs: Sequence[PlanRun], *, part: str) -> Finding:
    """The same frame again and its rows in another order: the same bytes."""
    first, *others = runs
    same = [
        other.status == first.status
        and all(array.tobytes() == first.outputs[name].tobytes() for name, array in other.outputs.items())
        for other in others
    ]
    words = f"{sum(same)} of {len(others)} repetitions, rows in another order among them, give the same bytes"
    return judged(part, "repetition", bool(same) and all(same), words)
