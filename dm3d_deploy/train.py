"""Train a detector on simulated scenes, in one or more processes of one thread each."""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dm3d_deploy.artifacts import write_json
from dm3d_deploy.config import DetectorConfig, load_config
from dm3d_deploy.errors import Dm3dError, StaleArtifact, UsageError, require

if TYPE_CHECKING:
    from dm3d_deploy.training.checkpoint import Progress
    from dm3d_deploy.training.log import Report
    from dm3d_deploy.training.loop import TrainSettings

PROCESSES = 2
PLAN_NAME = "plan.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """Everything that decides a training but the machine: processes see other frames, so their number counts too."""

    model: str
    out: str
    minutes: float | None
    steps: int | None
    init: str | None
    resume: bool
    seed: int
    processes: int
    crops: int
    peak_rate: float


def train(
    model: str,
    *,
    out: Path | str,
    minutes: float | None = None,
    steps: int | None = None,
    init: Path | str | None = None,
    resume: bool = False,
    seed: int = 0,
    processes: int = PROCESSES,
    crops: int = 2,
    peak_rate: float = 2e-3,
    report: Report | None = None,
) -> Path:
    """Train `model` (a name or a YAML file) and return the path of its weights, `out`/weights.safetensors.

    Training ends after `minutes` of work, pauses not counted, or after `steps`. It starts from average boxes and
    random weights, from the weights of `init`, or with `resume` where the training in `out` stopped. Each of the
    processes takes `crops` crops a step. Raises UsageError for settings that exclude each other, CheckpointError for
    weights that do not fit, Dm3dError for a loss that is no number and for a full disk.
    """
    require("torch", extra="compile")
    if resume and init is not None:
        raise UsageError("init and resume exclude each other: a resumed training has weights.", fix="leave one out")
    if processes < 1:
        raise UsageError(f"{processes} processes train nothing.", fix="use 1 or more")
    plan = TrainPlan(
        model=str(model),
        out=str(out),
        minutes=minutes,
        steps=steps,
        init=None if init is None else str(init),
        resume=resume,
        seed=seed,
        processes=processes,
        crops=crops,
        peak_rate=peak_rate,
    )
    settings = _settings(plan)  # refuses before any process starts
    _keep_plan(plan)
    _run_team(plan, settings, report)
    return Path(out) / "weights.safetensors"


def _keep_plan(plan: TrainPlan) -> None:
    """Write the plan beside the weights; a resumed training must follow the plan that it began with."""
    path = Path(plan.out) / PLAN_NAME
    now = {name: value for name, value in asdict(plan).items() if name not in ("out", "init", "resume")}
    if not plan.resume:
        write_json(path, now)
        return
    if not path.is_file():
        raise UsageError(f"{plan.out} holds no training to resume.", fix="start one, without resume")
    try:
        began = json.loads(path.read_text(encoding="utf-8"))
        changed = [f"{name} was {began[name]} and is {now[name]}" for name in now if began[name] != now[name]]
    except (ValueError, LookupError, TypeError) as error:
        reason = f"{type(error).__name__} {error}"
        raise StaleArtifact(f"{path} is no plan of a training: {reason}.", fix="start again, from init") from None
    if changed:
        raise UsageError(
            f"the training in {plan.out} began with other settings: {'; '.join(changed)}.",
            fix="resume with the settings it began with, or start another from its weights with init",
        )


def _run_team(plan: TrainPlan, settings: TrainSettings, report: Report | None) -> None:
    """Train in this process and `processes` - 1 children, which end when it does."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder) / "meeting"
        context = multiprocessing.get_context("spawn")
        others = [
            context.Process(target=_follow, args=(plan, rank, meeting), daemon=True)
            for rank in range(1, plan.processes)
        ]
        for other in others:
            other.start()
        try:
            _work(plan, settings, 0, meeting, report)
            for other in others:
                other.join()
        finally:
            for other in others:
                other.kill()


def _settings(plan: TrainPlan) -> TrainSettings:
    from dm3d_deploy.training.loop import TrainSettings
    from dm3d_deploy.training.schedule import OneCycle

    return TrainSettings(minutes=plan.minutes, steps=plan.steps, cycle=OneCycle(peak_rate=plan.peak_rate))


def _follow(plan: TrainPlan, rank: int, meeting: Path) -> None:
    """What every process but the first does."""
    try:
        _work(plan, _settings(plan), rank, meeting, None)
    except Dm3dError as error:
        sys.stderr.write(f"training process {rank}: {error}\n")
        raise SystemExit(error.exit_code) from None


def _work(
    plan: TrainPlan, settings: TrainSettings, rank: int, meeting: Path, report: Report | None
) -> Progress:
    import torch

    from calib.simulator.objects import SIZES
    from calib.training_frames import SimulatedCrops
    from dm3d_deploy.models.checkpoints import load_checkpoint
    from dm3d_deploy.models.detector import build_detector
    from dm3d_deploy.training.loop import train_detector
    from dm3d_deploy.training.start import start_weights
    from dm3d_deploy.training.team import Team

    torch.set_num_threads(1)
    config: DetectorConfig = load_config(plan.model)
    detector = build_detector(config)
    if plan.init is not None:
        load_checkpoint(detector, plan.init)
    elif not plan.resume:
        sizes = {name: (length[0], width[0], height[0]) for name, (length, width, height) in SIZES.items()}
        start_weights(detector, sizes, seed=plan.seed)
    batches = SimulatedCrops(config, seed=plan.seed, rank=rank, crops=plan.crops)
    team = Team(rank, plan.processes, meeting)
    try:
        return train_detector(
            detector, batches, settings, out=Path(plan.out), resume=plan.resume, team=team, report=report
        )
    finally:
        team.leave()
