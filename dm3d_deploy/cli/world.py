"""The commands of the simulated world: simulate, train, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dm3d_deploy.cli.root import WORLD, Json, Quiet, app, counted, print_json
from dm3d_deploy.errors import UsageError


@app.command(rich_help_panel=WORLD)
def simulate(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the data set, in KITTI's layout.")],
    sensor: Annotated[str, typer.Option(help="hdl64, nuscenes32 or once40.")] = "hdl64",
    frames: Annotated[int, typer.Option(help="How many.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the first frame.")] = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write simulated, labelled frames; the same command goes on with what was interrupted."""
    from dm3d_deploy.simulate import simulate as run

    with counted("simulate", quiet=quiet or as_json) as advanced:
        info = run(out, sensor=sensor, frames=frames, seed=seed, advanced=advanced)
    if as_json:
        print_json({"out": str(out), "sensor": info.sensor, "frames": info.frames, "seed": info.seed})


@app.command(rich_help_panel=WORLD)
def train(
    model: Annotated[str, typer.Option(help="A model's name, or a YAML.")],
    out: Annotated[Path, typer.Option(help="Folder of weights, state and log.")],
    minutes: Annotated[float, typer.Option(help="Minutes of work; pauses do not count.")],
    init: Annotated[Path | None, typer.Option(help="Weights to start from.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the training in --out stopped.")] = False,
    processes: Annotated[int, typer.Option(help="Processes of one thread each.")] = 2,
    seed: Annotated[int, typer.Option(help="Of scenes and starting weights.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Train on simulated scenes, on CPU cores; prints the losses as they come."""
    from dm3d_deploy.train import train as run

    def say(row: Any) -> None:
        losses = "".join(f"  {name} {value:8.4f}" for name, value in row.losses.items())
        typer.echo(f"step {row.step:6d}  {row.active_s / 60:6.1f} min{losses}")

    weights = run(
        model, out=out, minutes=minutes, init=init, resume=resume, processes=processes, seed=seed,
        report=None if quiet else say,
    )  # fmt: skip
    if not quiet:
        typer.echo(str(weights))


@app.command(rich_help_panel=WORLD)
def evaluate(
    subject: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="What to evaluate.")],
    data: Annotated[str, typer.Option(help="A labelled folder in KITTI's layout, or 'simulated'.")] = "simulated",
    metric: Annotated[str, typer.Option(help="nuscenes, kitti or once.")] = "nuscenes",
    frames: Annotated[int | None, typer.Option(help="How many [default: all of a folder, 100 simulated].")] = None,
    names: Annotated[str | None, typer.Option(help="Frames of a folder by name, comma-separated.")] = None,
    sensor: Annotated[
        str | None, typer.Option(help="Of simulated frames: hdl64, nuscenes32 or once40 [default: the model's own].")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first simulated frame [default: 1000000000].")] = None,
    model: Annotated[str | None, typer.Option(help="A checkpoint's configuration, where no known model fits.")] = None,
    variant: Annotated[str, typer.Option(help="Of a run: pruned or dense.")] = "pruned",
    out: Annotated[Path | None, typer.Option(help="Folder for JSON, text and precision-recall curves.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Average precision by class, range and difficulty, of a run's graphs or of a checkpoint."""
    from dm3d_deploy.evaluate import evaluate as run

    if names is not None and frames is not None:
        raise UsageError("--names and --frames were both given.", fix="give one of them")
    chosen = frames if names is None else tuple(name.strip() for name in names.split(","))
    with counted("evaluate", quiet=quiet or as_json) as advanced:
        found = run(
            subject, data=data, metric=metric, frames=chosen, sensor=sensor, seed=seed, model=model, variant=variant,
            out=out, advanced=advanced,
        )  # fmt: skip
    if as_json:
        print_json(found.as_json())
    elif not quiet:
        typer.echo(found.as_text())
