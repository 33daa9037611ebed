"""How well second-order curves predict: each layer pruned alone, its predicted distortion against a true forward.

`python -m benchmarks.curve_fidelity --model centerpoint-slim --out docs/measurements/curve-fidelity.md` (the paper's
Table 5). An interrupted measurement goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from benchmarks.stamped import Lines, floats, leave, markdown, parser_of, stamped
from calib.pool import FramePool
from dm3d_deploy.artifacts import digest_of_file, write_json, write_tensors
from dm3d_deploy.build import build
from dm3d_deploy.pruning.masks import masked_state
from dm3d_deploy.pruning.patterns import prune_step
from dm3d_deploy.recipe import Recipe
from dm3d_deploy.stages import RunContext
from dm3d_deploy.steps.frame_work import distortions, frames_of, outputs_of
from dm3d_deploy.steps.layers import read_curves, read_layers

Pairs = dict[str, tuple[float, float]]  # layer -> predicted and true distortion


def measured(run: RunContext, ratio: float, path: Path) -> dict[str, float]:
    """Mean true distortion of the held-out frames by layer, each pruned at `ratio` alone; what `path` holds is kept."""
    key = digest_of_file(run.path("scores")) + digest_of_file(run.path("frames"))
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"key": None}
    found: dict[str, float] = kept["true"] if kept["key"] == key else {}
    frames, layers = frames_of(run, "held_out"), {layer.name: layer for layer in read_layers(run.path("layers"))}
    dense = outputs_of(run, run.path("dense_weights"), frames, lambda _: None)
    state, trial = load_file(run.path("dense_weights")), run.root / "work" / ".fidelity.safetensors"
    with safe_open(run.path("scores"), framework="np") as scores:
        for name in scores.keys():  # noqa: SIM118 - a file, not a mapping
            if name in found:
                continue
            keep = prune_step(layers[name], scores.get_tensor(name), "unstructured", (ratio,)) > 0
            write_tensors(trial, masked_state(state, {name: keep}))
            each = distortions(run, dense, outputs_of(run, trial, frames, lambda _: None))
            found[name] = math.fsum(each) / len(each)
            print(f"{time.strftime('%H:%M:%S')}  {ratio:g}  {name}  {found[name]:.4g}", file=sys.stderr, flush=True)
            trial.unlink()
            write_json(path, {"key": key, "true": found})
    return found


def predicted(run: RunContext, ratio: float) -> dict[str, float]:
    """What the curves say of each layer at a ratio of their grid."""
    return {
        curve.layer: float(np.interp(ratio, curve.ratio, curve.distortion))
        for curve in read_curves(run.path("curves"))
        if curve.pattern == "unstructured"
    }


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's rho of predictions and truths, which hold no ties."""
    ranks = np.argsort(np.argsort(np.array(pairs), axis=0), axis=0).astype(np.float64)
    return float(np.corrcoef(ranks.T)[0, 1])


def summary(found: Mapping[float, Pairs]) -> list[str]:
    """A row a ratio: how the truth ranks the layers, and by what factor it differs from the prediction."""
    rows = []
    for ratio, pairs in found.items():
        factors = np.array([true / guess for guess, true in pairs.values() if guess > 0])
        low, middle, high = np.percentile(factors, (10, 50, 90))
        total = math.fsum(true for _, true in pairs.values()) / math.fsum(guess for guess, _ in pairs.values())
        rho = rank_correlation(list(pairs.values()))
        rows.append([f"{ratio:g}", str(len(pairs)), f"{rho:.3f}", f"{middle:.2f} ({low:.2f} to {high:.2f})",
                     f"{total:.2f}"])  # fmt: skip
    head = ["ratio", "layers", "Spearman", "true over predicted: median (10 % to 90 %)", "of the sums"]
    return markdown(head, rows)


def by_layer(found: Mapping[float, Pairs]) -> list[str]:
    """A row a layer: predicted and true at each ratio."""
    names = dict.fromkeys(name for pairs in found.values() for name in pairs)
    rows = [[name, *(_pair(pairs[name]) for pairs in found.values())] for name in names]
    return markdown(["layer", *(f"{ratio:g}" for ratio in found)], rows)


def _pair(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.2e} → {pair[1]:.2e}"


def main() -> None:
    parser = parser_of(__doc__, frames=4, work="runs/curve-fidelity")
    parser.add_argument("--ratios", default="0.3,0.5,0.7,0.9", help="of a layer's weights that go")
    given = parser.parse_args()
    began = time.perf_counter()
    recipe = Recipe(
        model=given.model, checkpoint=given.checkpoint, target=0.5, patterns="unstructured",
        held_out_frames=given.frames, calibration_frames=given.calibration_frames,
    )  # fmt: skip
    build(recipe, given.work, last="curves", watch=Lines())
    found: dict[float, Pairs] = {}
    with FramePool() as pool:
        run = RunContext(root=given.work, recipe=recipe, watch=Lines(), pool=pool)
        for ratio in floats(given.ratios):
            true = measured(run, ratio, given.work / f"fidelity-{ratio:g}.json")
            guess = predicted(run, ratio)
            found[ratio] = {name: (guess[name], true[name]) for name in true}
        page = stamped(run, began)
    lines = [
        f"# {Path(given.model).stem}: second-order curves against true forwards", "",
        *page,
        f"Each layer pruned alone, unstructured, no recovery; curves from {given.calibration_frames} calibration "
        "frames, 2 sketches each.", "", *summary(found), "", "Predicted → true:", "", *by_layer(found),
    ]  # fmt: skip
    leave(lines, given.out)


if __name__ == "__main__":
    main()
