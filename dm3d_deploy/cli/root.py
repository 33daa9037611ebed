"""What every command shares: the app, how errors end, progress, and what is printed."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from dm3d_deploy import __version__
from dm3d_deploy.errors import Dm3dError, InternalError, OutputError, VerificationFailed

app = typer.Typer(
    name="dm3d-deploy",
    help="Prune a LiDAR 3D detector under a compute budget and leave a folder that can be deployed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
FOREGROUND = "The line"
STUDY = "Methods and runs side by side"
WORLD = "The simulated world"
BACKGROUND = "Look things up"
INTERRUPTED = "interrupted: finished stages are kept, and the same command goes on from there\n"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, an error too, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder that `build` left.")]


def main() -> None:
    """Entry point: every Dm3dError is one sentence and a fix, and its class decides the exit code."""
    try:
        app()
    except Dm3dError as error:
        from dm3d_deploy.terminal import say_error

        say_error(error)
        if "--json" in sys.argv and not isinstance(error, VerificationFailed):  # its report was printed before
            print_json({"error": {"kind": type(error).__name__, "what": error.what, "fix": error.fix}})
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


def watched(go: Callable[[Any], None], *, quiet: bool, headline: str) -> None:
    """Run `go` with a watch that shows its stages in the terminal, or with None where nothing may be printed."""
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


def show_summary(root: Path, last: str | None, *, quiet: bool, as_json: bool) -> None:
    """Print what the report of a run says in short, or all of it as JSON."""
    from dm3d_deploy.stages import FILES, STAGE_NAMES

    if last not in (None, STAGE_NAMES[-1]):  # a report that lies there is an earlier build's
        if as_json:
            print_json({"run": str(root), "report": None})
        return
    report = json.loads((root / FILES["report"]).read_text(encoding="utf-8"))
    if as_json:
        print_json({"run": str(root), "report": report})
    elif not quiet:
        from rich.console import Console

        from dm3d_deploy.reporting.summary import summary_lines

        console = Console()
        console.print(summary_lines(report))
        console.print(f"report: {root / FILES['report_page']}", soft_wrap=True, highlight=False)


def say(text: str) -> None:
    """Print one line."""
    typer.echo(text)


@contextlib.contextmanager
def counted(says: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar for work that counts its pieces."""
    if quiet:
        yield None
        return
    from rich.console import Console

    from dm3d_deploy.terminal import TerminalWatch

    with TerminalWatch(Console(stderr=True)) as watch:
        watch.started(says, "")
        yield watch.advanced


def rerun(run: Path, stages: tuple[str, ...], changes: dict[str, Any], *, quiet: bool, as_json: bool) -> None:
    """Run stages of a finished run again and print its summary."""
    from dm3d_deploy import build as builder

    def go(watch: Any) -> None:
        builder.rerun(run, stages, changes=changes, watch=watch)

    watched(go, quiet=quiet or as_json, headline=" ".join(["dm3d-deploy", *sys.argv[1:]]))
    show_summary(run, None, quiet=quiet, as_json=as_json)


def print_json(value: Any) -> None:
    """Print one JSON document."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
