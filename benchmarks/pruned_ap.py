"""AP dense and pruned at several budgets, by recovery: `python -m benchmarks.pruned_ap --model centerpoint-slim`.

One simulated set of scenes for all, seeds that nothing else uses; a markdown table on standard output or in --out.
A step of recovery that the build refuses leaves the weights as they were, and the notes say so.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.stamped import leave
from calib.held_out import FIRST_SCORE_SEED
from calib.pool import FramePool
from dm3d_deploy.artifacts import digest_of_file, write_json
from dm3d_deploy.build import build, source_digest, tool_versions
from dm3d_deploy.config import DetectorConfig, load_config
from dm3d_deploy.device import stamp_here
from dm3d_deploy.evaluation.rows import ALL, VULNERABLE
from dm3d_deploy.evaluation.variants import EVERY_MEAN, MEASURE, VULNERABLE_MEAN, VariantRow, variant_rows
from dm3d_deploy.held_out_score import Scenes, detect_scenes, simulate_scenes
from dm3d_deploy.pointcloud import Detections
from dm3d_deploy.recipe import RECOVERIES, recipe_from_mapping
from dm3d_deploy.reporting.facts import duration, significant

DENSE = "dense"
SHOWN = (VULNERABLE_MEAN, EVERY_MEAN, *(name for name in VULNERABLE if name != "cyclist"), "car")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One set of weights: its share of MACs kept, its recovery, and what each step of that did."""

    kept: str
    recovery: str
    steps: tuple[str, ...]
    weights: Path


def variants_of(root: Path, fields: Mapping[str, Any], targets: Sequence[float], kinds: Sequence[str]) -> list[Variant]:
    """Build up to the recovery once for each target and recovery, in one folder: what they share is done once.

    What an earlier call left there, of the same recipe and sources, is not done again.
    """
    run, dense, found = root / "run", root / "dense.safetensors", []
    for target in targets:
        for kind in kinds:
            recipe = {**fields, "target": target, "recover": kind}
            weights, told = (root / f"{target:g}-{kind}.{suffix}" for suffix in ("safetensors", "json"))
            key = {"recipe": recipe, "sources": source_digest()}
            if not told.is_file() or json.loads(told.read_text(encoding="utf-8"))["key"] != key:
                build(recipe_from_mapping(recipe), run, last="recover")
                shutil.copyfile(run / "weights" / "dense.safetensors", dense)
                shutil.copyfile(run / "weights" / "pruned.safetensors", weights)
                write_json(told, {"key": key, "steps": list(steps_of(run))})
            steps = tuple(json.loads(told.read_text(encoding="utf-8"))["steps"])
            found.append(Variant(kept=f"{target:g}", recovery=kind, steps=steps, weights=weights))
            say(f"built {target:g} {kind}")
    return [Variant(kept="1", recovery=DENSE, steps=(), weights=dense), *found]


def steps_of(run: Path) -> tuple[str, ...]:
    """What each step of the recovery did to the selection frames, and how long it took."""
    told, seconds = (
        json.loads((run / "work" / name).read_text(encoding="utf-8"))
        for name in ("recovery.json", "recovery_seconds.json")
    )
    return tuple(
        f"{step['method']} {'accepted' if step['accepted'] else 'refused'}, {step['measure']} "
        f"{significant(step['before'])} to {significant(step['after'])}, {duration(seconds[step['method']])}"
        for step in told["steps"]
    )


def detected(
    root: Path, config: DetectorConfig, variants: Sequence[Variant], frames: int, seed: int
) -> tuple[Scenes, dict[str, list[Detections]]]:
    """The scenes, and what each variant finds in them, by its place."""
    scenes = simulate_scenes(
        root / "scenes.safetensors", config, frames=frames, first_seed=seed, advanced=told("scene", frames)
    )
    found: dict[str, list[Detections]] = {}  # by digest: a refused recovery leaves the weights of the step before
    digests = [digest_of_file(variant.weights) for variant in variants]
    with FramePool() as pool:
        for digest, variant in zip(digests, variants, strict=True):
            found[digest] = found.get(digest) or detect_scenes(
                scenes, variant.weights, config, pool, folder=root / "found",
                advanced=told(f"{variant.kept} {variant.recovery}, scene", frames),
            )  # fmt: skip
    return scenes, {str(place): found[digest] for place, digest in enumerate(digests)}


