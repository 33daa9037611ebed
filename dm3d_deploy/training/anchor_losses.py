"""Losses of an anchor head: focal over classes, smooth L1 over residuals, cross-entropy over directions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from dm3d_deploy.config import AnchorHeadConfig
from dm3d_deploy.training.anchor_targets import BACKGROUND, AnchorTargets
from dm3d_deploy.training.losses import Losses

# second.yaml and pointpillar.yaml, KITTI and ONCE alike.
CLASS_WEIGHT, BOX_WEIGHT, DIRECTION_WEIGHT = 1.0, 2.0, 0.2
ALPHA, GAMMA = 0.25, 2.0
BETA = 1 / 9


def rows_of_anchors(
    maps: Mapping[str, Float[Tensor, "batch channels h w"]], branch: str, per_cell: int
) -> Float[Tensor, "batch anchors channels"]:
    """One branch of every anchor, in the order of the targets: row, column, anchor of the cell."""
    parts = torch.stack([maps[f"{anchor}.{branch}"] for anchor in range(per_cell)], dim=1)
    batch, _, channels = parts.shape[:3]
    return parts.permute(0, 3, 4, 1, 2).reshape(batch, -1, channels).float()


def focal_loss(
    logits: Float[Tensor, "batch anchors classes"], classes: Int64[Tensor, "batch anchors"]
) -> Float[Tensor, "batch anchors"]:
    """Focal loss of sigmoids (Lin et al. 2017; alpha .25, gamma 2), summed over classes; 0 where nothing is asked."""
    wanted = functional.one_hot(classes.clamp(min=BACKGROUND), logits.shape[2] + 1)[..., 1:].to(logits)
    score = torch.sigmoid(logits)
    miss = wanted * (1 - score) + (1 - wanted) * score
    weight = (wanted * ALPHA + (1 - wanted) * (1 - ALPHA)) * miss**GAMMA
    loss = weight * functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return loss.sum(dim=2) * (classes >= BACKGROUND)


def residual_loss(
    found: Float[Tensor, "batch anchors 7"], wanted: Float[Tensor, "batch anchors 7"]
) -> Float[Tensor, "batch anchors"]:
    """Smooth L1 (beta 1/9), summed; the angle counts by the sine of its difference, blind to a half turn (SECOND)."""
    difference = torch.cat([found[..., :6] - wanted[..., :6], torch.sin(found[..., 6:] - wanted[..., 6:])], dim=2).abs()
    return torch.where(difference < BETA, difference**2 / (2 * BETA), difference - BETA / 2).sum(dim=2)


def anchor_losses(
    maps: Mapping[str, Float[Tensor, "batch channels h w"]], targets: AnchorTargets, head: AnchorHeadConfig
) -> Losses:
    """The losses of raw head maps ("0.cls"), each frame's divided by its anchors with an object, at least one.

    `heat` is the class loss; `box` is 2 x residuals + 0.2 x directions, OpenPCDet's weights.
    """
    owned = (targets.classes > BACKGROUND).float()
    share = owned / owned.sum(dim=1, keepdim=True).clamp(min=1)
    batch = len(owned)
    scores = focal_loss(rows_of_anchors(maps, "cls", head.per_cell), targets.classes)
    heat = (scores / owned.sum(dim=1, keepdim=True).clamp(min=1)).sum() / batch
    residuals = residual_loss(rows_of_anchors(maps, "box", head.per_cell), targets.residuals)
    box = BOX_WEIGHT * (residuals * share).sum() / batch
    if head.direction is not None:
        logits = rows_of_anchors(maps, "dir", head.per_cell)
        entropy = functional.cross_entropy(logits.transpose(1, 2), targets.directions, reduction="none")
        box = box + DIRECTION_WEIGHT * (entropy * share).sum() / batch
    return Losses(heat=CLASS_WEIGHT * heat, box=box)
