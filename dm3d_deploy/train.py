"""Train, fine-tune or distil a detector, in one or more processes."""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dm3d_deploy.errors import Dm3dError, UsageError, require
from dm3d_deploy.train_plan import MASKED_SHARE, PEAK_RATE, SIMULATED, TrainPlan

if TYPE_CHECKING:
    from dm3d_deploy.train_job import Place, TrainJob
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
    a full disk: the last checkpoint stays.
    """
    require("torch", extra="compile")
    from dm3d_deploy.train_job import place_of, prepare

    if not resume:
        _check_free(Path(out))
    place = place_of(processes)
    if peak_rate is None:
        peak_rate = PEAK_RATE * (1 if masks is None else MASKED_SHARE)
    plan = TrainPlan(
        model=str(model), out=str(out), data=str(data), minutes=minutes, steps=steps, epochs=epochs, init=_text(init),
        masks=_text(masks), teacher=_text(teacher), resume=resume, seed=seed, processes=place.size, crops=crops,
        peak_rate=peak_rate, score_every=score_every,
    )  # fmt: skip
    _run(prepare(plan, place), place, report, note)
    return Path(out) / "weights.safetensors"


def _check_free(out: Path) -> None:
    from dm3d_deploy.training.checkpoint import STATE_NAME

    if (out / STATE_NAME).exists():
        raise UsageError(f"{out} holds a training.", fix="go on with it (--resume), or give another --out")


def _run(job: TrainJob, place: Place, report: Report | None, note: Callable[[str], None] | None) -> None:
    if place.rank == 0:
        job.plan.keep(job.notes)
        for text in job.notes:
            (note or _silent)(text)
    if place.torchrun:
        _work(job, place.rank, None, report if place.rank == 0 else None)
    else:
        _run_team(job, report)


def _silent(text: str) -> None:
    """Tell nobody; the plan beside the weights keeps it."""


def _text(path: Path | str | None) -> str | None:
    return None if path is None else str(path)


def _run_team(job: TrainJob, report: Report | None) -> None:
    """Train in this process and `processes` - 1 children, which end when it does."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder) / "meeting"
        context = multiprocessing.get_context("spawn")
        others = [
            context.Process(target=_follow, args=(job.plan, rank, meeting), daemon=True)
            for rank in range(1, job.plan.processes)
        ]
        for other in others:
            other.start()
        try:
            _work(job, 0, meeting, report)
            for other in others:
                other.join()
        finally:
            for other in others:
                other.kill()


def _follow(plan: TrainPlan, rank: int, meeting: Path) -> None:
    """What every process but the first does."""
    from dm3d_deploy.train_job import follower, prepare
    from dm3d_deploy.training.loop import TrainingDiverged

    try:
        _work(prepare(plan, follower(rank, plan.processes)), rank, meeting, None)
    except TrainingDiverged as error:  # the first process says so, too
        raise SystemExit(error.exit_code) from None
    except Dm3dError as error:
        sys.stderr.write(f"training process {rank}: {error}\n")
        raise SystemExit(error.exit_code) from None


def _work(job: TrainJob, rank: int, meeting: Path | None, report: Report | None) -> None:
    import torch

    from dm3d_deploy.training.team import Team

    torch.set_num_threads(1)
    device = next(job.detector.parameters()).device
    team = Team(rank, job.plan.processes, meeting, device=device)
    try:
        job.run(team, report)
    finally:
        team.leave()
