"""The commands that look things up, and the one that builds engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dm3d_deploy.cli.root import BACKGROUND, Json, Quiet, RunFolder, app, print_json, rerun


@app.command(rich_help_panel=BACKGROUND)
def engine(run: RunFolder, quiet: Quiet = False, as_json: Json = False) -> None:
    """Build the run's engines with the backends of this machine, and renew its report."""
    rerun(run, ("engine", "report"), {}, quiet=quiet, as_json=as_json)


@app.command(rich_help_panel=BACKGROUND)
def inspect(
    path: Annotated[Path, typer.Argument(metavar="RUN|ONNX|CHECKPOINT", help="What to look into.")],
    as_json: Json = False,
) -> None:
    """Say what a run, an ONNX file or a checkpoint holds."""
    from dm3d_deploy.inspection import describe_path, print_description

    found = describe_path(path)
    if as_json:
        print_json(found)
    else:
        print_description(found)


@app.command(rich_help_panel=BACKGROUND)
def models(as_json: Json = False) -> None:
    """List the models that `--model` knows by name."""
    from dm3d_deploy.inspection import print_rows
    from dm3d_deploy.model_table import model_rows

    rows = model_rows()
    if as_json:
        print_json({"models": rows})
    else:
        print_rows("models", rows)


@app.command(rich_help_panel=BACKGROUND)
def devices(as_json: Json = False) -> None:
    """List the target devices, and what can be built or run for each here."""
    from dm3d_deploy.doctor import device_rows
    from dm3d_deploy.inspection import print_rows

    rows = device_rows()
    if as_json:
        print_json({"devices": rows})
    else:
        print_rows("devices", rows)


@app.command(rich_help_panel=BACKGROUND)
def doctor(as_json: Json = False) -> None:
    """Say which versions are installed, what is missing, and what that disables."""
    from rich.console import Console

    from dm3d_deploy.doctor import diagnose, print_diagnosis

    found = diagnose()
    if as_json:
        print_json(found.as_json())
    else:
        print_diagnosis(found, Console())
