"""Channels and residual blocks removed for good: a smaller detector that computes what the masked one does."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from dm3d_deploy.config import DetectorConfig
from dm3d_deploy.errors import CheckpointError
from dm3d_deploy.models.backbone3d import SparseBasicBlock
from dm3d_deploy.models.detector import Detector, build_detector, prunable_layers
from dm3d_deploy.models.voxel_pruning import follow_weights

Sides = tuple[Bool[np.ndarray, " inputs"], Bool[np.ndarray, " outputs"]]


def smaller_detector(detector: Detector, sides: Mapping[str, Sides], dropped: Collection[str] = ()) -> Detector:
    """A new detector without the channels that `sides` (by layer: kept inputs, kept outputs) leaves out.

    `dropped` names residual blocks of which the identity is left. It equals the detector whose weights of those
    channels are zero on both sides: a channel that nobody reads needs no bias and no norm either.
    """
    state = dict(detector.state_dict())
    for layer in prunable_layers(detector):
        if layer.name not in sides:
            continue
        inputs, outputs = (torch.from_numpy(np.flatnonzero(side)) for side in sides[layer.name])
        weight = state[f"{layer.name}.weight"].reshape(layer.read_shape)
        weight = weight.index_select(layer.output_dim, outputs).index_select(layer.input_dim, inputs)
        state[f"{layer.name}.weight"] = weight.reshape(weight.shape[::-1]) if layer.pointwise else weight.contiguous()
        names = [f"{layer.name}.bias"]
        if layer.norm_name is not None:
            names += [f"{layer.norm_name}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        for name in names:
            if name in state:
                state[name] = state[name].index_select(0, outputs)
    kept = {name: value for name, value in state.items() if not any(name.startswith(f"{block}.") for block in dropped)}
    return detector_of_weights(detector.config, kept)


def detector_of_weights(config: DetectorConfig, state: Mapping[str, Tensor]) -> Detector:
    """The detector of a config at the widths that its weights have, filled; a residual block without weights is gone.

    So a run's YAML and its safetensors are all that a smaller detector needs. CheckpointError when they do not fit.
    """
    detector = build_detector(config)
    for name, module in list(detector.named_modules()):
        if isinstance(module, SparseBasicBlock) and f"{name}.conv1.weight" not in state:
            parent, _, leaf = name.rpartition(".")
            setattr(detector.get_submodule(parent), leaf, nn.Identity())
    for layer in prunable_layers(detector):
        weight = state.get(f"{layer.name}.weight")
        if weight is None or weight.ndim != layer.weight.ndim:
            continue
        output_dim, input_dim = {"sparse": (0, -1), "deconv2d": (1, 0)}.get(layer.kind, (0, 1))
        _resize(layer.module, weight, output_dim, input_dim)
        if layer.norm is not None:
            _resize_norm(layer.norm, weight.shape[output_dim])
    follow_weights(detector, state)
    try:
        detector.load_state_dict(dict(state))
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights make no smaller {config.name}: {' '.join(str(error).split())[:300]}",
            fix="give the weights and the YAML of one run",
        ) from None
    return detector.eval()


def _resize(module: Any, weight: Tensor, output_dim: int, input_dim: int) -> None:
    module.weight = nn.Parameter(torch.empty_like(weight))
    module.in_channels, module.out_channels = weight.shape[input_dim], weight.shape[output_dim]
    if isinstance(module.bias, Tensor):
        module.bias = nn.Parameter(weight.new_empty(weight.shape[output_dim]))


def _resize_norm(norm: nn.BatchNorm1d | nn.BatchNorm2d, channels: int) -> None:
    norm.num_features = channels
    norm.weight, norm.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
    norm.running_mean, norm.running_var = torch.zeros(channels), torch.ones(channels)