def rows_of(scenes: Scenes, found: Mapping[str, list[Detections]], config: DetectorConfig) -> list[VariantRow]:
    """AP of every variant, and how far the others are from the first."""
    return list(variant_rows(found, scenes.labels, config.voxels.point_range_m, compared=tuple(found)[1:]))


def told(what: str, total: int) -> Callable[[int], None]:
    """Says every tenth piece."""
    return lambda done: say(f"{what} {done} of {total}") if done and done % 10 == 0 else None


def say(text: str) -> None:
    """Progress, away from the table."""
    print(text, file=sys.stderr, flush=True)


def table(variants: Sequence[Variant], rows: Sequence[VariantRow], column: str = "recovery") -> str:
    """AP in percent; in brackets the change from dense in points with its 95 % bootstrap interval over frames."""
    shown = [row for name in SHOWN for row in rows if row.name == name and row.subset == ALL and row.objects]
    lines = [f"| kept | {column} | " + " | ".join(f"{row.name} ({row.objects})" for row in shown) + " |"]
    lines.append("|" + "---|" * (len(shown) + 2))
    for place, variant in enumerate(variants):
        cells = [cell(row, str(place)) for row in shown]
        lines.append(f"| {variant.kept} | {variant.recovery} | " + " | ".join(cells) + " |")
    notes = [f"* kept {v.kept}, {v.recovery}: {'; '.join(v.steps)}" for v in variants if v.steps]
    return "\n".join([*lines, "", *notes])


def cell(row: VariantRow, variant: str) -> str:
    """One entry of the table."""
    value = row.ap_percent[variant]
    text = "-" if value is None else f"{value:.1f}"
    change = row.changes.get(variant)
    if change is None:
        return text
    interval = change.interval_points
    sure = "" if interval is None else f"; {interval[0]:+.1f} to {interval[1]:+.1f}"
    return f"{text} ({change.points:+.1f}{sure})"


def page(words: str, variants: Sequence[Variant], tables: str, module: str = "pruned_ap") -> list[str]:
    """The tables with what they were measured on, by which command, which code and which weights."""
    stamp = stamp_here().as_json()
    tools = ", ".join(f"{name} {version}" for name, version in tool_versions(("torch", "numpy")).items())
    return [
        f"`{shlex.join(['python', '-m', f'benchmarks.{module}', *sys.argv[1:]])}`",
        "",
        f"AP in percent ({MEASURE}) on {words}: simulated, no sensor recorded them. In brackets the change from",
        "dense in points and its 95 % interval, 1,000 resamples of whole frames, both detectors alike; beside a",
        "class its number of objects. The detector runs in torch in 32-bit floats.",
        "",
        tables,
        "",
        f"Dense weights {digest_of_file(variants[0].weights)[:12]}, code {source_digest()[:12]}, {tools}; "
        f"{stamp['cpu']}, {stamp['cores_usable']} of {stamp['cores']} cores.",
    ]


def fields_of(options: argparse.Namespace) -> dict[str, Any]:
    """The recipe's fields from the options; `--set` takes any other of them, its value as JSON or as text."""
    fields: dict[str, Any] = {"model": options.model, "checkpoint": options.checkpoint, "patterns": options.patterns}
    for pair in options.set:
        name, _, value = pair.partition("=")
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = value
    return fields


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="centerpoint-slim")
    parser.add_argument("--checkpoint")
    parser.add_argument("--targets", default="0.7,0.5,0.3")
    parser.add_argument("--recover", default=",".join(RECOVERIES), help="of `build --recover`, comma-separated")
    parser.add_argument("--patterns", default="auto")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="another recipe field")
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--seed", type=int, default=FIRST_SCORE_SEED)
    parser.add_argument("--work", type=Path, help="a folder to go on in after an interruption")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    targets = [float(target) for target in options.targets.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        root = options.work or Path(folder)
        variants = variants_of(root, fields_of(options), targets, options.recover.split(","))
        config = load_config(options.model)
        scenes, found = detected(root, config, variants, options.frames, options.seed)
        lines = page(scenes.words, variants, table(variants, rows_of(scenes, found, config)))
    leave(lines, options.out)


if __name__ == "__main__":
    main()
