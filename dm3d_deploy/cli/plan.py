"""The commands of the 3D engine's launch plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dm3d_deploy.cli.root import BACKGROUND, Json, app, print_json
from dm3d_deploy.errors import UsageError

plan = typer.Typer(help="Look into the launch plan of a run's 3D backbone.", no_args_is_help=True)
app.add_typer(plan, name="plan", rich_help_panel=BACKGROUND)


@plan.callback()
def _plan() -> None:
    pass


@plan.command()
def inspect(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder that `build` left, or a plan file.")],
    points: Annotated[bool, typer.Option("--points", help="The plan that starts at points, not at voxels.")] = False,
    as_json: Json = False,
) -> None:
    """Say what the plan takes and skips: workspace, capacities, tiles per layer, buffers, steps, required features."""
    from dm3d_deploy.inspection import print_description
    from dm3d_deploy.plan_facts import describe_plan_file, describe_plan_of_run

    if run.is_file() and points:
        raise UsageError(
            f"{run} is one plan; --points chooses of a run's.", fix="give the run's folder, or no --points"
        )
    found = describe_plan_file(run) if run.is_file() else describe_plan_of_run(run, "points_plan" if points else "plan")
    if as_json:
        print_json(found)
        return
    print_description({**found, "features": ", ".join(found["features"])})
