"""A detector's layers behind a choice of widths and dropped blocks: their shapes, their weights, their masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
from jaxtyping import Bool

from dm3d_deploy.pruning.channels import GroupCurve
from dm3d_deploy.pruning.contracts import Layer
from dm3d_deploy.pruning.groups import channel_groups, kept_sides
from dm3d_deploy.pruning.patterns import native_from_taps, taps_from_native

Sides = tuple[Bool[np.ndarray, " inputs"], Bool[np.ndarray, " outputs"]]


class Narrowing:
    """What is left of each layer; `widths` holds the groups that lose channels, `dropped` the blocks that go."""

    def __init__(
        self,
        layers: Sequence[Layer],
        curves: Mapping[str, GroupCurve],
        widths: Mapping[str, int],
        dropped: Sequence[str] = (),
    ) -> None:
        self.layers = tuple(layers)
        self.keep = {name: curves[name].keep(width) for name, width in widths.items()}
        self.dropped = tuple(dropped)

    @cached_property
    def sides(self) -> dict[str, Sides]:
        """Kept inputs and outputs of every layer that loses some."""
        if not self.keep:
            return {}
        groups = channel_groups(self.layers)
        found = {layer.name: kept_sides(layer, groups, self.keep) for layer in self.layers}
        return {name: sides for name, sides in found.items() if not (sides[0].all() and sides[1].all())}

    def gone(self, layer: Layer) -> bool:
        """Whether the layer lies in a block that goes."""
        return any(layer.name.startswith(f"{block}.") for block in self.dropped)

    def touches(self, layer: Layer) -> bool:
        """Whether the layer loses channels or goes."""
        return self.gone(layer) or layer.name in self.sides

    def of(self, layer: Layer) -> Layer:
        """The layer at its kept channels."""
        if layer.name not in self.sides:
            return layer
        kept = self.take(layer, np.broadcast_to(np.True_, layer.shape))
        return replace(layer, shape=kept.shape)

    def take(self, layer: Layer, array: np.ndarray) -> np.ndarray:
        """The part of an array of the layer's native shape that lies between kept channels."""
        if layer.name not in self.sides:
            return array
        inputs, outputs = self.sides[layer.name]
        taps = taps_from_native(layer, array)[:, inputs][:, :, outputs]
        return native_from_taps(_resized(layer, taps), taps)

    def whole(self, layer: Layer, keep: Bool[np.ndarray, "*kept"]) -> Bool[np.ndarray, "*shape"]:
        """A mask of the kept channels as one of the whole layer; all of it is gone in a block that goes."""
        if self.gone(layer):
            return np.zeros(layer.shape, np.bool_)
        if layer.name not in self.sides:
            return keep
        inputs, outputs = self.sides[layer.name]
        taps = np.zeros((layer.taps, layer.inputs, layer.outputs), np.bool_)
        taps[np.ix_(np.arange(layer.taps), inputs, outputs)] = taps_from_native(self.of(layer), keep)
        return native_from_taps(layer, taps)


def _resized(layer: Layer, taps: np.ndarray) -> Layer:
    _, inputs, outputs = taps.shape
    shape = {
        "sparse": (outputs, *layer.kernel, inputs),
        "linear": (outputs, inputs),
        "conv2d": (outputs, inputs, *layer.kernel),
        "deconv2d": (inputs, outputs, *layer.kernel),
    }[layer.kind]
    return replace(layer, shape=shape)
