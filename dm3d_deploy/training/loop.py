"""The training loop: batches in, weights out, resumable at any checkpoint."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dm3d_deploy.artifacts import disk_errors
from dm3d_deploy.errors import Dm3dError, UsageError
from dm3d_deploy.models.backbone3d import bev_from_sparse
from dm3d_deploy.models.detector import Detector
from dm3d_deploy.models.sparse import SparseTensor
from dm3d_deploy.training.batch import Batch, BatchSource
from dm3d_deploy.training.checkpoint import Progress, load_training, save_training
from dm3d_deploy.training.losses import center_losses
from dm3d_deploy.training.schedule import OneCycle
from dm3d_deploy.training.team import Team

# Raw columns differ by three powers of ten, and Adam moves every weight alike: trained on columns of one size, the
# first convolution takes the factors into its weights when they are saved. Powers of two, so nothing is rounded.
COLUMN_SCALE = {"x": 1 / 8, "y": 1 / 8, "z": 1.0, "intensity": 1 / 64, "timestamp": 2.0}
# The head's own 0.1 would make full-frame statistics those of the last ten steps.
NORM_MOMENTUM = 0.01


# A step counts at most this long: a process that was stopped did not train.
LONGEST_STEP_S = 5.0
LOG_NAME = "log.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRow:
    """Means over the steps since the row before."""

    step: int
    active_s: float
    heat: float
    box: float
    gradient_norm: float
    rate: float

    @classmethod
    def of(cls, progress: Progress, rate: float, values: list[tuple[float, float, float]]) -> LogRow:
        """The row of these steps."""
        heat, box, norm = (sum(column) / len(values) for column in zip(*values, strict=True))
        return cls(step=progress.step, active_s=progress.active_s, heat=heat, box=box, gradient_norm=norm, rate=rate)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How to train. Exactly one of `minutes` (of work, pauses not counted) and `steps` ends it."""

    minutes: float | None = None
    steps: int | None = None
    cycle: OneCycle = field(default_factory=OneCycle)
    weight_decay: float = 0.01
    clip_norm: float = 20.0
    save_every_s: float = 180.0
    log_every: int = 50
    half_2d: bool = True

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise UsageError("the length of a training is given once.", fix="give minutes or steps")
        if not (self.minutes or self.steps or 0) > 0:
            raise UsageError(f"a training of {self.minutes or self.steps} cannot be.", fix="give a positive length")

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
    bev = bev_from_sparse(detector.backbone_3d(x)).contiguous(memory_format=torch.channels_last)
    with torch.autocast(bev.device.type, torch.bfloat16, enabled=half_2d):
        return detector.bev_to_heads(bev)


def _first_weight(detector: Detector) -> nn.Parameter:
    """The weights that meet the raw columns; the last dimension runs over them."""
    _, first = next(detector.backbone_3d.convolutions())
    return first.weight


def column_scale(detector: Detector) -> Float[Tensor, " columns"]:
    """The factors that bring the detector's columns to one size."""
    scale = [COLUMN_SCALE[name] for name in detector.config.voxels.columns]
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


def train_detector(
    detector: Detector,
    batches: BatchSource,
    settings: TrainSettings,
    *,
    out: Path,
    resume: bool = False,
    team: Team | None = None,
    after_step: Callable[[], None] | None = None,
    report: Callable[[LogRow], None] | None = None,
) -> Progress:
    """Train the detector in place and leave it in eval mode; its state lies in `out`, from where `resume` goes on.

    `after_step` runs behind every update: pruned weights are put back to zero there. Raises Dm3dError when the loss is
    no number any more, or when a disk is full: the last checkpoint stays whole.
    """
    team = team or Team()
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    _prepare(detector)
    optimiser = torch.optim.AdamW(detector.parameters(), lr=1e-4, weight_decay=settings.weight_decay, fused=True)
    progress = load_training(out, detector, optimiser) if resume else Progress()
    scale = column_scale(detector)
    since_log: list[tuple[float, float, float]] = []
    with columns_multiplied(detector, scale):
        while settings.share_done(progress) < 1:
            began = time.perf_counter()
            rate = _set_rate(optimiser, settings, progress)
            batch = batches(progress.step)
            batch = replace(batch, features=batch.features * scale)
            since_log.append(_update(detector, optimiser, batch, settings, team, progress))
            if after_step is not None:
                after_step()
            progress.step += 1
            progress.step_s = time.perf_counter() - began
            if progress.step % settings.log_every == 0 and team.leads:
                _log(out, LogRow.of(progress, rate, since_log), report)
            if progress.step % settings.log_every == 0:
                since_log.clear()
            if progress.active_s - progress.saved_s >= settings.save_every_s:
                _save(detector, optimiser, progress, scale, out, team)
        _save(detector, optimiser, progress, scale, out, team)
    detector.eval()
    return progress


def _prepare(detector: Detector) -> None:
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = NORM_MOMENTUM
    for part in (detector.backbone_2d, detector.dense_head):
        part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    detector.train()


def _set_rate(optimiser: torch.optim.Optimizer, settings: TrainSettings, progress: Progress) -> float:
    rate, momentum = settings.cycle.at(settings.share_done(progress))
    for group in optimiser.param_groups:
        group["lr"], group["betas"] = rate, (momentum, 0.99)
    return rate


def _update(
    detector: Detector,
    optimiser: torch.optim.Optimizer,
    batch: Batch,
    settings: TrainSettings,
    team: Team,
    progress: Progress,
) -> tuple[float, float, float]:
    """One step of the optimiser; the team's mean losses and the norm of the mean gradient."""
    branches = [[b.name for b in task if b.name != "hm"] for task in detector.config.head.branches]
    losses = center_losses(raw_maps(detector, batch, half_2d=settings.half_2d), batch.targets, branches)
    optimiser.zero_grad()
    losses.total.backward()
    told = torch.stack([losses.heat.detach(), losses.box.detach(), losses.heat.new_tensor(progress.step_s)])
    heat, box, step_s = team.average_gradients(detector.parameters(), told).tolist()
    progress.active_s += min(step_s, LONGEST_STEP_S)
    norm = float(nn.utils.clip_grad_norm_(detector.parameters(), settings.clip_norm))
    if not all(math.isfinite(value) for value in (heat, box, norm)):
        raise Dm3dError(
            f"the training diverged at step {progress.step}: heat loss {heat}, box loss {box}, gradient norm {norm}.",
            fix="resume from the last checkpoint, which is whole, or start again with a lower peak rate",
        )
    optimiser.step()
    return heat, box, norm


def _log(out: Path, row: LogRow, report: Callable[[LogRow], None] | None) -> None:
    with disk_errors(out / LOG_NAME), (out / LOG_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")
    if report is not None:
        report(row)


def _save(
    detector: Detector,
    optimiser: torch.optim.Optimizer,
    progress: Progress,
    scale: Float[Tensor, " columns"],
    out: Path,
    team: Team,
) -> None:
    team.average_buffers(detector)
    progress.saved_s = progress.active_s
    if team.leads:
        with columns_multiplied(detector, 1 / scale):
            save_training(out, detector, optimiser, progress)
