"""What the loop eats: voxels of a few frames or crops of equal size, and what the head should answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from dm3d_deploy.training.anchor_targets import AnchorTargets
from dm3d_deploy.training.targets import TaskTargets


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Voxels of `size` frames on a sparse grid of `shape_zyx` cells, one more along z than the voxel grid has.

    For a detector over pillars, rows are points and the grid is that of the pillars. `targets` are those of each task,
    or of all anchors of an anchor head.
    """

    features: Float32[Tensor, "voxels columns"]
    coords: Int64[Tensor, "voxels 4"]
    shape_zyx: tuple[int, int, int]
    size: int
    targets: tuple[TaskTargets, ...] | AnchorTargets

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return replace(
            self,
            features=self.features.to(device),
            coords=self.coords.to(device),
            targets=self.targets.to(device)
            if isinstance(self.targets, AnchorTargets)
            else tuple(target.to(device) for target in self.targets),
        )


# The batch of a step, by its number alone: whoever resumes at step n sees what an unbroken run would have seen.
BatchSource = Callable[[int], Batch]
