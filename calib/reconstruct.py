"""Refits the kept weights layer by layer: the pruned detector and the dense one walk through the frames side by side.

Each layer's inputs come from the pruned detector with all earlier layers already refitted, its wanted outputs from the
dense one, so what earlier layers still get wrong is made good as far as this layer can. One forward pass of both.
Cells count by how much the detector's output feels them (pruning.sensitivity).
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.nn import functional

from calib.scenes import read_scenes
from dm3d_deploy.errors import InternalError
from dm3d_deploy.models.checkpoints import load_checkpoint
from dm3d_deploy.models.detector import Detector, PrunableLayer, build_detector, prunable_layers
from dm3d_deploy.models.sparse import SparseConvolution, SparseTensor
from dm3d_deploy.models.voxel_pruning import choosing_layers
from dm3d_deploy.pruning.reconstruction import Moments, refit
from dm3d_deploy.pruning.sensitivity import Drawn, drawn

CHUNK_ROWS = 4096


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
    features, coords = _batch(Path(settings["frames_file"]), settings["frames"])
    with safe_open(settings["masks"], framework="np") as file:
        masks = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file, not a mapping
    scenes = read_scenes(detector.config, Path(settings["frames_file"]), settings["frames"], settings.get("rois"))
    own = choosing_layers(detector)  # the dense detector's rows are other voxels
    layers = [layer for layer in prunable_layers(detector) if layer.name in masks and layer.name not in own]
    samples = _Samples(
        rows_per_input=int(settings["rows_per_input"]),
        seed=int(settings["seed"]),
        sensitivity=load_file(settings["sensitivity"]),
    )
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

            handles.append(layer.module.register_forward_pre_hook(refit_now))
        run(detector)
        for handle in handles:
            handle.remove()
    return changed


def _batch(frames_file: Path, frames: list[int]) -> tuple[Tensor, Tensor]:
    """Features and coordinates of several frames as one batch."""
    features, coords = [], []
    with safe_open(frames_file, framework="np") as file:
        for index, frame in enumerate(frames):
            features.append(torch.from_numpy(file.get_tensor(f"{frame}.features")))
            cells = torch.from_numpy(file.get_tensor(f"{frame}.coords").astype(np.int64))
            cells[:, 0] = index
            coords.append(cells)
    return torch.cat(features), torch.cat(coords)


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

            return hook

        handles = [self._model.get_submodule(name).register_forward_hook(told(name)) for name in self._names]
        try:
            with torch.no_grad():
                self._run(self._model)
        except (InternalError, RuntimeError) as error:  # raised again by whoever waits
            self._outputs.put(("", error))
        finally:
            for handle in handles:
                handle.remove()


class _Samples:
    """Rows of a layer's inputs and wanted outputs: as many output cells as bound time and memory."""

    def __init__(self, *, rows_per_input: int, seed: int, sensitivity: Mapping[str, np.ndarray]) -> None:
        self._rows_per_input, self._seed, self._sensitivity = rows_per_input, seed, sensitivity

    def moments(self, layer: PrunableLayer, x: Any, wanted: Any, order: int) -> Moments:
        """Sums over the drawn rows."""
        inputs, outputs = _matrix(layer.weight.numpy(force=True), layer).shape
        rng = np.random.Generator(np.random.PCG64([self._seed, order]))
        felt, count = self._sensitivity.get(layer.name), _cell_count(layer.kind, x, wanted)
        if felt is not None and len(felt) != count:
            raise InternalError(f"{layer.name} computed {count} cells where its sensitivity is known at {len(felt)}")
        cells = drawn(count, self._rows_per_input * inputs, felt, rng)
        moments = Moments.empty(inputs, outputs)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # a chunk's sums are one thread's, and are added in order
            for part in pool.map(_moments_of, ROWS_OF[layer.kind](layer.module, x, wanted, cells)):
                moments.add(part)
        return moments


