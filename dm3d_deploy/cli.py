"""The command line: a thin caller of the Python API. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dm3d_deploy import __version__
from dm3d_deploy.errors import Dm3dError, InternalError, OutputError, UsageError, VerificationFailed

if TYPE_CHECKING:
    from dm3d_deploy.recipe import Recipe

app = typer.Typer(
    name="dm3d-deploy",
    help="Prune a LiDAR 3D detector under a compute budget and leave a folder that can be deployed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
FOREGROUND = "The line"
WORLD = "The simulated world"
BACKGROUND = "Look things up"
INTERRUPTED = "interrupted: finished stages are kept, and the same command goes on from there\n"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder that `build` left.")]


def main() -> None:
    """Entry point: every Dm3dError is one sentence and a fix, and its class decides the exit code."""
    try:
        app()
    except Dm3dError as error:
        from dm3d_deploy.terminal import say_error

        say_error(error)
        sys.exit(error.exit_code)
    except InternalError as error:
        sys.stderr.write(f"internal error: {error} (a bug of ours: please report it with the command line)\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write(INTERRUPTED)
        sys.exit(130)
    except OSError as error:  # standard output: files of ours are told by name
        sys.stderr.write(f"error: standard output could not be written: {error.strerror}.\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered would fail again
        sys.exit(OutputError.exit_code)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dm3d-deploy {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(rich_help_panel=FOREGROUND)
def build(
    model: Annotated[str, typer.Option(help="A model's name, or an OpenPCDet YAML.")],
    target: Annotated[float, typer.Option(help="Share of the multiplications to keep, in (0, 1].")],
    checkpoint: Annotated[Path | None, typer.Option(help="OpenPCDet .pth, or .safetensors.")] = None,
    frames: Annotated[str, typer.Option(help="A point cloud, a folder of them, or 'simulated'.")] = "simulated",
    scope: Annotated[str, typer.Option(help="What the budget counts: backbone (3D + 2D) or model.")] = "backbone",
    patterns: Annotated[str, typer.Option(help="auto (what the hardware can use) or unstructured.")] = "auto",
    device: Annotated[str, typer.Option(help="Target devices by name, comma-separated; see `devices`.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp16 or fp32, of the BEV and head graph.")] = "fp16",
    out: Annotated[Path | None, typer.Option(help="The run's folder; by default runs/MODEL-TARGET.")] = None,
    calibration_frames: Annotated[int, typer.Option(help="Frames that rank and price the weights.")] = 8,
    seed: Annotated[int, typer.Option(help="Of simulated frames, sketches and untrained weights.")] = 0,
    first: Annotated[str | None, typer.Option("--from", metavar="STAGE", help="Redo from this stage on.")] = None,
    last: Annotated[str | None, typer.Option("--to", metavar="STAGE", help="Stop behind this stage.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and why.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Prune, export, build, verify, measure and report; finished stages are kept and skipped the next time."""
    from dm3d_deploy import build as builder
    from dm3d_deploy.recipe import Recipe

    recipe = Recipe(
        model=model, target=target, checkpoint=str(checkpoint) if checkpoint else None, frames=frames, scope=scope,
        patterns=patterns, device=device, precision=precision, calibration_frames=calibration_frames, seed=seed,
    )  # fmt: skip
    root = out if out is not None else builder.default_out(recipe)
    if dry_run:
        rows = builder.plan(recipe, root, first=first, last=last)
        _print_plan(root, rows, as_json)
        return
    _build(recipe, root, first, last, quiet=quiet, as_json=as_json)


def _print_plan(root: Path, rows: list[Any], as_json: bool) -> None:
    if as_json:
        stages = [{"stage": row.stage, "run": not row.fresh, "reason": row.reason} for row in rows]
        _print_json({"run": str(root), "stages": stages})
        return
    for row in rows:
        typer.echo(f"{'keep' if row.fresh else 'run ':4}  {row.stage:10}  {row.reason}")


def _build(recipe: Recipe, root: Path, first: str | None, last: str | None, *, quiet: bool, as_json: bool) -> None:
    from dm3d_deploy import build as builder

    def go(watch: Any) -> None:
        builder.build(recipe, root, first=first, last=last, watch=watch)

    try:
        _watched(go, quiet=quiet or as_json, headline=" ".join(["dm3d-deploy", *sys.argv[1:]]))
    except VerificationFailed:  # the report was written before, and says what failed
        _show_summary(root, last, quiet=quiet, as_json=as_json)
        raise
    _show_summary(root, last, quiet=quiet, as_json=as_json)


def _watched(go: Callable[[Any], None], *, quiet: bool, headline: str) -> None:
    try:
        if quiet:
            go(None)
            return
        from rich.console import Console

        from dm3d_deploy.terminal import TerminalWatch

        console = Console(stderr=True)
        console.print(headline, highlight=False, markup=False, style="bold", soft_wrap=True)
        with TerminalWatch(console) as watch:
            go(watch)
    except KeyboardInterrupt:
        sys.stderr.write(INTERRUPTED)  # here, because typer would say no more than a blank line
        raise typer.Exit(130) from None


