"""Refits the kept weights layer by layer: the pruned detector and the dense one walk through the frames side by side.

Each layer's inputs come from the pruned detector with all earlier layers already refitted, its wanted outputs from the
dense one, so what earlier layers still get wrong is made good as far as this layer can. One forward pass of both.
Cells count by how much the detector's output feels them (pruning.sensitivity).
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from calib.refit_rows import EndOfWalk, Samples, batch_of, matrix_of, silent
from calib.scenes import read_scenes
from dm3d_deploy.errors import InternalError
from dm3d_deploy.models.checkpoints import load_checkpoint
from dm3d_deploy.models.detector import Detector, PrunableLayer, build_detector, prunable_layers
from dm3d_deploy.models.voxel_pruning import choosing_layers
from dm3d_deploy.pruning.reconstruction import Moments, refit


def reconstructed_weights(
    detector: Detector, features: Tensor, coords: Tensor, frame: int, settings: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """All tensors that the refit changes, by name: masked layers' weights, and the means of the norms behind them.

    `detector` is the pruned one. `settings`: `dense_weights` and `masks` (paths), `frames_file`, `frames` (all of them
    are used at once), `sensitivity` (path of their cells'), `rows_per_input`, `damping`, `seed`. Moves weights of
    `detector` as it goes.
    """
    dense = build_detector(detector.config)
    load_checkpoint(dense, Path(settings["dense_weights"]))
    features, coords = batch_of(Path(settings["frames_file"]), settings["frames"])
    with safe_open(settings["masks"], framework="np") as file:
        masks = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file, not a mapping
    scenes = read_scenes(detector.config, Path(settings["frames_file"]), settings["frames"], settings.get("rois"))
    own = choosing_layers(detector)  # the dense detector's rows are other voxels
    layers = [layer for layer in prunable_layers(detector) if layer.name in masks and layer.name not in own]
    samples = Samples.of(settings)
    changed: dict[str, np.ndarray] = {}

    def run(model: Detector) -> None:
        model(features, coords, batch_size=len(settings["frames"]), scenes=scenes)

    with _OutputsOf(dense, [layer.name for layer in layers], run) as wanted, torch.no_grad():
        handles = []
        for order, layer in enumerate(layers):

            def refit_now(
                _: nn.Module, inputs: tuple[Any, ...], layer: PrunableLayer = layer, order: int = order
            ) -> None:
                moments = samples.moments(layer, inputs[0], wanted.next(layer.name), order)
                changed.update(_refitted(layer, moments, masks[layer.name], float(settings["damping"])))
                settings.get("walked", silent)(order + 1, len(layers))
                if layer is layers[-1]:
                    raise EndOfWalk

            handles.append(layer.module.register_forward_pre_hook(refit_now))
        with contextlib.suppress(EndOfWalk):
            run(detector)
        for handle in handles:
            handle.remove()
    return changed


class _OutputsOf:
    """A forward pass in a thread of its own that hands over one layer's output at a time, in forward order."""

    def __init__(self, model: Detector, names: list[str], run: Callable[[Detector], None]) -> None:
        self._model, self._names, self._run = model, names, run
        self._outputs: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> _OutputsOf:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        while self._thread.is_alive():
            self._drop()
            self._thread.join(timeout=0.05)

    def next(self, name: str) -> Any:
        """The output of the layer `name`, which must be the next one."""
        found, output = self._outputs.get()
        if isinstance(output, BaseException):
            raise output
        if found != name:
            raise InternalError(f"the dense detector computed {found} where {name} was awaited")
        return output

    def _drop(self) -> None:
        try:
            self._outputs.get_nowait()
        except queue.Empty:
            return

    def _work(self) -> None:
        def told(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                if not self._closed.is_set():
                    self._outputs.put((name, output))
                if name == self._names[-1]:
                    raise EndOfWalk

            return hook

        handles = [self._model.get_submodule(name).register_forward_hook(told(name)) for name in self._names]
        try:
            with torch.no_grad(), contextlib.suppress(EndOfWalk):
                self._run(self._model)
        except (InternalError, RuntimeError) as error:  # raised again by whoever waits
            self._outputs.put(("", error))
        finally:
            for handle in handles:
                handle.remove()


def _refitted(layer: PrunableLayer, moments: Moments, keep: np.ndarray, damping: float) -> dict[str, np.ndarray]:
    """Put the new weights into the layer and the offset into the norm behind it; returns both by tensor name."""
    weight = layer.weight
    old = weight.numpy(force=True)
    found = refit(moments, matrix_of(old, layer), matrix_of(keep, layer), damping=damping)
    new = found.weight if layer.kind == "deconv2d" or layer.pointwise else found.weight.T
    weight.copy_(torch.from_numpy(np.ascontiguousarray(new).reshape(old.shape)))
    offset = found.offset.reshape(layer.read_shape[layer.output_dim], -1).mean(axis=1)
    bias = layer.module.bias
    if isinstance(bias, Tensor):
        offset = offset - bias.numpy(force=True)  # the wanted outputs hold the bias already
    changed = {f"{layer.name}.weight": weight.numpy(force=True).copy()}
    if layer.norm is None or layer.norm.running_mean is None:
        if not isinstance(bias, Tensor):
            raise InternalError(f"{layer.name} has neither a norm nor a bias to take an offset")
        bias += torch.from_numpy(offset)
        return {**changed, f"{layer.name}.bias": bias.numpy(force=True).copy()}
    layer.norm.running_mean -= torch.from_numpy(offset)
    return {**changed, f"{layer.norm_name}.running_mean": layer.norm.running_mean.numpy(force=True).copy()}
