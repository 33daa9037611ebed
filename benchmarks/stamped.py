"""What the measurements of pruning share: progress in lines, and the words that must stand beside a number."""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dm3d_deploy.artifacts import digest_of_file, read_manifest, write_bytes
from dm3d_deploy.build import source_digest
from dm3d_deploy.compare import RunComparison
from dm3d_deploy.device import stamp_here
from dm3d_deploy.stages import FILES, RunContext
from dm3d_deploy.steps.frame_work import frames_of


class Lines:
    """Says when a stage ends."""

    def started(self, stage: str, says: str) -> None:
        pass

    def advanced(self, done: int, total: int) -> None:
        pass

    def finished(self, stage: str, seconds: float, fresh: bool) -> None:
        if not fresh:
            print(f"{time.strftime('%H:%M:%S')}  {stage}", file=sys.stderr, flush=True)

    def noted(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def parser_of(doc: str, *, model: str = "centerpoint-slim", frames: int, work: str) -> argparse.ArgumentParser:
    """The options that every measurement has: model, checkpoint, held-out frames, the work folder, the page."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=model)
    parser.add_argument("--checkpoint")
    parser.add_argument("--frames", type=int, default=frames, help="held-out frames")
    parser.add_argument("--calibration-frames", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path(work), help="runs, to go on in after an interruption")
    parser.add_argument("--out", type=Path, help="a Markdown page in place of standard output")
    return parser


def floats(text: str) -> list[float]:
    """Numbers between commas."""
    return [float(word) for word in text.split(",")]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def command() -> str:
    """The command line of this process as one would type it."""
    return shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])


def stamped(run: RunContext, began: float) -> list[str]:
    """The words for a measurement on a run's held-out frames that began then (perf_counter, s)."""
    rows = json.loads(run.path("frames_info").read_text(encoding="utf-8"))["frames"]
    held_out = [rows[frame] for frame in frames_of(run, "held_out")]
    simulated, labels = all(row["path"] is None for row in held_out), [row["label"] for row in held_out]
    return _words(run.path("dense_weights"), labels, simulated, read_manifest(run.root).trained, began)


def stamped_comparison(found: RunComparison, began: float) -> list[str]:
    """The words for runs that were compared."""
    weights = Path(found.runs[0].run) / FILES["dense_weights"]
    return _words(weights, found.frames, found.simulated, found.trained, began)


def _words(weights: Path, frames: Sequence[str], simulated: bool, trained: bool, began: float) -> list[str]:
    stamp = stamp_here()
    load = "unknown" if stamp.load_average is None else f"{stamp.load_average[0]:.1f}"
    kind, minutes = "simulated " if simulated else "", (time.perf_counter() - began) / 60
    return [
        f"Measured: `{command()}`, {datetime.date.today().isoformat()}, {minutes:.0f} minutes on "
        f"{stamp.cores_usable} of {stamp.cores} cores of {stamp.cpu}, load {load} at the end.",
        f"{len(frames)} {kind}held-out frames ({frames[0]} to {frames[-1]}) that chose nothing. "
        f"{'Weights' if trained else 'UNTRAINED weights'} {digest_of_file(weights)[:12]}, code "
        f"{source_digest()[:12]}. Distortion 0 is the dense output.",
    ]


def leave(lines: Sequence[str], out: Path | None) -> None:
    """Write the page, or print it."""
    text = "\n".join(lines) + "\n"
    if out is None:
        print(text, end="")
    else:
        write_bytes(out, text.encode())
