"""The training loop: batches in, weights out, resumable at any checkpoint."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dm3d_deploy.artifacts import disk_errors
from dm3d_deploy.config import AnchorHeadConfig, CenterHeadConfig, DetectorConfig
from dm3d_deploy.errors import Dm3dError, InternalError, UsageError
from dm3d_deploy.models.backbone3d import bev_from_sparse
from dm3d_deploy.models.detector import Detector
from dm3d_deploy.models.pillars import PFNLayer
from dm3d_deploy.models.sparse import SparseTensor
from dm3d_deploy.training.anchor_losses import anchor_losses
from dm3d_deploy.training.anchor_targets import AnchorTargets
from dm3d_deploy.training.batch import Batch, BatchSource
from dm3d_deploy.training.checkpoint import Progress, load_training, save_training
from dm3d_deploy.training.log import LogRow, Report, ScoreRow, StepValues, write_row
from dm3d_deploy.training.losses import center_losses
from dm3d_deploy.training.schedule import OneCycle
from dm3d_deploy.training.stop import Stop
from dm3d_deploy.training.team import Team

# Raw columns differ by three powers of ten, and Adam moves every weight alike: trained on columns of one size, the
# first convolution takes the factors into its weights when they are saved. Powers of two, so nothing is rounded.
COLUMN_SCALE = {"x": 1 / 8, "y": 1 / 8, "z": 1.0, "intensity": 1 / 64, "timestamp": 2.0}
# The head's own 0.1 would make full-frame statistics those of the last ten steps.
NORM_MOMENTUM = 0.01


# A step counts at most this long: a process that was stopped did not train.
LONGEST_STEP_S = 5.0
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)

# The parts of a batch's loss by name; their sum is minimised.
LossSource = Callable[[Batch], Mapping[str, Float[Tensor, ""]]]
# Average precision (percent) by class, and its mean, of a detector in eval mode; None where it was broken off.
Score = Callable[[Detector], Mapping[str, float | None] | None]


class TrainingDiverged(Dm3dError):
    """A loss or a gradient that is no number behind `step` steps, seen by every process of a training alike."""

    def __init__(self, what: str, *, fix: str, step: int) -> None:
        super().__init__(what, fix=fix)
        self.step = step


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How to train. Exactly one of `minutes` (of work, pauses not counted) and `steps` ends it.

    With `frozen_norms` batch norms keep their statistics and normalise with them, as the deployed detector will.
    """

    minutes: float | None = None
    steps: int | None = None
    cycle: OneCycle = field(default_factory=OneCycle)
    weight_decay: float = 0.01
    clip_norm: float = 20.0
    save_every_s: float = 180.0
    score_every_s: float = math.inf
    log_every: int = 50
    half_2d: bool = True
    frozen_norms: bool = False

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise UsageError("the length of a training is given once.", fix="give minutes or steps")
        if not (self.minutes or self.steps or 0) > 0:
            raise UsageError(f"a training of {self.minutes or self.steps} cannot be.", fix="give a positive length")
        if not self.score_every_s > 0:
            raise UsageError(f"a score every {self.score_every_s} s cannot be.", fix="give a positive time")

    def share_done(self, progress: Progress) -> float:
        """How much of the training is over, 0..1."""
        if self.steps is not None:
            return min(progress.step / self.steps, 1.0)
        return min(progress.active_s / (60 * (self.minutes or 1)), 1.0)


def raw_maps(detector: Detector, batch: Batch, *, half_2d: bool) -> dict[str, Float[Tensor, "batch channels h w"]]:
    """Raw head maps of a batch on its own grid: weights fit any range, so a crop needs no detector of its own.

    `half_2d` runs the dense part in bfloat16.
    """
    x = SparseTensor(batch.features, batch.coords, batch.shape_zyx, batch.size)
    to_bev = detector.vfe if detector.over_pillars else detector.backbone_3d
    bev = bev_from_sparse(to_bev(x)).contiguous(memory_format=torch.channels_last)
    with torch.autocast(bev.device.type, torch.bfloat16, enabled=half_2d):
        return detector.bev_to_heads(bev)


def _first_weight(detector: Detector) -> nn.Parameter:
    """The weights that meet the raw columns; the last dimension runs over them."""
    if detector.over_pillars:
        return cast(nn.Parameter, cast(PFNLayer, detector.vfe.pfn_layers[0]).linear.weight)
    _, first = next(detector.backbone_3d.convolutions())
    return first.weight


