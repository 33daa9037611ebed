"""The commands of the line: build, detect, bench, report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dm3d_deploy.cli.root import (
    FOREGROUND,
    Json,
    Quiet,
    RunFolder,
    app,
    print_json,
    rerun,
    say,
    show_summary,
    watched,
)
from dm3d_deploy.errors import UsageError, VerificationFailed

if TYPE_CHECKING:
    from dm3d_deploy.recipe import Recipe


Cost = Annotated[
    str | None, typer.Option(help="macs, executed or latency.", show_default="latency for a time, else macs")
]
Profile = Annotated[str | None, typer.Option(help="Of --cost latency: a profile.json, or a device to estimate for.")]
VoxelKeep = Annotated[
    float,
    typer.Option(help="Share of voxels that the blocks of --voxel-stages run on; ONNX Runtime only, no 3D plan."),
]
RecoverData = Annotated[
    str, typer.Option(help="Of distill and finetune: a folder, labelled for finetune, or 'simulated'.")
]

Margin = Annotated[
    float, typer.Option(help="Room of the 3D plan: times the rows of the fullest calibration frame, per stage.")
]
Capacities = Annotated[
    str | None, typer.Option(metavar="STAGE=ROWS,...", help="Or the rows themselves; `points` of points.")
]


@app.command(rich_help_panel=FOREGROUND)
def build(
    model: Annotated[str, typer.Option(help="A model's name, or an OpenPCDet YAML.")],
    target: Annotated[str | None, typer.Option(help="Share of the cost to keep, in (0, 1], or a time: 25ms.")] = None,
    max_distortion: Annotated[float | None, typer.Option(help="Or: the cheapest within this distortion.")] = None,
    cost: Cost = None,
    profile: Profile = None,
    method: Annotated[str, typer.Option(help="dm3d, or a baseline: uniform, erk, lamp, taylor, paper-eq13.")] = "dm3d",
    recover: Annotated[str, typer.Option(help="none, bn, reconstruct, distill or finetune.")] = "reconstruct",
    recover_steps: Annotated[int, typer.Option(help="Of distill and finetune: training steps.")] = 500,
    recover_data: RecoverData = "simulated",
    rounds: Annotated[int, typer.Option(help="Prune gradually: rank, price and recover anew in each round.")] = 1,
    checkpoint: Annotated[Path | None, typer.Option(help="OpenPCDet .pth, or .safetensors.")] = None,
    frames: Annotated[str, typer.Option(help="A point cloud, a folder of them, or 'simulated'.")] = "simulated",
    scope: Annotated[str, typer.Option(help="What the budget counts: backbone, backbone3d or model.")] = "backbone",
    patterns: Annotated[str, typer.Option(help="auto (what the hardware can use), unstructured or channels.")] = "auto",
    voxel_keep: VoxelKeep = 1.0,
    voxel_stages: Annotated[str, typer.Option(help="Of --voxel-keep: stages of the sparse backbone.")] = "2,3",
    device: Annotated[str, typer.Option(help="Target devices by name, comma-separated; see `devices`.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp16 or fp32, of the BEV and head graph.")] = "fp16",
    capacity_margin: Margin = 1.25,
    capacities: Capacities = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; by default runs/MODEL-TARGET.")] = None,
    calibration_frames: Annotated[int, typer.Option(help="Frames that rank and price the weights.")] = 8,
    score_frames: Annotated[int, typer.Option(help="Simulated scenes that AP is counted on; 0 for none.")] = 12,
    seed: Annotated[int, typer.Option(help="Of simulated frames, sketches and untrained weights.")] = 0,
    first: Annotated[str | None, typer.Option("--from", metavar="STAGE", help="Redo from this stage on.")] = None,
    last: Annotated[str | None, typer.Option("--to", metavar="STAGE", help="Stop behind this stage.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and why.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Prune, export, build, verify, measure and report; finished stages are kept and skipped the next time."""
    from dm3d_deploy import build as builder
    from dm3d_deploy.recipe import Recipe, goal_from_text

    goal: dict[str, Any] = {} if target is None else goal_from_text(target)
    recipe = Recipe(
        model=model, **goal, max_distortion=max_distortion, profile=profile, method=method, recover=recover,
        sketches=0 if method == "paper-eq13" else 2, recover_steps=recover_steps, recover_data=recover_data,
        cost=cost or ("latency" if "target_ms" in goal else "macs"),
        checkpoint=str(checkpoint) if checkpoint else None, frames=frames, scope=scope, capacities=capacities or "",
        voxel_keep=voxel_keep, voxel_stages=voxel_stages, patterns=patterns, device=device, precision=precision,
        calibration_frames=calibration_frames, score_frames=score_frames, seed=seed, capacity_margin=capacity_margin,
    )  # fmt: skip
    root = out if out is not None else builder.default_out(recipe)
    if dry_run:
        _print_plan(root, builder.plan(recipe, root, first=first, last=last), as_json)
        return
    _build(recipe, root, (first, last), rounds, quiet=quiet, as_json=as_json)


def _print_plan(root: Path, rows: list[Any], as_json: bool) -> None:
    if as_json:
        stages = [{"stage": row.stage, "run": not row.fresh, "reason": row.reason} for row in rows]
        print_json({"run": str(root), "stages": stages})
        return
    for row in rows:
        typer.echo(f"{'keep' if row.fresh else 'run ':4}  {row.stage:10}  {row.reason}")


def _build(
    recipe: Recipe, root: Path, window: tuple[str | None, str | None], rounds: int, *, quiet: bool, as_json: bool
) -> None:
    from dm3d_deploy import build as builder
    from dm3d_deploy.rounds import earlier_rounds

    first, last = window

    def go(watch: Any) -> None:
        builder.build(earlier_rounds(recipe, root, rounds, watch=watch), root, first=first, last=last, watch=watch)

    try:
        watched(go, quiet=quiet or as_json, headline=" ".join(["dm3d-deploy", *sys.argv[1:]]))
    except VerificationFailed:  # the report was written before, and says what failed
        show_summary(root, last, quiet=quiet, as_json=as_json)
        raise
    show_summary(root, last, quiet=quiet, as_json=as_json)


@app.command(rich_help_panel=FOREGROUND)
def detect(
    run: RunFolder,
    frames: Annotated[list[Path], typer.Argument(metavar="FRAME...", help="Point clouds, or folders of them.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("detections"),
    variant: Annotated[str, typer.Option(help="pruned or dense.")] = "pruned",
    min_score: Annotated[float, typer.Option(help="Leave out weaker detections.")] = 0.0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Detect in point clouds with the built graphs: JSON, a KITTI-style text and a bird's-eye view for each."""
    from dm3d_deploy.detect_files import detect_files

    rows = detect_files(
        run, frames, out=out, variant=variant, min_score=min_score, say=None if quiet or as_json else say
    )
    if as_json:
        print_json({"run": str(run), "variant": variant, "frames": rows})


@app.command(rich_help_panel=FOREGROUND)
def bench(
    run: RunFolder,
    repeats: Annotated[int, typer.Option(help="Samples per stage and variant.")] = 200,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure every stage of the run on this machine, dense and pruned in turn, and renew its report."""
    if repeats < 1:
        raise UsageError(f"--repeats is {repeats}.", fix="give at least 1")
    rerun(run, ("bench", "report"), {"bench_repeats": repeats}, quiet=quiet, as_json=as_json)


@app.command(rich_help_panel=FOREGROUND)
def report(run: RunFolder, quiet: Quiet = False, as_json: Json = False) -> None:
    """Render the run's report again."""
    rerun(run, ("report",), {}, quiet=quiet, as_json=as_json)
