"""How much a detector's output feels each output cell of each layer: gradients' energies, gathered by hooks."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional

from dm3d_deploy.models.detector import Detector, prunable_layers
from dm3d_deploy.models.sparse import SparseTensor

SPATIAL = ("sparse", "conv2d", "deconv2d")


class CellEnergies:
    """While open: sums the squared gradient of every backward pass over the channels of each layer's output cells."""

    def __init__(self, detector: Detector, names: list[str]) -> None:
        self._layers = [layer for layer in prunable_layers(detector) if layer.name in names and layer.kind in SPATIAL]
        self._found: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> CellEnergies:
        self._handles = [layer.module.register_forward_hook(self._hook(layer.name)) for layer in self._layers]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def arrays(self) -> dict[str, np.ndarray]:
        """cells.LAYER -> Float32[cells] of one frame; a transposed convolution's cells are its inputs'."""
        return {
            f"cells.{layer.name}": _at_inputs(layer.module, self._found[layer.name]).flatten().numpy()
            for layer in self._layers
            if layer.name in self._found
        }

    def _hook(self, name: str) -> Any:
        def told(_: nn.Module, __: Any, output: Any) -> None:
            values = output.features if isinstance(output, SparseTensor) else output

            def felt(gradient: Tensor) -> None:
                energy = gradient.square().sum(dim=1)
                self._found[name] = self._found[name] + energy if name in self._found else energy

            values.register_hook(felt)

        return told


def _at_inputs(module: nn.Module, energy: Tensor) -> Tensor:
    """Kernel and stride of a transposed convolution are equal, so each input cell owns a block of outputs."""
    if not isinstance(module, nn.ConvTranspose2d):
        return energy
    return functional.avg_pool2d(energy[:, None], module.stride, divisor_override=1)
