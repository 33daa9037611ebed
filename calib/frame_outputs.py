"""What one frame tells about a detector: its raw output maps, its kernel maps, its batch-norm statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from dm3d_deploy.models.detector import Detector, sparse_pair_counts
from dm3d_deploy.models.outputs import detections_from_outputs
from dm3d_deploy.models.voxel_pruning import kept_pair_counts

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def head_maps(
    detector: Detector, features: torch.Tensor, coords: torch.Tensor, frame: int, settings: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Raw head outputs "TASK.BRANCH" Float32[1, C, H, W].

    With settings["pairs"], also "pairs.LAYER" Int64[taps]; with settings["bev"], also the backbone's map "bev".
    """
    with torch.inference_mode():
        found = detector.outputs(features, coords, scenes=settings.get("scenes", ()))
    maps = {name: tensor.numpy() for name, tensor in found.maps.items()}
    if settings.get("bev"):
        maps["bev"] = found.bev.numpy()
    if settings.get("pairs"):
        maps |= {f"pairs.{name}": pairs for name, pairs in sparse_pair_counts(detector, coords).items()}
    return maps


def kept_pairs(
    detector: Detector, features: torch.Tensor, coords: torch.Tensor, frame: int, settings: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Pairs per tap of the layers that run on some of the voxels, Int64[taps] by name."""
    return kept_pair_counts(detector, features, coords)


def decoded_boxes(
    detector: Detector, features: torch.Tensor, coords: torch.Tensor, frame: int, settings: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Detections: "boxes" Float32[D, 9] (centre, size in m, yaw in rad, velocity in m/s), "scores", "labels"."""
    with torch.inference_mode():
        outputs = detector.outputs(features, coords, scenes=settings.get("scenes", ()))
    found = detections_from_outputs(outputs, detector.config)
    boxes = found.boxes
    table = np.concatenate([boxes.centre, boxes.size, boxes.yaw[:, None], boxes.velocity], axis=1)
    return {"boxes": table, "scores": found.scores, "labels": found.labels}


def batch_statistics(
    detector: Detector, features: torch.Tensor, coords: torch.Tensor, frame: int, settings: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Mean and unbiased variance of every batch-norm input, "MODULE.mean" and "MODULE.var", in train mode.

    Each batch norm normalises with this frame's statistics, as PyTorch's does in train mode, so the statistics of a
    layer are those behind re-estimated earlier ones.
    """
    found: dict[str, np.ndarray] = {}
    norms = {name: module for name, module in detector.named_modules() if isinstance(module, NORMS)}
    momenta = {name: norm.momentum for name, norm in norms.items()}
    try:
        for norm in norms.values():
            norm.train()
            norm.momentum = 1.0  # the running statistics become this batch's own
        with torch.no_grad():
            detector(features, coords, scenes=settings.get("scenes", ()))
        for name, norm in norms.items():
            if norm.running_mean is None or norm.running_var is None:
                continue
            found[f"{name}.mean"] = norm.running_mean.numpy().copy()
            found[f"{name}.var"] = norm.running_var.numpy().copy()
    finally:
        for name, norm in norms.items():
            norm.eval()
            norm.momentum = momenta[name]
    return found
