"""What a refit will make good of each layer's pruning at every ratio, by the inputs before anything is pruned."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from calib.refit_rows import EndOfWalk, Samples, batch_of, matrix_of, silent
from calib.scenes import read_scenes
from dm3d_deploy.models.detector import Detector, PrunableLayer, prunable_layers
from dm3d_deploy.models.voxel_pruning import choosing_layers
from dm3d_deploy.pruning.reconstruction import Moments, shares_left


def refit_shares(
    detector: Detector, features: Tensor, coords: Tensor, frame: int, settings: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """For each curve the shares of `reconstruction.shares_left`, by the curve's name.

    `settings`: `steps` (path of the points at which each weight goes, one array a curve), `curves` (of each layer, by
    name, its curves' names and numbers of points), `columns` (how many output columns of a layer stand for all), and
    of the refit `frames_file`, `frames`, `sensitivity`, `rows_per_input`, `damping`, `seed`. Layers that choose among
    voxels are not refitted and left out.
    """
    features, coords = batch_of(Path(settings["frames_file"]), settings["frames"])
    scenes = read_scenes(detector.config, Path(settings["frames_file"]), settings["frames"], settings.get("rois"))
    own = choosing_layers(detector)
    layers = [x for x in prunable_layers(detector) if x.name in settings["curves"] and x.name not in own]
    samples = Samples.of(settings)
    priced: list[Future[dict[str, np.ndarray]]] = []
    handles = []
    with (
        safe_open(settings["steps"], framework="np") as steps,
        ThreadPoolExecutor(1) as behind,  # one layer is priced while the next is computed
        torch.no_grad(),
    ):
        for order, layer in enumerate(layers):

            def price(
                _: nn.Module, inputs: tuple[Any, ...], output: Any, layer: PrunableLayer = layer, order: int = order
            ) -> None:
                moments = samples.moments(layer, inputs[0], output, order)
                weight = matrix_of(layer.weight.numpy(force=True), layer)
                columns = _drawn(weight.shape[1], int(settings["columns"]), [int(settings["seed"]), order, 1])
                curves = {
                    name: (matrix_of(steps.get_tensor(name), layer)[:, columns], points)
                    for name, points in settings["curves"][layer.name].items()
                }
                if priced:
                    priced[-1].result()
                priced.append(behind.submit(_shares, moments, weight[:, columns], curves, float(settings["damping"])))
                settings.get("walked", silent)(order + 1, len(layers))
                if layer is layers[-1]:
                    raise EndOfWalk

            handles.append(layer.module.register_forward_hook(price))
        with contextlib.suppress(EndOfWalk):
            detector(features, coords, batch_size=len(settings["frames"]), scenes=scenes)
    for handle in handles:
        handle.remove()
    return {name: shares for each in priced for name, shares in each.result().items()}


def _drawn(count: int, most: int, seed: list[int]) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64(seed))
    return np.sort(rng.permutation(count)[:most])


def _shares(
    moments: Moments, weight: np.ndarray, curves: Mapping[str, tuple[np.ndarray, int]], damping: float
) -> dict[str, np.ndarray]:
    return {
        name: shares_left(moments, weight, steps, points, damping=damping) for name, (steps, points) in curves.items()
    }