def column_scale(detector: Detector) -> Float[Tensor, " columns"]:
    """The factors that bring the detector's columns to one size."""
    scale = [COLUMN_SCALE[name] for name in detector.config.voxels.columns]
    pillars = detector.config.pillars
    if pillars is not None:  # offsets within a pillar are small; the distance is a length like x and y
        own = scale if pillars.absolute_xyz else scale[3:]
        scale = [*own, *[1.0] * 6, *[COLUMN_SCALE["x"]] * pillars.with_distance]
    return torch.tensor(scale, device=_first_weight(detector).device)


@contextlib.contextmanager
def columns_multiplied(detector: Detector, scale: Float[Tensor, " columns"]) -> Iterator[None]:
    """Within, the first convolution expects its columns times `scale`; behind, as before."""
    weight = _first_weight(detector)
    with torch.no_grad():
        weight.div_(scale)
    try:
        yield
    finally:
        with torch.no_grad():
            weight.mul_(scale)


def labelled_losses(detector: Detector, *, half_2d: bool) -> LossSource:
    """The losses of the detector's head against the targets of a batch."""
    head = detector.config.head

    def losses(batch: Batch) -> Mapping[str, Tensor]:
        maps = raw_maps(detector, batch, half_2d=half_2d)
        if isinstance(head, AnchorHeadConfig) and isinstance(batch.targets, AnchorTargets):
            found = anchor_losses(maps, batch.targets, head)
        elif isinstance(head, CenterHeadConfig) and not isinstance(batch.targets, AnchorTargets):
            branches = [[b.name for b in task if b.name != "hm"] for task in head.branches]
            found = center_losses(maps, batch.targets, branches)
        else:
            raise InternalError(f"a {type(head).__name__} cannot learn from {type(batch.targets).__name__}")
        return {"heat": found.heat, "box": found.box}

    return losses


def train_detector(
    detector: Detector,
    batches: BatchSource,
    settings: TrainSettings,
    *,
    out: Path,
    losses: LossSource | None = None,
    resume: bool = False,
    team: Team | None = None,
    after_step: Callable[[], None] | None = None,
    score: Score | None = None,
    report: Report | None = None,
    stop: Stop | None = None,
) -> Progress:
    """Train the detector in place, where it lies, and leave it in eval mode; `resume` goes on from the state in `out`.

    `losses` are minimised, by default those of labels; they see columns scaled by `column_scale`. `after_step` runs
    behind every update: pruned weights are put back to zero there. `score` rates the detector every
    `settings.score_every_s` seconds of work, and changes nothing. Where the `stop` of any process of the team was
    asked, all end behind the same step, and what is done is saved: `settings.share_done` of the progress tells.

    Raises TrainingDiverged when a loss is no number any more, UsageError as `check_trainable` does, and OutputError
    when a disk is full: the last checkpoint stays whole.
    """
    team = team or Team()
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    _prepare(detector, settings)
    optimiser = torch.optim.AdamW(detector.parameters(), lr=1e-4, weight_decay=settings.weight_decay, fused=True)
    progress = load_training(out, detector, optimiser) if resume else Progress()
    run = _Run(
        detector=detector, optimiser=optimiser, settings=settings, progress=progress, team=team, out=out,
        losses=losses or labelled_losses(detector, half_2d=settings.half_2d), scale=column_scale(detector),
        stop=stop or Stop(),
    )  # fmt: skip
    with columns_multiplied(detector, run.scale), run.stop.patient():
        while settings.share_done(progress) < 1 and not run.stopped:
            began = time.perf_counter()
            rate = run.update(batches(progress.step))
            if after_step is not None:
                after_step()
            progress.step += 1
            progress.step_s = time.perf_counter() - began
            run.do_what_is_due(rate, score, report)
        run.save()
    detector.eval()
    return progress


def check_trainable(config: DetectorConfig) -> None:
    """UsageError for a detector with a head or a stage that nothing here makes targets for."""
    if isinstance(config.head, CenterHeadConfig) and config.head.sparse:
        raise UsageError(
            f"{config.name} has a sparse head, and no targets are made here for its active cells.",
            fix="train it with OpenPCDet; build --recover reconstruct needs no training",
        )
    if config.second_stage is not None:
        raise UsageError(
            f"{config.name} has a second stage, and no targets are made here for its RoIs.",
            fix="train it with OpenPCDet; build --recover reconstruct needs no training",
        )


