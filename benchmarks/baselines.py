"""DM3D against every baseline on frames that chose nothing: same frames, same gradients, same MACs, same recovery.

`python -m benchmarks.baselines --model centerpoint-slim --out runs/baselines --table docs/measurements/baselines.md`.
An interrupted run goes on where it stopped. `--recover reconstruct` measures without recovery, too, by points of their
own: curves that foresee a refit make other masks than curves of the mask alone.
"""

from __future__ import annotations

import argparse
import datetime
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.stamped import Lines
from dm3d_deploy.compare import ComparedRun, RunComparison, compare
from dm3d_deploy.device import stamp_here
from dm3d_deploy.recipe import RECOVERIES, Recipe
from dm3d_deploy.sweep import SWEPT, sweep

OURS = "dm3d"
BARS = {0.7: 0.5, 0.5: 0.5, 0.3: 0.8}  # of the best baseline, without recovery; with recovery DM3D is to be the best


def best_other(rows: list[ComparedRun], target: float, column: str) -> tuple[str, float] | None:
    """The baseline of the least distortion at a target: its name and distortion."""
    known = [(getattr(row, column), row.method) for row in rows if row.target == target and row.method != OURS]
    known = [(value, name) for value, name in known if value is not None]
    return (min(known)[1], min(known)[0]) if known else None


def table(masked: RunComparison, recovered: RunComparison | None, command: str, seconds: float) -> str:
    """The measurement as a page; `masked` is without recovery."""
    stamp = stamp_here()
    rows, found = list(masked.runs), masked
    targets = sorted({row.target for row in rows if row.target is not None}, reverse=True)
    kind = "simulated " if found.simulated else ""
    lines = [
        f"# {found.model}: distortion of DM3D and of the baselines at equal MACs",
        "",
        f"`{command}`, {datetime.date.today().isoformat()}, {stamp.cpu}, {seconds / 60:.0f} minutes beside other work.",
        f"Mean over {len(found.frames)} {kind}held-out frames ({found.frames[0]} to {found.frames[-1]}) that chose",
        "nothing; unstructured masks, budget over both backbones, 8 calibration frames. 0 is the dense output.",
        "",
    ]
    for found, name in ((masked, "pruned"), (recovered, "distortion")):
        if found is None:
            continue
        rows = list(found.runs)
        title = "Without recovery" if found is masked else "With recovery, where it was accepted"
        lines += [f"## {title}", "", "| method | " + " | ".join(f"R = {target:g}" for target in targets) + " |"]
        lines.append("|---" * (len(targets) + 1) + "|")
        for method in dict.fromkeys(row.method for row in rows):
            cells = [getattr(row, name) for t in targets for row in rows if (row.method, row.target) == (method, t)]
            lines.append(f"| {method} | " + " | ".join(f"{cell:.4g}" for cell in cells) + " |")
        lines.append(f"| {OURS} over the best other | " + " | ".join(_held(rows, t, name) for t in targets) + " |")
        lines.append("")
    every = [*masked.runs, *(recovered.runs if recovered is not None else ())]
    off = max(abs(row.kept_of_backbone - row.target) for row in every if row.target is not None)
    lines.append(f"Kept shares differ from their targets by {off:.2g} at most.")
    return "\n".join(lines) + "\n"


def _held(rows: list[ComparedRun], target: float, column: str) -> str:
    ours = [getattr(row, column) for row in rows if (row.method, row.target) == (OURS, target)]
    best = best_other(rows, target, column)
    if not ours or best is None:
        return "-"
    bar = BARS.get(target, 1.0) if column == "pruned" else 1.0
    ratio = ours[0] / best[1]
    return f"{ratio:.2f} of {best[0]} (bar {bar:g}: {'met' if ratio <= bar else 'MISSED'})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="centerpoint-slim")
    parser.add_argument("--checkpoint")
    parser.add_argument("--out", type=Path, default=Path("runs/baselines"))
    parser.add_argument("--table", type=Path)
    parser.add_argument("--targets", default="0.7,0.5,0.3")
    parser.add_argument("--methods", default=",".join(SWEPT))
    parser.add_argument("--recover", default="none", choices=RECOVERIES)
    parser.add_argument("--held-out-frames", type=int, default=16)
    given = parser.parse_args()
    targets = [float(word) for word in given.targets.split(",")]
    recipe = Recipe(
        model=given.model, checkpoint=given.checkpoint, target=targets[0], patterns="unstructured",
        recover=given.recover, held_out_frames=given.held_out_frames,
    )  # fmt: skip
    started = time.perf_counter()

    def compared(kind: str, out: Path) -> RunComparison:
        points = sweep(
            replace(recipe, recover=kind), targets=targets, methods=given.methods.split(","), out=out, watch=Lines()
        )
        return compare(points, out=out)

    masked = compared("none", given.out if given.recover == "none" else given.out.with_name(f"{given.out.name}-masked"))
    recovered = compared(given.recover, given.out) if given.recover != "none" else None
    words = [f"--{name.replace('_', '-')} {value}" for name, value in vars(given).items()
             if value is not None and name not in ("out", "table")]  # fmt: skip
    page = table(masked, recovered, " ".join(["python -m benchmarks.baselines", *words]), time.perf_counter() - started)
    print(page)
    if given.table is not None:
        given.table.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
