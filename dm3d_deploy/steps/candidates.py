"""Several allocations for one goal, held against a true forward: their predictions add up what does not add up."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from safetensors import safe_open
from safetensors.numpy import load_file

from dm3d_deploy.artifacts import write_tensors
from dm3d_deploy.errors import DistortionMissed, InfeasibleBudget, InternalError
from dm3d_deploy.pruning.contracts import Allocation, Choice, WeightMask
from dm3d_deploy.pruning.masks import masked_state, masks_of
from dm3d_deploy.recipe import Recipe
from dm3d_deploy.stages import RunContext
from dm3d_deploy.steps.frame_work import Maps, Pieces, distortions, frames_of, outputs_of
from dm3d_deploy.steps.layers import read_group_curves, read_layers

TIE = 0.1
HALVINGS = 6
CAP = 0.9

Items = Sequence[Sequence[Choice]]
Solve = Callable[[Items, float | None], Allocation]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One allocation and how it came about."""

    name: str
    allocation: Allocation


def candidates_of(recipe: Recipe, items: Items, solve: Solve) -> list[Candidate]:
    """The allocations to verify, the knapsack's own answer first, each once.

    For a budget: the least sum of distortions, the least sum of their squares (which spreads the loss over the layers),
    and no layer beyond 90 %. For a distortion: the cheapest within it, within half of it, and so on, as the truth
    exceeds the prediction.
    """
    if recipe.max_distortion is not None:
        limits = [recipe.max_distortion / 2**k for k in range(HALVINGS)]
        found = [Candidate(name=f"predicted within {limit:.4g}", allocation=solve(items, limit)) for limit in limits]
    else:
        found = list(_for_budget(items, solve))[: recipe.candidates]
    unique: dict[tuple[Choice, ...], Candidate] = {}
    for candidate in found:
        unique.setdefault(candidate.allocation.choices, candidate)
    return list(unique.values())


def _for_budget(items: Items, solve: Solve) -> Iterator[Candidate]:
    plain = solve(items, None)
    yield Candidate(name="least sum of distortions", allocation=plain)
    squared = solve([[replace(item, distortion=item.distortion**2) for item in group] for group in items], None)
    yield Candidate(name="least sum of squares", allocation=_with_true_distortions(items, squared, plain.lower_bound))
    with contextlib.suppress(InfeasibleBudget):  # a budget so small that it needs more than nine tenths of some layer
        capped = solve([_capped(group) for group in items], None)
        yield Candidate(name=f"no layer beyond {CAP:.0%}", allocation=replace(capped, lower_bound=plain.lower_bound))


def _capped(group: Sequence[Choice]) -> Sequence[Choice]:
    return [item for item in group if item.ratio <= CAP] or group


def _with_true_distortions(items: Items, allocation: Allocation, bound: float) -> Allocation:
    own = {(item.pattern, item.step, item.layer): item for group in items for item in group}
    choices = tuple(own[choice.pattern, choice.step, choice.layer] for choice in allocation.choices)
    total = math.fsum(choice.distortion for choice in choices)
    return replace(allocation, choices=choices, distortion=total, lower_bound=bound)


def verified(
    run: RunContext, candidates: Sequence[Candidate], *, estimated: bool
) -> tuple[Allocation, list[dict[str, Any]]]:
    """The candidate of the least true distortion on the selection frames, and a row about each that was looked at.

    Where a distortion was asked for: the first, that is the cheapest, that truly stays within it; DistortionMissed
    when none does. Without selection frames, or with one candidate for a budget, the first is taken unverified. With
    `estimated` times, those within a tenth of the chosen one's are ties: no estimate tells them apart.
    """
    if not candidates:
        raise InternalError("no allocation to verify")
    frames, wanted = frames_of(run, "selection"), run.recipe.max_distortion
    if not frames or (wanted is None and len(candidates) == 1):
        first = candidates[0]
        return first.allocation, [_row(first, None, first, estimated)]
    measured: list[float] = []
    for found in _true_distortions(run, candidates, frames):
        measured.append(found)
        if wanted is not None and found <= wanted:
            break
    chosen = len(measured) - 1 if wanted is not None else measured.index(min(measured))
    if wanted is not None and not measured[chosen] <= wanted:
        closest = candidates[chosen].allocation.distortion
        raise DistortionMissed(
            f"The distortion {wanted:g} was not kept on {len(frames)} selection frames: the most faithful of "
            f"{len(measured)} allocations, predicted {closest:.4g}, has {measured[chosen]:.4g}.",
            fix=f"raise --max-distortion to {measured[chosen]:.4g} or more",
        )
    best = candidates[chosen]
    looked_at = zip(candidates, measured, strict=False)  # behind the first that stays within, none was looked at
    return best.allocation, [_row(one, value, best, estimated) for one, value in looked_at]


def _row(candidate: Candidate, measured: float | None, best: Candidate, estimated: bool) -> dict[str, Any]:
    allocation, chosen = candidate.allocation, candidate is best
    near = abs(allocation.cost - best.allocation.cost) <= TIE * best.allocation.cost
    return {
        "name": candidate.name,
        "predicted": allocation.distortion,
        "verified": measured,
        "cost": allocation.cost,
        "share": allocation.share,
        "chosen": chosen,
        "tie": estimated and near and not chosen,
    }


def _true_distortions(run: RunContext, candidates: Sequence[Candidate], frames: tuple[int, ...]) -> Iterator[float]:
    """Mean distortion of the frames' outputs behind each candidate's masks, computed when it is asked for."""
    pieces = Pieces(run, (1 + len(candidates)) * len(frames))
    dense = outputs_of(run, run.path("dense_weights"), frames, pieces.done)
    pieces.next_job(len(frames))
    state = load_file(run.start)
    trial = run.root / "work" / ".candidate.safetensors"
    for candidate in candidates:
        masks = {mask.layer: mask.keep for mask in masks_in(run, candidate.allocation)}
        write_tensors(trial, masked_state(state, masks))
        found: list[Maps] = outputs_of(run, trial, frames, pieces.done)
        pieces.next_job(len(frames))
        trial.unlink()
        each = distortions(run, dense, found)
        yield math.fsum(each) / len(each)


def masks_in(run: RunContext, allocation: Allocation) -> tuple[WeightMask, ...]:
    """The masks of an allocation, from the run's scores and channel curves."""
    with safe_open(run.path("scores"), framework="np") as file:
        scores = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file, not a mapping
    return masks_of(read_layers(run.path("layers")), scores, allocation, read_group_curves(run.path("channels")))
