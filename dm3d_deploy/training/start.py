"""Weights to start training from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from dm3d_deploy.config import AnchorHeadConfig
from dm3d_deploy.models.detector import Detector, PrunableLayer, prunable_layers

HEAT_BIAS = -2.19  # a score of 0.1 everywhere (Lin et al. 2017, as OpenPCDet's CenterHead)
ANCHOR_BIAS = -math.log(99)  # a score of 0.01 everywhere, as OpenPCDet's AnchorHeadSingle
CENTRE_BIAS = 0.5  # the middle of the cell
HEIGHT_BIAS_M = -0.9  # most objects stand below the sensor
OUTPUT_DEVIATION = 0.02  # outputs start near their biases
OCCUPANCY = 0.5  # share of a sparse kernel's taps that meet an active cell, roughly


def start_weights(detector: Detector, mean_sizes_m: Mapping[str, tuple[float, float, float]], *, seed: int) -> None:
    """Fill the detector in place: He et al. (2015) for convolutions, norms the identity, outputs at the average box."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in detector.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.reset_parameters()
        for layer in prunable_layers(detector):
            deviation = OUTPUT_DEVIATION if layer.final else math.sqrt(2 / _fan_in(layer))
            layer.weight.copy_(deviation * torch.randn(layer.weight.shape, generator=random))
            if isinstance(layer.module.bias, torch.Tensor):
                layer.module.bias.zero_()
        head = detector.config.head
        if isinstance(head, AnchorHeadConfig):
            detector.get_parameter("dense_head.conv_cls.bias").fill_(ANCHOR_BIAS)
            return
        for task, names in enumerate(head.classes_by_task):
            _start_outputs(detector, task, [mean_sizes_m[name] for name in names])


def _fan_in(layer: PrunableLayer) -> float:
    """How many products a layer's output sums."""
    if layer.kind == "deconv2d":
        return float(layer.weight.shape[0])
    return layer.weight[0].numel() * (OCCUPANCY if layer.kind == "sparse" else 1.0)


def _start_outputs(detector: Detector, task: int, sizes_m: Sequence[tuple[float, float, float]]) -> None:
    """The biases of one task's outputs."""
    dim = torch.from_numpy(np.log(np.array(sizes_m)).mean(axis=0))
    start = {"center": CENTRE_BIAS, "center_z": HEIGHT_BIAS_M, "hm": HEAT_BIAS, "dim": dim}
    for branch in detector.config.center_head.branches[task]:
        if branch.name in start:
            final = detector.get_submodule(f"dense_head.heads_list.{task}.{branch.name}.{branch.convs - 1}")
            bias = final.bias
            if isinstance(bias, torch.Tensor):
                bias.copy_(torch.as_tensor(start[branch.name]).expand_as(bias))
