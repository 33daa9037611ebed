"""CenterHead's losses: the heat maps' focal loss and the L1 of box values at object centres."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from dm3d_deploy.training.targets import TaskTargets

# cbgs_voxel01_res3d_centerpoint: every box value counts 1 but the velocities, and all of them a quarter.
BRANCH_WEIGHT = {"center": 1.0, "center_z": 1.0, "dim": 1.0, "rot": 1.0, "vel": 0.2}
BOX_WEIGHT = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """The two parts of the loss, summed over tasks; `total` is what is minimised."""

    heat: Float[Tensor, ""]
    box: Float[Tensor, ""]

    @property
    def total(self) -> Float[Tensor, ""]:
        """Their sum; the box part already carries its weight."""
        return self.heat + self.box


def focal_loss(logits: Float[Tensor, "*shape"], heat: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Focal loss of CenterNet (Zhou et al. 2019, Eq. 1; alpha 2, beta 4) over the number of object centres, at least 1.

    Taken from the logits, so it neither overflows nor needs OpenPCDet's clamp of the probabilities to 1e-4.
    """
    score = torch.sigmoid(logits)
    centre = heat == 1
    hit = functional.logsigmoid(logits) * (1 - score) ** 2
    miss = functional.logsigmoid(-logits) * score**2 * (1 - heat) ** 4
    return -torch.where(centre, hit, miss).sum() / centre.sum().clamp(min=1)


def values_at(maps: Float[Tensor, "batch channels h w"], cells: Int64[Tensor, " objects"]) -> Tensor:
    """The channels at flat cells of [batch, row, column]: [objects, channels]."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])[cells]


def center_losses(
    maps: Mapping[str, Float[Tensor, "batch channels h w"]],
    targets: Sequence[TaskTargets],
    branches: Sequence[Sequence[str]],
) -> Losses:
    """The losses of raw head maps ("0.hm"); `branches[task]` names the box branches in the order of the values.

    Values that are NaN ask for nothing, as in OpenPCDet's RegLossCenterNet.
    """
    device = next(iter(maps.values())).device
    heat, box = torch.zeros((), device=device), torch.zeros((), device=device)
    for task, (target, names) in enumerate(zip(targets, branches, strict=True)):
        heat = heat + focal_loss(maps[f"{task}.hm"].float(), target.heat)
        at = 0
        for name in names:
            found = values_at(maps[f"{task}.{name}"], target.cells).float()
            wanted = target.values[:, at : at + found.shape[1]]
            at += found.shape[1]
            change = torch.where(wanted.isnan(), 0.0, found - wanted)  # nobody knows the velocity of a labelled object
            box = box + BRANCH_WEIGHT[name] * change.abs().sum() / max(len(wanted), 1)
    return Losses(heat=heat, box=BOX_WEIGHT * box)
