"""What each part of the detector has to give: 3D alone, 3D and 2D, and the head too, at equal MACs of the whole model.

`python -m benchmarks.ablation_parts --model centerpoint-slim --out docs/measurements/ablation-by-part.md` (the paper's
Table 4). A part cannot save more than it has: combinations that would are left out, and said so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.stamped import Lines, floats, leave, markdown, parser_of, stamped_comparison
from dm3d_deploy.build import build
from dm3d_deploy.compare import ComparedRun, compare
from dm3d_deploy.pruning.contracts import Layer
from dm3d_deploy.recipe import RECOVERIES, Recipe
from dm3d_deploy.stages import FILES
from dm3d_deploy.steps.layers import in_scope, read_layers
from dm3d_deploy.sweep import sweep

PARTS = {"backbone3d": "3D", "backbone": "3D and 2D", "model": "3D, 2D and head"}
LEAST = 0.03  # of a layer's weights: curves end at 0.02


def share_of_scope(layers: Sequence[Layer], scope: str, of_model: float) -> float | None:
    """The share that a scope keeps when the whole model keeps `of_model`; None where the scope cannot save as much."""
    inside = in_scope(layers, scope)
    own, whole = math.fsum(layer.macs for layer in inside), math.fsum(layer.macs for layer in layers)
    share = 1 - (1 - of_model) * whole / own
    least = math.fsum(layer.macs * (1 if layer.final else LEAST) for layer in inside) / own
    return round(share, 6) if share > least else None


def table(rows: Sequence[tuple[str, float, ComparedRun | None]]) -> list[str]:
    """A row a part, a pair of columns a budget: distortion with the mask alone, and of the weights that ship."""
    budgets = sorted({share for _, share, _ in rows}, reverse=True)
    head = ["what is pruned", *(f"model keeps {share:g}" for share in budgets)]
    body = []
    for scope, name in PARTS.items():
        cells = {share: _cell(run) for own, share, run in rows if own == scope}
        if cells:
            body.append([name, *(cells[share] for share in budgets)])
    return markdown(head, body)


def _cell(run: ComparedRun | None) -> str:
    if run is None:
        return "has not as much to give"
    recovered = "" if run.recovered is None else f", recovered {run.recovered:.4g}"
    precision = "" if run.ap is None else f", {run.ap_name} {run.ap:.1f}"
    return f"{run.pruned:.4g}{recovered}{precision} ({run.kept_of_model:.4f} kept)"


def main() -> None:
    parser = parser_of(__doc__, frames=16, work="runs/ablation-parts")
    parser.add_argument("--shares", default="0.9,0.8,0.7,0.5", help="of the whole model's MACs")
    parser.add_argument("--recover", default="reconstruct", choices=RECOVERIES)
    given = parser.parse_args()
    began = time.perf_counter()
    rows: list[tuple[str, float, Path | None]] = []
    for scope in PARTS:
        recipe = Recipe(
            model=given.model, checkpoint=given.checkpoint, target=1.0, scope=scope, patterns="unstructured",
            recover=given.recover, held_out_frames=given.frames, calibration_frames=given.calibration_frames,
        )  # fmt: skip
        base = given.work / scope / "base"
        build(replace(recipe, candidates=1), base, last="gradients", watch=Lines())
        wanted = {of_model: share_of_scope(read_layers(base / FILES["layers"]), scope, of_model)
                  for of_model in floats(given.shares)}  # fmt: skip
        targets = [share for share in wanted.values() if share is not None]
        made = sweep(recipe, targets=targets, methods=["dm3d"], out=base.parent, watch=Lines()) if targets else []
        points = iter(made)
        rows += [(scope, of_model, None if share is None else next(points)) for of_model, share in wanted.items()]
    found = compare([path for _, _, path in rows if path is not None])
    runs = {run.run: run for run in found.runs}
    lines = [f"# {found.model}: what each part has to give", "", *stamped_comparison(found, began)]
    lines += [
        f"Unstructured masks, {given.calibration_frames} calibration frames; distortion of the masked weights, then "
        f"behind `--recover {given.recover}` where it was accepted.", "",
        *table([(scope, share, None if path is None else runs[str(path)]) for scope, share, path in rows]),
    ]  # fmt: skip
    leave(lines, given.out)


if __name__ == "__main__":
    main()
