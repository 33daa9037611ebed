"""The commands of the 3D engine's launch plan."""

from __future__ import annotations

from typing import Annotated

import typer

from dm3d_deploy.cli.root import BACKGROUND, Json, RunFolder, app, print_json

WORD_LISTS = ("status", "features")
plan = typer.Typer(help="Look into the launch plan of a run's 3D backbone.", no_args_is_help=True)
app.add_typer(plan, name="plan", rich_help_panel=BACKGROUND)


@plan.callback()
def _plan() -> None:
    pass


@plan.command()
def inspect(
    run: RunFolder,
    points: Annotated[bool, typer.Option("--points", help="The plan that starts at points, not at voxels.")] = False,
    as_json: Json = False,
) -> None:
    """Say what the plan takes and skips: workspace, capacities, tiles per layer, buffers, steps, required features."""
    from dm3d_deploy.inspection import print_description
    from dm3d_deploy.plan_facts import describe_plan_of_run

    found = describe_plan_of_run(run, "points_plan" if points else "plan")
    if as_json:
        print_json(found)
        return
    print_description({**found, **{key: ", ".join(found[key]) for key in WORD_LISTS}})