def _prepare(detector: Detector, settings: TrainSettings) -> None:
    check_trainable(detector.config)
    for part in (detector.backbone_2d, detector.dense_head):
        part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in detector.modules():
        if isinstance(module, NORMS):
            module.momentum = NORM_MOMENTUM
    _train_mode(detector, settings)


def _train_mode(detector: Detector, settings: TrainSettings) -> None:
    detector.train()
    for module in detector.modules():
        if isinstance(module, NORMS) and settings.frozen_norms:
            module.eval()


@dataclass(slots=True, kw_only=True)
class _Run:
    """What the steps of one training share; the detector expects its columns times `scale`."""

    detector: Detector
    optimiser: torch.optim.Optimizer
    settings: TrainSettings
    progress: Progress
    team: Team
    out: Path
    losses: LossSource
    scale: Float[Tensor, " columns"]
    stop: Stop
    stopped: bool = False  # whether one of the team was asked
    since_log: list[StepValues] = field(default_factory=list)

    def update(self, batch: Batch) -> float:
        """One step of the optimiser with the team's mean gradient; its learning rate."""
        rate, momentum = self.settings.cycle.at(self.settings.share_done(self.progress))
        for group in self.optimiser.param_groups:
            group["lr"], group["betas"] = rate, (momentum, 0.99)
        batch = batch.to(self.scale.device)
        losses = self.losses(replace(batch, features=batch.features * self.scale))
        parts = torch.stack(list(losses.values()))
        self.optimiser.zero_grad()
        parts.sum().backward()
        told = torch.cat([parts.detach(), parts.new_tensor([self.progress.step_s, self.stop.asked])])
        *means, step_s, asked = self.team.average_gradients(self.detector.parameters(), told).tolist()
        self.progress.active_s += min(step_s, LONGEST_STEP_S)
        self.stopped = asked > 0
        norm = float(nn.utils.clip_grad_norm_(self.detector.parameters(), self.settings.clip_norm))
        values = StepValues(losses=dict(zip(losses, means, strict=True)), gradient_norm=norm)
        if not all(math.isfinite(value) for value in (*means, norm)):
            raise _diverged(self.progress.step, values)
        self.optimiser.step()
        self.since_log.append(values)
        return rate

    def do_what_is_due(self, rate: float, score: Score | None, report: Report | None) -> None:
        """Log, score and save behind a step, each in its time."""
        progress, settings = self.progress, self.settings
        if progress.step % settings.log_every == 0 or settings.share_done(progress) == 1 or self.stopped:
            self.log(rate, report)
        if progress.active_s - progress.scored_s >= settings.score_every_s:
            progress.scored_s = progress.active_s
            if score is not None and self.team.leads and not self.stopped:
                self.score(score, report)
        if progress.active_s - progress.saved_s >= settings.save_every_s:
            self.save()

    def log(self, rate: float, report: Report | None) -> None:
        """Tell the means since the last time; the first process does."""
        if self.team.leads:
            write_row(self.out, LogRow.of(self.progress.step, self.progress.active_s, rate, self.since_log), report)
        self.since_log.clear()

    def score(self, score: Score, report: Report | None) -> None:
        """Rate the detector as it would be saved now; nothing that training depends on changes."""
        self.detector.eval()
        try:
            with columns_multiplied(self.detector, 1 / self.scale):
                ap_percent = score(self.detector)
        finally:
            _train_mode(self.detector, self.settings)
        if ap_percent is not None:
            row = ScoreRow(step=self.progress.step, active_s=self.progress.active_s, ap_percent=ap_percent)
            write_row(self.out, row, report)

    def save(self) -> None:
        """Write state and weights; the first process does, with everybody's batch-norm statistics."""
        self.team.average_buffers(self.detector)
        self.progress.saved_s = self.progress.active_s
        if self.team.leads:
            with columns_multiplied(self.detector, 1 / self.scale):
                save_training(self.out, self.detector, self.optimiser, self.progress)


def _diverged(step: int, values: StepValues) -> TrainingDiverged:
    losses = ", ".join(f"{name} loss {value:g}" for name, value in values.losses.items())
    return TrainingDiverged(
        f"the training diverged at step {step}: {losses}, gradient norm {values.gradient_norm:g}.",
        fix="start anew with a lower peak rate: resumed, it would diverge again",
        step=step,
    )
