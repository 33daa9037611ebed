"""The command that times a model's layers, here or by estimate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dm3d_deploy.cli.root import FOREGROUND, Json, Quiet, app, counted, print_json


@app.command(rich_help_panel=FOREGROUND)
def profile(
    model: Annotated[str, typer.Option(help="A model's name, or an OpenPCDet YAML.")],
    device: Annotated[str, typer.Option(help="here (measured), or a device of `devices` (estimated).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file, for `build --profile`.")] = Path("profile.json"),
    frames: Annotated[str, typer.Option(help="A point cloud, a folder of them, or 'simulated'.")] = "simulated",
    voxels: Annotated[int | None, typer.Option(help="Estimate for this many.", show_default="the frames' mean")] = None,
    precision: Annotated[str, typer.Option(help="fp16 or fp32; estimates are fp16.")] = "fp16",
    repeats: Annotated[int, typer.Option(help="Runs of each layer, of which the median counts.")] = 5,
    seed: Annotated[int, typer.Option(help="Of simulated frames.")] = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write the time of every layer, dense and pruned: what `build --target 25ms` counts in."""
    from dm3d_deploy.profiling import profile as run

    with counted("profile", quiet=quiet or as_json) as advanced:
        found = run(
            model, device=device, out=out, frames=frames, voxels=voxels, precision=precision, repeats=repeats,
            seed=seed, advanced=advanced,
        )  # fmt: skip
    if as_json:
        by_part = {part: sum(row.dense_ms for row in found.layers if row.part == part) for part in found.band}
        print_json(
            {"out": str(out), "label": found.label, "voxels": found.voxels, "dense_ms": found.dense_ms,
             "layers_ms": by_part, "fixed_ms": dict(found.fixed_ms), "band": dict(found.band), "notes": found.notes}
        )  # fmt: skip
    elif not quiet:
        typer.echo(f"{out}: {found.dense_ms:.4g} ms dense at {found.voxels:,} voxels, {found.label}")
        for line in (*found.part_lines(), *found.notes):
            typer.echo(f"  {line}")