def _moments_of(chunk: tuple[Tensor, Tensor, np.ndarray]) -> Moments:
    rows, wanted, weights = chunk
    return Moments.of(rows.numpy(), wanted.numpy(), weights)


def _cell_count(kind: str, x: Any, wanted: Any) -> int:
    """Of a transposed convolution the inputs, each with its block of outputs; of any other layer the outputs."""
    if kind == "sparse":
        return len(wanted.features)
    if kind == "linear":
        return len(x)
    images: Tensor = x if kind == "deconv2d" else wanted
    return images[:, 0].numel()


Rows = Iterator[tuple[Tensor, Tensor, np.ndarray]]


def _sparse_rows(conv: SparseConvolution, x: SparseTensor, wanted: SparseTensor, cells: Drawn) -> Rows:
    kernel_map = conv.kernel_map(x)
    for start in range(0, len(cells.cells), CHUNK_ROWS):
        chunk = torch.from_numpy(cells.cells[start : start + CHUNK_ROWS])
        place = torch.full((len(wanted.features),), -1)
        place[chunk] = torch.arange(len(chunk))
        rows = x.features.new_zeros(len(chunk), kernel_map.taps, x.features.shape[1])
        for tap in range(kernel_map.taps):
            at = place[kernel_map.out_rows[tap]]
            hit = at >= 0
            rows[at[hit], tap] = x.features[kernel_map.in_rows[tap][hit]]
        yield rows.flatten(1), wanted.features[chunk], cells.weights[start : start + CHUNK_ROWS]


def _conv_rows(conv: nn.Conv2d, x: Tensor, wanted: Tensor, cells: Drawn) -> Rows:
    size = wanted[0, 0].numel()
    for number, image in enumerate(x):
        part = cells.within(number * size, (number + 1) * size)
        columns = functional.unfold(image[None], conv.kernel_size, padding=conv.padding, stride=conv.stride)[0]  # type: ignore[arg-type]
        yield columns[:, part.cells].t().contiguous(), wanted[number].flatten(1)[:, part.cells].t(), part.weights


def _deconv_rows(conv: nn.ConvTranspose2d, x: Tensor, wanted: Tensor, cells: Drawn) -> Rows:
    size = x[0, 0].numel()
    for number, image in enumerate(x):
        part = cells.within(number * size, (number + 1) * size)
        blocks = functional.pixel_unshuffle(wanted[number][None], conv.stride[0])[0].flatten(1)
        yield image.flatten(1)[:, part.cells].t(), blocks[:, part.cells].t(), part.weights


def _linear_rows(_: nn.Linear, x: Tensor, wanted: Tensor, cells: Drawn) -> Rows:
    for start in range(0, len(cells.cells), CHUNK_ROWS):
        chunk = cells.cells[start : start + CHUNK_ROWS]
        yield x[chunk], wanted[chunk], cells.weights[start : start + CHUNK_ROWS]


ROWS_OF: Mapping[str, Callable[..., Rows]] = {
    "sparse": _sparse_rows,
    "linear": _linear_rows,
    "conv2d": _conv_rows,
    "deconv2d": _deconv_rows,
}


def _matrix(array: np.ndarray, layer: PrunableLayer) -> np.ndarray:
    """A weight or its mask as [inputs, outputs] of the rows above."""
    if layer.pointwise:
        return array.reshape(layer.read_shape[0], -1)
    return array.reshape(len(array), -1) if layer.kind == "deconv2d" else array.reshape(len(array), -1).T


def _refitted(layer: PrunableLayer, moments: Moments, keep: np.ndarray, damping: float) -> dict[str, np.ndarray]:
    """Put the new weights into the layer and the offset into the norm behind it; returns both by tensor name."""
    weight = layer.weight
    old = weight.numpy(force=True)
    found = refit(moments, _matrix(old, layer), _matrix(keep, layer), damping=damping)
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
