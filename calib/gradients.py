"""Gradients of a detector's normalised output by random-sign sketches.

For a sketch r of independent random signs, E_r[(d(r'y)/dW . dW)^2] = ||J dW||^2: each gradient row measures the whole
output, where the gradient of a plain sum would cancel between cells (DM3D Eq. 10, 12; y as in pruning.normalisation).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from calib.cell_energies import CellEnergies
from dm3d_deploy.models.detector import Detector
from dm3d_deploy.pruning.normalisation import Cells, OutputScale, box_names, score_name, tasks_of, top_cells


def normalised_outputs(
    maps: Mapping[str, torch.Tensor], cells: Cells, scale: OutputScale, *, lambda_box: float, lambda_score: float
) -> list[torch.Tensor]:
    """The pieces of y: squared differences of all of them add up to `normalisation.output_distortion`."""
    values = sum(len(chosen) * maps[name].shape[1] for task, chosen in cells.items() for name in box_names(maps, task))
    pieces = []
    for task in tasks_of(maps):
        pieces.append(math.sqrt(lambda_score / scale.score_energy) * torch.sigmoid(maps[score_name(maps, task)]))
    for task, chosen in cells.items():
        index = torch.from_numpy(chosen)
        for name in box_names(maps, task):
            deviation = torch.from_numpy(scale.box_deviation[name].astype(np.float32))
            picked = maps[name][0].flatten(1).index_select(1, index)
            pieces.append(math.sqrt(lambda_box / values) * picked / deviation[:, None])
    return pieces


def arrays_of(maps: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The maps' values as numpy, without gradients."""
    return {name: tensor.detach().numpy() for name, tensor in maps.items()}


def signs(shape: torch.Size, rng: np.random.Generator) -> torch.Tensor:
    """Independent random signs, Float32, the same on every machine for one generator state."""
    return torch.from_numpy(rng.integers(0, 2, tuple(shape), dtype=np.int8).astype(np.float32) * 2 - 1)


def sketch_gradients(
    detector: Detector, features: torch.Tensor, coords: torch.Tensor, frame: int, settings: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Gradient rows of one frame, layer name -> Float32[sketches, *weight shape], and `CellEnergies.arrays`.

    `settings`: `layers` (names), `scale` (OutputScale.as_json), `sketches`, `seed`, `lambda_box`, `lambda_score`.
    No sketch means one row, the gradient of the plain sum of y, as the paper prints it.
    """
    scale = OutputScale.from_json(settings["scale"])
    names: list[str] = list(settings["layers"])
    weights = [detector.get_parameter(f"{name}.weight") for name in names]
    detector.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    with CellEnergies(detector, names) as energies:
        maps = detector(features, coords, scenes=settings.get("scenes", ()))
    cells = top_cells(arrays_of(maps), scale.box_cells)
    outputs = normalised_outputs(
        maps, cells, scale, lambda_box=settings["lambda_box"], lambda_score=settings["lambda_score"]
    )
    rows: dict[str, list[np.ndarray]] = {name: [] for name in names}
    sketches = int(settings["sketches"])
    for sketch in range(max(1, sketches)):
        rng = np.random.Generator(np.random.PCG64([int(settings["seed"]), frame, sketch]))
        signed = [signs(piece.shape, rng) * piece if sketches else piece for piece in outputs]
        projection = torch.stack([piece.sum() for piece in signed]).sum()
        gradients = torch.autograd.grad(projection, weights, retain_graph=sketch + 1 < sketches)
        for name, gradient in zip(names, gradients, strict=True):
            rows[name].append(gradient.numpy())
    return {**{name: np.stack(row) for name, row in rows.items()}, **energies.arrays()}
