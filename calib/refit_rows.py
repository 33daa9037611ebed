"""Rows of a layer's inputs and outputs, drawn where the detector's output feels them: what a refit learns from."""

from __future__ import annotations

import os
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

from dm3d_deploy.errors import InternalError
from dm3d_deploy.models.detector import PrunableLayer
from dm3d_deploy.models.sparse import SparseConvolution, SparseTensor
from dm3d_deploy.pruning.reconstruction import Moments
from dm3d_deploy.pruning.sensitivity import Drawn, drawn

CHUNK_ROWS = 4096


class EndOfWalk(Exception):
    """Raised behind the last layer that a walk is for: heads and second stages further on would be run for nothing."""


def silent(layers: int, of: int) -> None:
    """Tells nobody how far a walk is."""


def batch_of(frames_file: Path, frames: list[int]) -> tuple[Tensor, Tensor]:
    """Features and coordinates of several frames as one batch."""
    features, coords = [], []
    with safe_open(frames_file, framework="np") as file:
        for index, frame in enumerate(frames):
            features.append(torch.from_numpy(file.get_tensor(f"{frame}.features")))
            cells = torch.from_numpy(file.get_tensor(f"{frame}.coords").astype(np.int64))
            cells[:, 0] = index
            coords.append(cells)
    return torch.cat(features), torch.cat(coords)


class Samples:
    """Rows of a layer's inputs and wanted outputs: as many output cells as bound time and memory."""

    def __init__(self, *, rows_per_input: int, seed: int, sensitivity: Mapping[str, np.ndarray]) -> None:
        self._rows_per_input, self._seed, self._sensitivity = rows_per_input, seed, sensitivity

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Samples:
        """As a job's settings say: `rows_per_input`, `seed`, `sensitivity` (a path)."""
        felt = load_file(settings["sensitivity"])
        return cls(rows_per_input=int(settings["rows_per_input"]), seed=int(settings["seed"]), sensitivity=felt)

    def moments(self, layer: PrunableLayer, x: Any, wanted: Any, order: int) -> Moments:
        """Sums over the drawn rows."""
        inputs, outputs = matrix_of(layer.weight.numpy(force=True), layer).shape
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


def matrix_of(array: np.ndarray, layer: PrunableLayer) -> np.ndarray:
    """A weight or its mask as [inputs, outputs] of the rows above."""
    if layer.pointwise:
        return array.reshape(layer.read_shape[0], -1)
    return array.reshape(len(array), -1) if layer.kind == "deconv2d" else array.reshape(len(array), -1).T
