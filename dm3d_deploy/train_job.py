"""What one process of a training needs: the detector, what it learns from, and what it learns."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from calib.folder_crops import FolderCrops
from calib.simulator.objects import SIZES
from calib.training_folder import WITHOUT_LABELS, TrainingFolder, open_labelled, open_unlabelled
from calib.training_frames import SimulatedCrops
from dm3d_deploy.artifacts import read_manifest
from dm3d_deploy.config import DetectorConfig, load_config
from dm3d_deploy.errors import UsageError
from dm3d_deploy.live_score import LiveScore, simulated_live_frames, split_names
from dm3d_deploy.models.checkpoints import load_checkpoint, read_tensors
from dm3d_deploy.models.detector import Detector, build_detector
from dm3d_deploy.train_plan import SIMULATED, TrainPlan
from dm3d_deploy.training.batch import BatchSource
from dm3d_deploy.training.checkpoint import Progress
from dm3d_deploy.training.distill import distil, zeros_held
from dm3d_deploy.training.grow import grow_weights, is_smaller
from dm3d_deploy.training.log import Report
from dm3d_deploy.training.loop import TrainingDiverged, TrainSettings, check_trainable, train_detector
from dm3d_deploy.training.schedule import OneCycle
from dm3d_deploy.training.start import start_weights
from dm3d_deploy.training.stop import Stop
from dm3d_deploy.training.team import Team

Sizes = tuple[float, float, float]
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a process stands: its rank among `size`, its device, and whether torchrun started it."""

    rank: int
    size: int
    device: torch.device
    torchrun: bool


def place_of(processes: int | None) -> Place:
    """The place of this process: the first of `processes` (None: one a GPU, else 2), or what torchrun's variables say.

    Raises UsageError for no process, for more than there are GPUs, and for a number that is not torchrun's.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if all(name in os.environ for name in TORCHRUN):
        rank, size, local = (int(os.environ[name]) for name in TORCHRUN[:3])
        if processes not in (None, size):
            raise UsageError(f"torchrun started {size} processes, not {processes}.", fix="leave --processes out")
        return Place(rank=rank, size=size, device=_device(local, gpus), torchrun=True)
    size = (gpus or 2) if processes is None else processes
    if size < 1:
        raise UsageError(f"{size} processes train nothing.", fix="use --processes 1 or more")
    if gpus and size > gpus:
        raise UsageError(f"{size} processes cannot share {gpus} GPUs.", fix=f"use --processes {gpus}")
    return Place(rank=0, size=size, device=_device(0, gpus), torchrun=False)


def follower(rank: int, size: int) -> Place:
    """The place of a process that the first one started."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Place(rank=rank, size=size, device=_device(rank, gpus), torchrun=False)


def _device(local_rank: int, gpus: int) -> torch.device:
    return torch.device("cuda", local_rank) if gpus else torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """Everything that was read and checked before the first step; `notes` is what a user should know of it."""

    plan: TrainPlan
    detector: Detector
    batches: BatchSource
    settings: TrainSettings
    masks: Mapping[str, np.ndarray] | None
    teacher: Detector | None
    score: LiveScore | None
    notes: tuple[str, ...]
    stop: Stop

    def run(self, team: Team, report: Report | None) -> Progress:
        """Train to the end, to the first error, or until it is asked to stop."""
        try:
            return self._trained(team, report)
        except TrainingDiverged as error:
            fix = self.plan.after_divergence(error.step)
            raise TrainingDiverged(error.what, fix=fix, step=error.step) from None

    def _trained(self, team: Team, report: Report | None) -> Progress:
        out, resume = Path(self.plan.out), self.plan.resume
        if self.teacher is not None:
            return distil(
                self.detector, self.teacher, self.batches, self.settings, out=out, masks=self.masks, resume=resume,
                team=team, score=self.score, report=report, stop=self.stop,
            )  # fmt: skip
        return train_detector(
            self.detector, self.batches, self.settings, out=out, resume=resume, team=team, score=self.score,
            after_step=None if self.masks is None else zeros_held(self.detector, self.masks), report=report,
            stop=self.stop,
        )  # fmt: skip


