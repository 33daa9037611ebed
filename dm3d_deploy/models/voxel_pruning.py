"""Voxel pruning: in chosen stages the blocks run on the voxels of greatest magnitude, the others keep their features.

The criterion is SPSS-Conv's (J. Liu et al., "Spatial Pruned Sparse Convolution for Efficient 3D Object Detection",
NeurIPS 2022): the mean absolute feature of a voxel where the stage's sub-manifold blocks begin. There every output is
computed from all neighbours; here voxels that are passed by are not read either, so that the whole stage runs on one
smaller set of cells. The shares are part of the weights (`KEY`), so a file of weights says what detector it is of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from dm3d_deploy.errors import UsageError
from dm3d_deploy.models.backbone3d import SparseBackbone
from dm3d_deploy.models.detector import Detector
from dm3d_deploy.models.sparse import SparseConvolution, SparseTensor, SubMConv3d, cell_keys

KEY = "backbone_3d.voxel_permille"
ALL = 1000


def prune_voxels(detector: Detector, permille: Int64[Tensor, " stages"]) -> None:
    """Let stage i (conv1 is the first) run on `permille[i]` thousandths of its voxels, rounded up; ALL changes nothing.

    UsageError for a detector without sparse stages, or of another number of them, and for shares outside 1..1000.
    """
    names = stage_names(detector)
    count = len(names)
    if not names:
        raise UsageError("pillars have no sparse stages to prune voxels of.", fix="leave --voxel-keep out")
    backbone = detector.backbone_3d
    if permille.shape != (count,) or int(permille.min()) < 1 or int(permille.max()) > ALL:
        raise UsageError(
            f"{permille.tolist()} are no shares of the voxels of {count} stages.",
            fix=f"give {count} whole numbers from 1 to {ALL}",
        )
    if hasattr(backbone, "voxel_permille"):
        backbone.voxel_permille = permille
        return
    backbone.register_buffer("voxel_permille", permille)
    for index, name in enumerate(names):
        _Stage(backbone, index, name)


def stage_names(detector: Detector) -> tuple[str, ...]:
    """conv1, conv2 and so on; nothing for pillars."""
    own = {} if detector.over_pillars else dict(detector.backbone_3d.named_children())
    return tuple(name for name in (f"conv{number}" for number in range(1, 10)) if name in own)


def permille_of(detector: Detector) -> dict[str, int]:
    """The thousandths of voxels that each pruned stage keeps, by its name; empty where all are kept."""
    found = getattr(detector.backbone_3d, "voxel_permille", None) if not detector.over_pillars else None
    if found is None:
        return {}
    named = zip(stage_names(detector), found.tolist(), strict=True)
    return {name: share for name, share in named if share < ALL}


def expected_tensors(detector: Detector, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The detector's tensors; shares of voxels are expected where they are found, and nowhere else."""
    own = {name: tensor for name, tensor in detector.state_dict().items() if name != KEY}
    return {**own, KEY: found[KEY]} if KEY in found else own


def follow_weights(detector: Detector, state: Mapping[str, Tensor]) -> None:
    """Prune voxels as the weights say that are about to be loaded; all are kept where they say nothing."""
    if KEY in state:
        prune_voxels(detector, state[KEY])
    elif permille_of(detector):
        prune_voxels(detector, torch.full_like(cast(Tensor, detector.backbone_3d.voxel_permille), ALL))


def choosing_layers(detector: Detector) -> set[str]:
    """The layers that run on voxels which the detector chooses: another one of them chooses others."""
    pruned = permille_of(detector)
    return {
        f"backbone_3d.{name}"
        for name, conv in (detector.backbone_3d.convolutions() if pruned else ())
        if name.split(".")[0] in pruned and isinstance(conv, SubMConv3d)
    }


@torch.no_grad()
def kept_pair_counts(detector: Detector, features: Tensor, coords: Tensor) -> dict[str, Int64[np.ndarray, " taps"]]:
    """Pairs per tap of the convolutions of pruned stages, by name: they depend on features, as the voxels do."""
    counts: dict[str, np.ndarray] = {}
    handles = []
    for name in choosing_layers(detector):

        def count(module: Any, args: tuple[Any, ...], _: Any, name: str = name) -> None:
            counts[name] = args[0].maps[module.indice_key].pair_counts

        handles.append(detector.get_submodule(name).register_forward_hook(count))
    if handles:
        detector.backbone_3d(detector._sparse(features, coords, 1))
    for handle in handles:
        handle.remove()
    return counts


def kept_rows(x: SparseTensor, permille: int) -> Int64[Tensor, " kept"]:
    """Of every frame the thousandths of greatest mean absolute feature, ties by their cell, in the order of rows."""
    importance = x.features.detach().abs().mean(dim=1)
    by_cell = torch.argsort(cell_keys(x.coords, x.shape_zyx))
    order = by_cell[torch.argsort(importance[by_cell], descending=True, stable=True)]
    chosen = []
    for frame in range(x.batch_size):
        own = order[x.coords[order, 0] == frame]
        chosen.append(own[: (len(own) * permille + ALL - 1) // ALL])
    return torch.cat(chosen).sort().values


class _Stage:
    """Narrows what goes into the first block of a stage, and widens what its last one leaves."""

    def __init__(self, backbone: SparseBackbone, index: int, name: str) -> None:
        self.backbone, self.index = backbone, index
        self.passed_by: tuple[SparseTensor, Int64[Tensor, " kept"]] | None = None
        stage = cast(nn.Sequential, backbone.get_submodule(name))
        first = next((child for child in stage if isinstance(_first(child), SubMConv3d)), None)
        if first is None:  # all blocks of the stage were removed
            return
        conv = cast(SubMConv3d, _first(first))
        if conv.in_channels != conv.out_channels:
            raise UsageError(
                f"{name} makes {conv.out_channels} channels of {conv.in_channels}: voxels cannot keep their features.",
                fix="leave this stage out of --voxel-stages",
            )
        first.register_forward_pre_hook(self.narrow)
        stage.register_forward_hook(self.widen)

    def narrow(self, module: nn.Module, args: tuple[SparseTensor, ...]) -> tuple[SparseTensor] | None:
        permille, (x,) = int(cast(Tensor, self.backbone.voxel_permille)[self.index]), args
        if permille == ALL:
            self.passed_by = None
            return None
        rows = kept_rows(x, permille)
        self.passed_by = x, rows
        return (SparseTensor(x.features[rows], x.coords[rows], x.shape_zyx, x.batch_size),)

    def widen(self, module: nn.Module, args: tuple[SparseTensor, ...], output: SparseTensor) -> SparseTensor | None:
        if self.passed_by is None:
            return None
        whole, rows = self.passed_by
        self.passed_by = None
        return whole.with_features(whole.features.index_copy(0, rows, output.features))


def _first(block: nn.Module) -> SparseConvolution | None:
    """The convolution that a block begins with."""
    return next((module for module in block.modules() if isinstance(module, SparseConvolution)), None)
