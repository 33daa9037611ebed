"""The commands of the simulated world: simulate, train, evaluate."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator
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
    elif not quiet:
        last, folder = seed + info.frames - 1, shlex.quote(str(out))
        what = f"frame of {sensor}, seed {seed}" if last == seed else f"frames of {sensor}, seeds {seed} to {last}"
        typer.echo(
            f"{out}: {info.frames} labelled {what}; next: dm3d-deploy evaluate RUN --data {folder}, "
            f"or train --data {folder} --epochs 10"
        )


@app.command(rich_help_panel=WORLD)
def train(
    model: Annotated[str, typer.Option(help="A model's name, or a YAML.")],
    out: Annotated[Path, typer.Option(help="Folder of weights, state and log.")],
    data: Annotated[
        str,
        typer.Option(help="'simulated', a labelled folder in KITTI's layout; with --teacher any folder of frames."),
    ] = "simulated",
    minutes: Annotated[float | None, typer.Option(help="Minutes of work; pauses do not count.")] = None,
    epochs: Annotated[int | None, typer.Option(help="How often each frame of a folder is shown.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the optimiser.")] = None,
    init: Annotated[Path | None, typer.Option(help="Weights to start from; a smaller model's grow.")] = None,
    masks: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Start from this run's pruned weights; their zeros stay.")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(metavar="CHECKPOINT", help="Learn what these weights answer; labels are not read.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the training in --out stopped.")] = False,
    processes: Annotated[int | None, typer.Option(help="One thread each.", show_default="one a GPU, 2 without")] = None,
    seed: Annotated[int, typer.Option(help="Of scenes, crops and starting weights.")] = 0,
    peak_rate: Annotated[
        float | None, typer.Option(help="Highest learning rate.", show_default="0.002, with --masks 0.0002")
    ] = None,
    score_every: Annotated[
        float, typer.Option(help="Minutes of work between scores on frames not trained on; 0: none.")
    ] = 10.0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train, fine-tune or distil; prints losses and AP as they come, and leaves safetensors."""
    from dm3d_deploy.train import train as run

    rows: list[dict[str, Any]] = []
    with _interruptions_said():
        weights = run(
            model, out=out, data=data, minutes=minutes, epochs=epochs, steps=steps, init=init, masks=masks,
            teacher=teacher, resume=resume, processes=processes, seed=seed, peak_rate=peak_rate,
            score_every=score_every, report=_teller(rows, quiet or as_json),
            note=None if quiet or as_json else typer.echo,
        )  # fmt: skip
    if as_json and _speaks():
        last = {("score" if "ap_percent" in row else "losses"): row for row in rows}
        print_json({"weights": str(weights), "losses": None, "score": None, **last})
    elif _speaks() and not quiet:
        typer.echo(str(weights))


@contextlib.contextmanager
def _interruptions_said() -> Iterator[None]:
    from dm3d_deploy.training.stop import TrainingInterrupted

    try:
        yield
    except TrainingInterrupted as ended:
        if _speaks():
            sys.stderr.write(f"{ended}\n")
        raise typer.Exit(ended.exit_code) from None


def _speaks() -> bool:
    """Whether this is the first of the processes that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _teller(rows: list[dict[str, Any]], silent: bool) -> Callable[[Any], None]:
    def tell(row: Any) -> None:
        rows.append(row.as_json())
        if not silent:
            typer.echo(_training_line(rows[-1]))

    return tell


def _training_line(row: dict[str, Any]) -> str:
    head = f"step {row['step']:6d}  {row['active_s'] / 60:6.1f} min"
    if "ap_percent" in row:
        known = {name: value for name, value in row["ap_percent"].items() if value is not None}
        return f"{head}  AP " + ", ".join(f"{name} {value:.1f}" for name, value in known.items())
    told = ("step", "active_s", "gradient_norm", "rate")
    return head + "".join(f"  {name} {value:8.4f}" for name, value in row.items() if name not in told)


@app.command(rich_help_panel=WORLD)
def evaluate(
    subject: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="What to evaluate.")],
    data: Annotated[str, typer.Option(help="A labelled folder in KITTI's layout, or 'simulated'.")] = "simulated",
    metric: Annotated[str, typer.Option(help="nuscenes, kitti or once.")] = "nuscenes",
    frames: Annotated[int | None, typer.Option(help="How many.", show_default="all of a folder, 100 simulated")] = None,
    names: Annotated[str | None, typer.Option(help="Frames of a folder by name, comma-separated.")] = None,
    sensor: Annotated[
        str | None,
        typer.Option(help="Of simulated frames: hdl64, nuscenes32 or once40.", show_default="the model's own"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first simulated frame.", show_default="1000000000")] = None,
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
