"""Train, fine-tune or distil a detector, in one or more processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from dm3d_deploy.errors import Dm3dError, UsageError, require
from dm3d_deploy.train_plan import MASKED_SHARE, PEAK_RATE, SIMULATED, TrainPlan
from dm3d_deploy.training.log import STATE_NAME, WEIGHTS_NAME
from dm3d_deploy.training.stop import SIGNALS, Stop, TrainingInterrupted

if TYPE_CHECKING:
    from dm3d_deploy.train_job import Place, TrainJob
    from dm3d_deploy.training.checkpoint import Progress
    from dm3d_deploy.training.log import Report


def train(
    model: str,
    *,
    out: Path | str,
    data: Path | str = SIMULATED,
    minutes: float | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    init: Path | str | None = None,
    masks: Path | str | None = None,
    teacher: Path | str | None = None,
    resume: bool = False,
    seed: int = 0,
    processes: int | None = None,
    crops: int = 2,
    peak_rate: float | None = None,
    score_every: float = 10.0,
    report: Report | None = None,
    note: Callable[[str], None] | None = None,
) -> Path:
    """Train `model` (a name or a YAML file) and return the path of its weights, `out`/weights.safetensors.

    It learns from simulated scenes or a labelled folder in KITTI's layout; with a `teacher` (a checkpoint) from that
    one's answers, to the frames of any folder. Training ends after `minutes` of work, pauses not counted, after
    `steps`, or when every frame of the folder was shown `epochs` times. It starts from average boxes and random
    weights, from the weights of `init` (a smaller detector's grow: `training/grow.py`), from the pruned weights of the
    run `masks`, whose zeros stay, or with `resume` where the training in `out` stopped. Each process takes `crops`
    crops a step; there is one a GPU, or 2, or as many as torchrun started. The peak learning rate is 2e-3, with masks
    a tenth of it. Every `score_every` minutes (0: never) AP on frames that are not trained on is logged.

    Raises UsageError for settings that exclude each other or another training in `out`, what reading data, weights
    and runs raises, all before the first step; then TrainingDiverged for a loss that is no number and OutputError for
    a full disk: the last checkpoint stays. SIGINT and SIGTERM end it behind its step, saved: TrainingInterrupted.
    """
    stop = Stop()
    with stop.heard(), _explained(Path(out), stop):
        require("torch", extra="compile")
        from dm3d_deploy.train_job import place_of

        if not resume:
            _check_free(Path(out))
        place = place_of(processes)
        plan = TrainPlan(
            model=str(model), out=str(out), data=str(data), minutes=minutes, steps=steps, epochs=epochs,
            init=_text(init), masks=_text(masks), teacher=_text(teacher), resume=resume, seed=seed,
            processes=place.size, crops=crops, peak_rate=_peak_rate(peak_rate, masks), score_every=score_every,
        )  # fmt: skip
        _run(plan, place, stop, report, note)
    return Path(out) / WEIGHTS_NAME


@contextlib.contextmanager
def _explained(out: Path, stop: Stop) -> Iterator[None]:
    """Say what is kept of a training that was broken off at once: before its first step, or by a second SIGINT."""
    try:
        yield
    except TrainingInterrupted:
        raise
    except KeyboardInterrupt:
        if (out / STATE_NAME).exists():
            what = f"interrupted: the last checkpoint in {out} stays, and --resume goes on from it"
        else:
            what = "interrupted before anything was saved: the same command starts again"
        raise TrainingInterrupted(what, stop.number or signal.SIGINT) from None


def _check_free(out: Path) -> None:
    if (out / STATE_NAME).exists():
        raise UsageError(f"{out} holds a training.", fix="go on with it (--resume), or give another --out")


def _run(plan: TrainPlan, place: Place, stop: Stop, report: Report | None, note: Callable[[str], None] | None) -> None:
    from dm3d_deploy.train_job import prepare

    job = prepare(plan, place, stop)
    if place.rank == 0:
        job.plan.keep(job.notes)
        for text in job.notes:
            (note or _silent)(text)
    if place.torchrun:
        progress = _work(job, place.rank, None, report if place.rank == 0 else None)
    else:
        progress = _run_team(job, report)
    if job.settings.share_done(progress) < 1:
        raise TrainingInterrupted(
            f"interrupted: the training is saved at step {progress.step}, and the same command with --resume goes on "
            "from there",
            job.stop.number or signal.SIGTERM,
        )


def _peak_rate(given: float | None, masks: Path | str | None) -> float:
    return PEAK_RATE * (1 if masks is None else MASKED_SHARE) if given is None else given


def _silent(text: str) -> None:
    """Tell nobody; the plan beside the weights keeps it."""


def _text(path: Path | str | None) -> str | None:
    return None if path is None else str(path)


def _run_team(job: TrainJob, report: Report | None) -> Progress:
    """Train in this process and `processes` - 1 children, which end when it does."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder) / "meeting"
        context = multiprocessing.get_context("spawn")
        others = [
            context.Process(target=_follow, args=(job.plan, rank, meeting), daemon=True)
            for rank in range(1, job.plan.processes)
        ]
        try:
            _start(others)
            progress = _work(job, 0, meeting, report)
            for other in others:
                other.join()
        finally:
            for other in others:
                if other.pid is not None:
                    other.kill()
    return progress


def _start(others: Sequence[BaseProcess]) -> None:
    """Start the children deaf to both signals, which a terminal sends to all: this process hears, and tells them."""
    resource_tracker.ensure_running()  # started later, it would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        for other in others:
            other.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow(plan: TrainPlan, rank: int, meeting: Path) -> None:
    """What every process but the first does."""
    from dm3d_deploy.train_job import follower, prepare
    from dm3d_deploy.training.loop import TrainingDiverged

    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _work(prepare(plan, follower(rank, plan.processes), Stop()), rank, meeting, None)
    except TrainingDiverged as error:  # the first process says so, too
        raise SystemExit(error.exit_code) from None
    except Dm3dError as error:
        sys.stderr.write(f"training process {rank}: {error}\n")
        raise SystemExit(error.exit_code) from None


def _end_with_parent() -> None:
    """End this process, which hears no signal, when the first one was killed: it would wait for it for hours."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(job: TrainJob, rank: int, meeting: Path | None, report: Report | None) -> Progress:
    import torch

    from dm3d_deploy.training.team import Team

    torch.set_num_threads(1)
    device = next(job.detector.parameters()).device
    team = Team(rank, job.plan.processes, meeting, device=device)
    try:
        return job.run(team, report)
    finally:
        team.leave()