def _show_summary(root: Path, last: str | None, *, quiet: bool, as_json: bool) -> None:
    from dm3d_deploy.stages import FILES, STAGE_NAMES

    if last not in (None, STAGE_NAMES[-1]):  # a report that lies there is an earlier build's
        if as_json:
            _print_json({"run": str(root), "report": None})
        return
    report = json.loads((root / FILES["report"]).read_text(encoding="utf-8"))
    if as_json:
        _print_json({"run": str(root), "report": report})
    elif not quiet:
        from rich.console import Console

        from dm3d_deploy.reporting.summary import summary_lines

        console = Console()
        console.print(summary_lines(report))
        console.print(f"report: {root / FILES['report_page']}", soft_wrap=True, highlight=False)


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
        run, frames, out=out, variant=variant, min_score=min_score, say=None if quiet or as_json else _say
    )
    if as_json:
        _print_json({"run": str(run), "variant": variant, "frames": rows})


def _say(text: str) -> None:
    typer.echo(text)


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
    _rerun(run, ("bench", "report"), {"bench_repeats": repeats}, quiet=quiet, as_json=as_json)


@app.command(rich_help_panel=FOREGROUND)
def report(run: RunFolder, quiet: Quiet = False, as_json: Json = False) -> None:
    """Render the run's report again."""
    _rerun(run, ("report",), {}, quiet=quiet, as_json=as_json)


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

    with _counted("simulate", quiet=quiet or as_json) as advanced:
        info = run(out, sensor=sensor, frames=frames, seed=seed, advanced=advanced)
    if as_json:
        _print_json({"out": str(out), "sensor": info.sensor, "frames": info.frames, "seed": info.seed})


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
        typer.echo(f"step {row.step:6d}  {row.active_s / 60:6.1f} min  heat {row.heat:8.4f}  box {row.box:8.4f}")

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
    model: Annotated[str | None, typer.Option(help="A checkpoint's configuration, where no known model fits.")] = None,
    variant: Annotated[str, typer.Option(help="Of a run: pruned or dense.")] = "pruned",
    out: Annotated[Path | None, typer.Option(help="Folder for JSON, text and precision-recall curves.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Average precision by class, range and difficulty, of a run's graphs or of a checkpoint."""
    from dm3d_deploy.evaluate import evaluate as run

    with _counted("evaluate", quiet=quiet or as_json) as advanced:
        found = run(
            subject, data=data, metric=metric, frames=frames, model=model, variant=variant, out=out, advanced=advanced
        )
    if as_json:
        _print_json(found.as_json())
    elif not quiet:
        typer.echo(found.as_text())


@contextlib.contextmanager
def _counted(says: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar for work that counts its pieces."""
    if quiet:
        yield None
        return
    from rich.console import Console

    from dm3d_deploy.terminal import TerminalWatch

    with TerminalWatch(Console(stderr=True)) as watch:
        watch.started(says, "")
        yield watch.advanced


@app.command(rich_help_panel=BACKGROUND)
def engine(run: RunFolder, quiet: Quiet = False, as_json: Json = False) -> None:
    """Build the run's engines with the backends of this machine, and renew its report."""
    _rerun(run, ("engine", "report"), {}, quiet=quiet, as_json=as_json)


def _rerun(run: Path, stages: tuple[str, ...], changes: dict[str, Any], *, quiet: bool, as_json: bool) -> None:
    from dm3d_deploy.build import rerun

    def go(watch: Any) -> None:
        rerun(run, stages, changes=changes, watch=watch)

    _watched(go, quiet=quiet or as_json, headline=" ".join(["dm3d-deploy", *sys.argv[1:]]))
    _show_summary(run, None, quiet=quiet, as_json=as_json)


@app.command(rich_help_panel=BACKGROUND)
def inspect(
    path: Annotated[Path, typer.Argument(metavar="RUN|ONNX|CHECKPOINT", help="What to look into.")],
    as_json: Json = False,
) -> None:
    """Say what a run, an ONNX file or a checkpoint holds."""
    from dm3d_deploy.inspection import describe_path, print_description

    found = describe_path(path)
    if as_json:
        _print_json(found)
    else:
        print_description(found)


@app.command(rich_help_panel=BACKGROUND)
def models(as_json: Json = False) -> None:
    """List the models that `--model` knows by name."""
    from dm3d_deploy.inspection import model_rows, print_rows

    rows = model_rows()
    if as_json:
        _print_json({"models": rows})
    else:
        print_rows("models", rows)


@app.command(rich_help_panel=BACKGROUND)
def devices(as_json: Json = False) -> None:
    """List the target devices, and what can be built or run for each here."""
    from dm3d_deploy.doctor import device_rows
    from dm3d_deploy.inspection import print_rows

    rows = device_rows()
    if as_json:
        _print_json({"devices": rows})
    else:
        print_rows("devices", rows)


@app.command(rich_help_panel=BACKGROUND)
def doctor(as_json: Json = False) -> None:
    """Say which versions are installed, what is missing, and what that disables."""
    from rich.console import Console

    from dm3d_deploy.doctor import diagnose, print_diagnosis

    found = diagnose()
    if as_json:
        _print_json(found.as_json())
    else:
        print_diagnosis(found, Console())


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
