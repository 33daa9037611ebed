"""Evidence for the defaults of scores and curves: ranking damping, sketches, calibration frames, the two lambdas.

`python -m benchmarks.score_evidence --model centerpoint-slim --out docs/measurements/score-evidence.md`. One choice at
a time differs from the defaults; unstructured, no recovery, one candidate. All are judged alike: true distortion in the
defaults' measure, and its score and box parts, on frames that neither calibrate nor report (those of seed 7).
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.stamped import Lines, floats, leave, markdown, parser_of, stamped
from calib.pool import FramePool
from dm3d_deploy.artifacts import write_json, write_tensors
from dm3d_deploy.build import build
from dm3d_deploy.pruning.normalisation import OutputScale, output_distortion, top_cells
from dm3d_deploy.recipe import Recipe
from dm3d_deploy.stages import RunContext
from dm3d_deploy.steps.frame_work import Maps, frames_of, outputs_of
from dm3d_deploy.steps.recover import masked_weights
from dm3d_deploy.sweep import share_run

# Settings of the gradients; behind the defaults' the dampings are tried.
SKETCHED: dict[str, dict[str, Any]] = {
    "defaults": {},
    "1 sketch": {"sketches": 1},
    "4 sketches": {"sketches": 4},
    "4 frames": {"calibration_frames": 4},
    "16 frames": {"calibration_frames": 16},
    "lambda of boxes 0.25": {"lambda_box": 0.25},
    "lambda of boxes 4": {"lambda_box": 4.0},
}
DAMPINGS = (0.0, 0.1, 0.3, 3.0, 10.0)
SEED = 7

Parts = tuple[float, float, float]  # the distortion, its score part, its box part


class Judge:
    """Distortion of masked weights on the held-out frames, in the measure of the run `base`."""

    def __init__(self, run: RunContext) -> None:
        self.frames = frames_of(run, "held_out")
        self.scale = OutputScale.from_json(json.loads(run.path("output_scale").read_text(encoding="utf-8")))
        self.dense = outputs_of(run, run.path("dense_weights"), self.frames, lambda _: None)

    def parts(self, run: RunContext) -> Parts:
        """Means over the frames."""
        trial = run.root / "work" / ".judged.safetensors"
        write_tensors(trial, masked_weights(run))
        found = outputs_of(run, trial, self.frames, lambda _: None)
        trial.unlink()
        score, box = (self._mean(found, **weights) for weights in ({"lambda_box": 0.0}, {"lambda_score": 0.0}))
        return score + box, score, box

    def _mean(self, found: list[Maps], **weights: float) -> float:
        each = [
            output_distortion(dense, other, self.scale, top_cells(dense, self.scale.box_cells), **weights)
            for dense, other in zip(self.dense, found, strict=True)
        ]
        return math.fsum(each) / len(each)


def measured(recipe: Recipe, work: Path, targets: list[float], pool: FramePool) -> dict[str, list[Parts]]:
    """The parts at each target, by setting; a setting whose file is there is not measured again."""
    found: dict[str, list[Parts]] = {}
    judge: Judge | None = None
    for number, (name, changes) in enumerate(SKETCHED.items()):
        base = work / f"base-{number}"
        build(replace(recipe, **changes), base, last="gradients", watch=Lines(), pool=pool)
        dampings = {name: {}, **({f"damping {c:g}": {"damping": c} for c in DAMPINGS} if not changes else {})}
        for place, (label, more) in enumerate(dampings.items()):
            point = replace(recipe, **changes, **more)
            told = work / f"point-{number}-{place}.json"
            if not told.is_file():
                folder = work / f"run-{number}-{place}"
                share_run(base, folder)
                run = RunContext(root=folder, recipe=point, watch=Lines(), pool=pool)
                judge = judge or Judge(replace(run, root=work / "base-0"))
                rows = []
                for target in targets:
                    build(replace(point, target=target), folder, last="mask", watch=Lines(), pool=pool)
                    rows.append(judge.parts(run))
                write_json(told, rows)
            found[label] = [tuple(row) for row in json.loads(told.read_text(encoding="utf-8"))]
            print(f"{time.strftime('%H:%M:%S')}  {label}  {found[label]}", file=sys.stderr, flush=True)
    return found


def table(found: dict[str, list[Parts]], targets: list[float]) -> list[str]:
    """A row a setting; the least of a column stands in bold."""
    least = [min(rows[column][0] for rows in found.values()) for column in range(len(targets))]
    head = ["setting", *(f"R = {target:g} (score + box)" for target in targets)]
    return markdown(head, [[name, *(_cell(parts, best) for parts, best in zip(rows, least, strict=True))]
                           for name, rows in found.items()])  # fmt: skip


def _cell(parts: Parts, best: float) -> str:
    whole = f"**{parts[0]:.4g}**" if parts[0] == best else f"{parts[0]:.4g}"
    return f"{whole} ({parts[1]:.3g} + {parts[2]:.3g})"


def main() -> None:
    parser = parser_of(__doc__, frames=4, work="runs/score-evidence")
    parser.add_argument("--targets", default="0.5,0.3")
    given = parser.parse_args()
    began, targets = time.perf_counter(), floats(given.targets)
    recipe = Recipe(
        model=given.model, checkpoint=given.checkpoint, target=targets[0], patterns="unstructured", candidates=1,
        calibration_frames=given.calibration_frames, selection_frames=0, held_out_frames=given.frames, recover="none",
        seed=SEED,
    )  # fmt: skip
    with FramePool() as pool:
        found = measured(recipe, given.work, targets, pool)
        run = RunContext(root=given.work / "base-0", recipe=recipe, watch=Lines(), pool=pool)
        page = stamped(run, began)
    lines = [
        f"# {Path(given.model).stem}: what the defaults of scores and curves are worth", "", *page,
        "Unstructured masks, no recovery, the knapsack's own answer; distortions by one scale for all settings. "
        f"Defaults: damping {recipe.damping:g}, {recipe.sketches} sketches, {recipe.calibration_frames} calibration "
        "frames, both lambdas 1.", "",
        *table(found, targets),
    ]  # fmt: skip
    leave(lines, given.out)


if __name__ == "__main__":
    main()
