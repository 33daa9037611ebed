"""A wide, deep detector that starts where a narrow, shallow one of its family stands (Net2Net: Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dm3d_deploy.errors import CheckpointError
from dm3d_deploy.models.detector import Detector, prunable_layers

SHARED = "dense_head.shared_conv.0.weight"
FIX = "grow from a checkpoint of the same family that is nowhere wider, or start from random weights"


def is_smaller(detector: Detector, weights: Mapping[str, Tensor]) -> bool:
    """Whether these weights are of a detector that is narrower or shallower than this one, and nowhere larger."""
    own = {name: tuple(value.shape) for name, value in detector.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if found == own or not set(found) <= set(own):
        return False
    return all(
        len(shape) == len(own[name]) and all(few <= many for few, many in zip(shape, own[name], strict=True))
        for name, shape in found.items()
    )


def grow_weights(detector: Detector, small: Mapping[str, Tensor]) -> None:
    """Put the weights of a smaller detector into a larger one whose other weights are random; outputs stay the same.

    Unlike Net2Net's copies, new channels keep their random weights and nothing reads them yet: the old outputs have
    zeros for them, from which they learn at once. A new residual block starts as the identity. Raises CheckpointError
    for a smaller detector that is wider somewhere, or holds what the larger one does not.
    """
    own = detector.state_dict()
    if SHARED not in own:
        raise CheckpointError(f"{detector.config.name} has no CenterHead, and only such detectors grow.", fix=FIX)
    stray = sorted(set(small) - set(own))
    if stray:
        raise CheckpointError(f"{stray[0]} and {len(stray) - 1} more tensors have no place to grow.", fix=FIX)
    new_blocks = _identity_blocks(detector, small)
    lost = sorted(name for name in set(own) - set(small) if not name.startswith(new_blocks))
    if lost:
        raise CheckpointError(f"{lost[0]} and {len(lost) - 1} more tensors have nothing to grow from.", fix=FIX)
    axes = {
        f"{layer.name}.weight": _axes(layer.kind, own[f"{layer.name}.weight"]) for layer in prunable_layers(detector)
    }
    with torch.no_grad():
        for name, value in small.items():
            if name == "global_step":
                continue
            outputs, inputs = axes.get(name, (0, None))
            _embed(name, own[name], value, outputs, inputs, _parts(detector, name, own[name], value, inputs))


def _axes(kind: str, weight: Tensor) -> tuple[int, int]:
    """The dimensions of a layer's weight that run over output and input channels."""
    if kind == "deconv2d":
        return 1, 0
    return 0, weight.ndim - 1 if kind == "sparse" else 1


def _identity_blocks(detector: Detector, small: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Prefixes of the residual blocks that the smaller detector lacks; their last norm is set to zero."""
    prefixes = []
    for name, module in detector.named_modules():
        norm = getattr(module, "bn2", None)
        if isinstance(norm, nn.BatchNorm1d) and f"{name}.bn2.weight" not in small:
            nn.init.zeros_(norm.weight)
            prefixes.append(f"{name}.")
    return tuple(prefixes)


def _parts(detector: Detector, name: str, own: Tensor, value: Tensor, inputs: int | None) -> Sequence[tuple[int, int]]:
    """(large, small) numbers of input channels of each map that a layer reads side by side."""
    if inputs is None:
        return ()
    large, few = own.shape[inputs], value.shape[inputs]
    filters = detector.config.backbone_2d.upsample_filters
    if name != SHARED or large == few:
        return ((large, few),)
    if any(each * few % large for each in filters):
        raise CheckpointError(f"{name} reads {few} channels, which {len(filters)} maps cannot share.", fix=FIX)
    return tuple((each, each * few // large) for each in filters)


def _embed(
    name: str, own: Tensor, value: Tensor, outputs: int, inputs: int | None, parts: Sequence[tuple[int, int]]
) -> None:
    """Write `value` over the first channels of `own`; its outputs read nothing else."""
    rest = [axis for axis in range(own.ndim) if axis not in (outputs, inputs)]
    if own.ndim != value.ndim or any(own.shape[a] != value.shape[a] for a in rest):
        raise CheckpointError(f"{name} is {tuple(value.shape)} and would be {tuple(own.shape)}.", fix=FIX)
    if any(o < v for o, v in zip(own.shape, value.shape, strict=True)):
        raise CheckpointError(f"{name} is wider, {tuple(value.shape)}, than {tuple(own.shape)}.", fix=FIX)
    if own.ndim == 0:
        own.copy_(value)
        return
    kept = own.narrow(outputs, 0, value.shape[outputs])
    if inputs is None:
        kept.copy_(value)
        return
    kept.zero_()
    large_at = small_at = 0
    for large, few in parts:
        kept.narrow(inputs, large_at, few).copy_(value.narrow(inputs, small_at, few))
        large_at, small_at = large_at + large, small_at + few