def prepare(plan: TrainPlan, place: Place, stop: Stop) -> TrainJob:
    """Read what the plan names; raises what reading it raises, and UsageError for what cannot go together."""
    config = load_config(plan.model)
    check_trainable(config)
    source = (_simulated if plan.data == SIMULATED else _folder)(plan, config, place, stop)
    detector, masks, notes = build_detector(config), None, source.notes
    if plan.masks is not None:
        masks = _from_run(plan, detector)
    elif not plan.resume:
        notes += _start(plan, detector, _mean_sizes(config, source.sizes_m))
    teacher = None
    if plan.teacher is not None:
        teacher = build_detector(config)
        load_checkpoint(teacher, plan.teacher)
        teacher.to(place.device)
    detector.to(place.device)
    if masks is not None:
        zeros_held(detector, masks)  # refuses masks that misfit before any process starts
    steps = plan.steps if source.steps is None else source.steps
    settings = TrainSettings(
        minutes=plan.minutes,
        steps=steps,
        cycle=OneCycle(peak_rate=plan.peak_rate),
        score_every_s=math.inf if source.score is None else 60 * plan.score_every,
    )
    return TrainJob(
        plan=plan, detector=detector, batches=source.batches, settings=settings, masks=masks, teacher=teacher,
        score=source.score, notes=notes, stop=stop,
    )  # fmt: skip


def _start(plan: TrainPlan, detector: Detector, sizes_m: Mapping[str, Sizes]) -> tuple[str, ...]:
    """Fill the detector with what training begins from, and say so where it is not plain."""
    small = None if plan.init is None else read_tensors(plan.init)
    if plan.init is not None and not (small and is_smaller(detector, small)):
        load_checkpoint(detector, plan.init)
        return ()
    start_weights(detector, sizes_m, seed=plan.seed)
    if small is None:
        return ()
    grow_weights(detector, small)
    return (f"{plan.init} is of a smaller detector: its weights are in place, the channels beyond them are random",)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    batches: BatchSource
    steps: int | None  # of the epochs asked for
    score: LiveScore | None
    sizes_m: Mapping[str, Sizes]
    notes: tuple[str, ...]


def _simulated(plan: TrainPlan, config: DetectorConfig, place: Place, stop: Stop) -> _Source:
    if plan.epochs is not None:
        raise UsageError("simulated scenes never repeat, so they have no epochs.", fix="give --minutes or --steps")
    return _Source(
        batches=SimulatedCrops(config, seed=plan.seed, rank=place.rank, crops=plan.crops),
        steps=None,
        score=LiveScore(lambda: simulated_live_frames(config), stop) if plan.score_every else None,
        sizes_m={},
        notes=(),
    )


def _folder(plan: TrainPlan, config: DetectorConfig, place: Place, stop: Stop) -> _Source:
    labelled = plan.teacher is None
    folder = (
        open_labelled(plan.data, config, otherwise=f"{WITHOUT_LABELS}; a --teacher reads no labels")
        if labelled
        else open_unlabelled(plan.data, config)
    )
    names, score, notes = tuple(folder.paths), None, []
    if folder.left_out:
        counts = ", ".join(f"{count} {word}" for word, count in sorted(folder.left_out.items()))
        notes.append(f"background, for the model does not look for them: {counts}")
    if not labelled:
        notes.append("the frames teach by what the teacher answers; labels are not read, and nothing is scored")
    elif plan.score_every:
        names, held_back = split_names(names)
        score = _folder_score(folder, held_back, stop)
        if place.rank == 0:
            score.check(config)
        notes.append(f"not trained on but scored: the last {len(held_back)} of {len(folder.paths)} frames")
    batches = FolderCrops(folder, names, seed=plan.seed, rank=place.rank, processes=place.size, crops=plan.crops)
    steps = None if plan.epochs is None else batches.steps_of(plan.epochs)
    return _Source(batches=batches, steps=steps, score=score, sizes_m=folder.sizes_m, notes=tuple(notes))


def _folder_score(folder: TrainingFolder, names: tuple[str, ...], stop: Stop) -> LiveScore:
    frames = folder.folder
    return LiveScore(lambda: [] if frames is None else [frames.read(name) for name in names], stop)


def _from_run(plan: TrainPlan, detector: Detector) -> dict[str, np.ndarray]:
    """The masks of the run, its pruned weights in the detector."""
    root = Path(str(plan.masks))
    manifest = read_manifest(root)
    built = load_config(manifest.artifact("model_config").checked(root))
    if built.text != detector.config.text:
        raise UsageError(
            f"{root} was built from another model than {plan.model}.",
            fix=f"use --model {root / manifest.artifact('model_config').path}",
        )
    masks = load_file(manifest.artifact("masks").checked(root))
    load_checkpoint(detector, manifest.artifact("pruned_weights").checked(root))
    return masks


def _mean_sizes(config: DetectorConfig, found_m: Mapping[str, Sizes]) -> dict[str, Sizes]:
    """Where boxes start: the folder's mean length, width and height of a class, else the simulator's, else a car's."""
    usual: dict[str, Sizes] = {name: (x[0], y[0], z[0]) for name, (x, y, z) in SIZES.items()}
    return {name: found_m.get(name, usual.get(name.lower(), usual["car"])) for name in config.class_names}
