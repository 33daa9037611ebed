"""Label-free distillation: a detector learns to answer what a teacher of the same architecture answers.

The loss is the distortion that pruning minimises (`pruning/normalisation.py`) on whatever the batches show: score maps
as probabilities, box channels at the cells where the teacher is confident. Energies are taken per cell of the map and
confident cells as a share of it, so that crops of any size count alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from dm3d_deploy.errors import CheckpointError, UsageError
from dm3d_deploy.models.detector import Detector, prunable_layers
from dm3d_deploy.pruning.normalisation import OutputScale, box_names, output_scale, score_name, tasks_of
from dm3d_deploy.training.batch import Batch, BatchSource
from dm3d_deploy.training.checkpoint import Progress
from dm3d_deploy.training.log import Report
from dm3d_deploy.training.loop import Score, TrainSettings, column_scale, columns_multiplied, raw_maps, train_detector
from dm3d_deploy.training.losses import values_at
from dm3d_deploy.training.stop import Stop
from dm3d_deploy.training.team import Team

BOX_SHARE = 500 / 128**2  # the 500 cells that pruning looks at in CenterPoint's map
SCALE_CROPS = 8

Maps = Mapping[str, Float[Tensor, "batch channels h w"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillScale:
    """What differences are divided by: mean squared score per cell, and the deviation of each box channel by map."""

    score_energy: float
    box_deviation: Mapping[str, Float32[Tensor, " channels"]]
    box_share: float

    @classmethod
    def of(cls, scale: OutputScale, cells: int) -> DistillScale:
        """The scale of frames whose maps have `cells` cells."""
        return cls(
            score_energy=scale.score_energy / cells,
            box_deviation={name: torch.from_numpy(d.astype(np.float32)) for name, d in scale.box_deviation.items()},
            box_share=scale.box_cells / cells,
        )


def distillation_losses(maps: Maps, wanted: Maps, scale: DistillScale) -> dict[str, Float[Tensor, ""]]:
    """The score and the box part of the distortion of `maps` against the teacher's; as `output_distortion`.

    A batch counts as one frame of as many cells.
    """
    tasks = tasks_of(wanted)
    names = [score_name(wanted, task) for task in tasks]
    scores = [(maps[name].float(), wanted[name].float()) for name in names]
    score = torch.stack([(own.sigmoid() - other.sigmoid()).square().sum() for own, other in scores]).sum()
    cells = scores[0][1][:, 0].numel()
    squares, count = [], 0
    for task, chosen in _confident(wanted, max(round(scale.box_share * cells), 1)).items():
        for name in box_names(wanted, task):
            change = values_at(maps[name], chosen).float() - values_at(wanted[name], chosen).float()
            squares.append((change / scale.box_deviation[name].to(change.device)).square().sum())
            count += change.numel()
    return {"score": score / (scale.score_energy * cells), "box": torch.stack(squares).sum() / count}


def _confident(wanted: Maps, count: int) -> dict[int, Int64[Tensor, " cells"]]:
    """The teacher's `count` most confident cells over all tasks, flat in [batch, row, column]; ties as `top_cells`."""
    tasks = tasks_of(wanted)
    confidence = torch.stack([wanted[score_name(wanted, task)].amax(dim=1).flatten() for task in tasks])
    order = confidence.flatten().sort(descending=True, stable=True).indices[:count]
    size = confidence.shape[1]
    return {task: order[order // size == row] % size for row, task in enumerate(tasks)}


@torch.no_grad()
def estimate_scale(teacher: Detector, batches: BatchSource, team: Team | None = None) -> DistillScale:
    """The scale of the teacher's answers to the first crops that are as large as the very first, over all processes."""
    device = column_scale(teacher).device
    crops: list[dict[str, np.ndarray]] = []
    step, shape = 0, None
    while len(crops) < SCALE_CROPS:
        batch = batches(step).to(device)
        step, shape = step + 1, shape or batch.shape_zyx
        if batch.shape_zyx == shape:
            maps = {name: value.float().cpu().numpy() for name, value in _answers(teacher, batch).items()}
            crops += [{name: value[row : row + 1] for name, value in maps.items()} for row in range(batch.size)]
    cells = crops[0][score_name(crops[0], 0)][0, 0].size
    found = DistillScale.of(output_scale(crops, max(round(BOX_SHARE * cells), 1)), cells)
    names = list(found.box_deviation)
    told = torch.cat([torch.tensor([found.score_energy]), *found.box_deviation.values()]).to(device)
    (team or Team()).average(told)
    energy, *parts = told.cpu().split([1, *(len(found.box_deviation[name]) for name in names)])
    return replace(found, score_energy=float(energy), box_deviation=dict(zip(names, parts, strict=True)))


def _answers(teacher: Detector, batch: Batch) -> Maps:
    return raw_maps(teacher, batch, half_2d=False)


def zeros_held(detector: Detector, masks: Mapping[str, Bool[np.ndarray, "*shape"]]) -> Callable[[], None]:
    """Zero what the masks (by layer) do not keep, and return what does so again; CheckpointError for masks that misfit.

    Weights may since have learned anything: a zero times the mask stays a zero, a NaN is the loop's to tell.
    """
    weights = {layer.name: layer.weight for layer in prunable_layers(detector)}
    for name, keep in masks.items():
        if name not in weights or tuple(weights[name].shape) != keep.shape:
            raise CheckpointError(
                f"the mask of {name}, {keep.shape}, fits no layer of {detector.config.name}.",
                fix="give the model that the run was built from",
            )
    held = [(weights[name], torch.from_numpy(keep).to(weights[name])) for name, keep in masks.items()]

    def hold() -> None:
        with torch.no_grad():
            for weight, keep in held:
                weight.mul_(keep)

    hold()
    return hold


def distil(
    detector: Detector,
    teacher: Detector,
    batches: BatchSource,
    settings: TrainSettings,
    *,
    out: Path,
    masks: Mapping[str, Bool[np.ndarray, "*shape"]] | None = None,
    scale: DistillScale | None = None,
    resume: bool = False,
    team: Team | None = None,
    score: Score | None = None,
    report: Report | None = None,
    stop: Stop | None = None,
) -> Progress:
    """Train `detector` in place, as `train_detector` does, to answer as the frozen `teacher`; labels are not looked at.

    `masks` (by layer) say which weights may differ from zero. `scale` is by default that of the teacher's answers to
    the first batches. Batch norms keep their statistics: those of a few crops would add noise that the teacher, which
    uses its own, does not have. Raises UsageError when the two detectors answer with different maps.
    """
    if detector.config.head != teacher.config.head or detector.config.voxels != teacher.config.voxels:
        raise UsageError(
            f"{detector.config.name} and its teacher {teacher.config.name} answer different questions.",
            fix="distil from a detector with the same voxels, classes and head",
        )
    teacher.eval().requires_grad_(False)
    scale = scale or estimate_scale(teacher, batches, team)

    def losses(batch: Batch) -> Mapping[str, Tensor]:
        with torch.no_grad():
            wanted = raw_maps(teacher, batch, half_2d=settings.half_2d)
        return distillation_losses(raw_maps(detector, batch, half_2d=settings.half_2d), wanted, scale)

    with columns_multiplied(teacher, column_scale(teacher)):
        return train_detector(
            detector, batches, replace(settings, frozen_norms=True), out=out, losses=losses, resume=resume, team=team,
            after_step=None if masks is None else zeros_held(detector, masks), score=score, report=report,
            stop=stop,
        )  # fmt: skip
