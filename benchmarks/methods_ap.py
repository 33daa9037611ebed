"""AP of a sweep's points, and each baseline against DM3D at the same budget: `python -m benchmarks.methods_ap SWEEP`.

`python -m benchmarks.baselines --recover reconstruct --out SWEEP`, or `dm3d-deploy sweep --out SWEEP`, leaves the
points. One simulated set of scenes for all, seeds that nothing else uses; intervals are of paired differences.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.baselines import OURS
from benchmarks.pruned_ap import DENSE, Variant, cell, detected, page, rows_of, steps_of, table
from benchmarks.stamped import leave
from calib.held_out import FIRST_SCORE_SEED
from dm3d_deploy.config import DetectorConfig, load_config
from dm3d_deploy.evaluation.rows import ALL
from dm3d_deploy.evaluation.variants import EVERY_MEAN, VULNERABLE_MEAN
from dm3d_deploy.held_out_score import Scenes
from dm3d_deploy.pointcloud import Detections
from dm3d_deploy.stages import FILES


def variants_of(sweep: Path) -> list[Variant]:
    """The dense weights and the points of a sweep, larger budgets first, DM3D first in each."""
    found = []
    for run in sweep.glob(f"*/{FILES['recovery']}"):
        folder = run.parents[1]
        method, _, target = folder.name.rpartition("-")
        found.append(
            Variant(kept=target, recovery=method, steps=steps_of(folder), weights=folder / "weights/pruned.safetensors")
        )
    if not found:
        raise SystemExit(f"{sweep} holds no point of a sweep")
    found.sort(key=lambda variant: (-float(variant.kept), variant.recovery != OURS, variant.recovery))
    dense = found[0].weights.with_name("dense.safetensors")
    return [Variant(kept="1", recovery=DENSE, steps=(), weights=dense), *found]


def against_ours(
    scenes: Scenes, found: Mapping[str, list[Detections]], variants: Sequence[Variant], config: DetectorConfig
) -> str:
    """Each baseline's AP, in brackets its distance from DM3D's at the same budget with the 95 % interval."""
    lines = [f"| kept | method | {VULNERABLE_MEAN} | {EVERY_MEAN} |", "|---|---|---|---|"]
    for kept in dict.fromkeys(variant.kept for variant in variants[1:]):
        places = [str(place) for place, variant in enumerate(variants) if variant.kept == kept]
        rows = rows_of(scenes, {place: found[place] for place in places}, config)
        means = [row for name in (VULNERABLE_MEAN, EVERY_MEAN) for row in rows if (row.name, row.subset) == (name, ALL)]
        for place in places:
            cells = " | ".join(cell(row, place) for row in means)
            lines.append(f"| {kept} | {variants[int(place)].recovery} | {cells} |")
    return "\n".join(lines)


def model_of(sweep: Path) -> str:
    """The model that the sweep's points are of."""
    recipe = json.loads(next(sweep.glob("*/manifest.json")).read_text(encoding="utf-8"))["recipe"]
    return str(recipe["model"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--seed", type=int, default=FIRST_SCORE_SEED)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    variants, config = variants_of(options.sweep), load_config(model_of(options.sweep))
    with tempfile.TemporaryDirectory() as folder:
        scenes, found = detected(Path(folder), config, variants, options.frames, options.seed)
    tables = [
        "Against the dense detector:",
        "",
        table(variants, rows_of(scenes, found, config), "method"),
        "",
        "Against DM3D at the same budget, which comes first:",
        "",
        against_ours(scenes, found, variants, config),
    ]
    leave(page(scenes.words, variants, "\n".join(tables), "methods_ap"), options.out)


if __name__ == "__main__":
    main()
