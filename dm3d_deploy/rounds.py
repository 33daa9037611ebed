"""Gradual pruning: each round ranks, prices and recovers the weights that the round before left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dm3d_deploy.build import build
from dm3d_deploy.errors import UsageError
from dm3d_deploy.progress import Watch
from dm3d_deploy.recipe import Recipe
from dm3d_deploy.stages import FILES


def earlier_rounds(recipe: Recipe, out: Path, rounds: int, *, watch: Watch | None = None) -> Recipe:
    """Build all rounds but the last beside `out`, and return the recipe of the last.

    Round n of N keeps target^(n / N): every round keeps the same share of the one before. Distortions are measured
    against the dense detector throughout. Raises UsageError for less than one round, and for several where the goal is
    no share of a cost; and what `build` raises.
    """
    if rounds < 1:
        raise UsageError(f"{rounds} rounds prune nothing.", fix="give --rounds 1 or more")
    if rounds > 1 and recipe.target is None:
        raise UsageError("Rounds go down to a share of the cost.", fix="give --target 0.3, or --rounds 1")
    for number in range(1, rounds):
        target = round((recipe.target or 1.0) ** (number / rounds), 6)
        folder = out.with_name(f"{out.name}-round{number}")
        build(replace(recipe, target=target), folder, last="recover", watch=watch)
        recipe = replace(recipe, start=str(folder / FILES["pruned_weights"]))
    return recipe
