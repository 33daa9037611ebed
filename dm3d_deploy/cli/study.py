"""The commands that set methods and runs side by side: sweep, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dm3d_deploy.cli.root import STUDY, Json, Quiet, app, print_json, watched
from dm3d_deploy.errors import UsageError


@app.command(rich_help_panel=STUDY)
def sweep(
    model: Annotated[str, typer.Option(help="A model's name, or an OpenPCDet YAML.")],
    out: Annotated[Path, typer.Option(help="Folder of the runs and of their comparison.")],
    targets: Annotated[str, typer.Option(help="Shares of the multiplications to keep.")] = "0.7,0.5,0.3",
    methods: Annotated[str, typer.Option(help="dm3d, uniform, erk, lamp, taylor.")] = "dm3d,uniform,erk,lamp,taylor",
    recover: Annotated[str, typer.Option(help="none, bn, reconstruct, distill or finetune, for all.")] = "none",
    checkpoint: Annotated[Path | None, typer.Option(help="OpenPCDet .pth, or .safetensors.")] = None,
    frames: Annotated[str, typer.Option(help="A folder of point clouds, or 'simulated'.")] = "simulated",
    held_out_frames: Annotated[int, typer.Option(help="Frames that only report.")] = 16,
    seed: Annotated[int, typer.Option(help="Of simulated frames, sketches and untrained weights.")] = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Prune by several methods at several targets from the same frames, without exporting; then compare them."""
    from dm3d_deploy.compare import compare as compare_runs
    from dm3d_deploy.recipe import Recipe
    from dm3d_deploy.sweep import sweep as run

    shares = [_share(word) for word in targets.split(",")]
    recipe = Recipe(
        model=model, target=shares[0], patterns="unstructured", recover=recover, frames=frames, seed=seed,
        checkpoint=str(checkpoint) if checkpoint else None, held_out_frames=held_out_frames,
    )  # fmt: skip
    points: list[Path] = []

    def go(watch: Any) -> None:
        points.extend(run(recipe, targets=shares, methods=methods.split(","), out=out, watch=watch))

    watched(go, quiet=quiet or as_json, headline=f"dm3d-deploy sweep --model {model} --out {out}")
    _show(compare_runs(points, out=out), out, quiet=quiet, as_json=as_json)


@app.command(rich_help_panel=STUDY)
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that `build` or `sweep` left.")],
    out: Annotated[Path | None, typer.Option(help="Folder for JSON, text and the page.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Set runs side by side: MACs kept, held-out distortion, AP where RUN/ap holds an evaluation."""
    from dm3d_deploy.compare import compare as compare_runs

    _show(compare_runs(runs, out=out), out, quiet=quiet, as_json=as_json)


def _share(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise UsageError(f"--targets has '{word}', which is no number.", fix="for example --targets 0.7,0.5") from None


def _show(comparison: Any, out: Path | None, *, quiet: bool, as_json: bool) -> None:
    from dm3d_deploy.compare import PAGE_NAME

    if as_json:
        print_json(comparison.as_json())
    elif not quiet:
        typer.echo(comparison.as_text(), nl=False)
        if out is not None:
            typer.echo(f"page: {out / PAGE_NAME}")
