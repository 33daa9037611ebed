"""Which channels of which layers are one: coupled by residual additions, concatenations and the height compression.

A group's channel can only go as a whole: as an output of every layer that writes it and as an input of every layer that
reads it. The graph follows from the layers' names and order, which are OpenPCDet's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool

from dm3d_deploy.errors import InternalError
from dm3d_deploy.pruning.contracts import Layer

Keep = Mapping[str, Bool[np.ndarray, " channels"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Where a group lies among one layer's inputs or outputs: channel c is at offset + c * repeat and what follows.

    `repeat` is 1, or the height of the last sparse stage, whose channel c becomes the map's channels c * height + z.
    """

    layer: str
    offset: int = 0
    repeat: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelGroup:
    """Coupled channels, named after the layer that writes them first; `block` is the residual block they lie inside."""

    name: str
    channels: int
    written: tuple[Slot, ...]
    read: tuple[Slot, ...]
    block: str | None = None


@dataclass(slots=True)
class _Stream:
    """A group in the making, and where it lies in a concatenation."""

    group: int
    offset: int
    repeat: int


class _Walk:
    """Follows the layers in forward order; `stream` is what the next layer reads."""

    def __init__(self) -> None:
        self.groups: list[ChannelGroup] = []
        self.stream: list[_Stream] = []

    def read(self, layer: Layer, stream: Sequence[_Stream]) -> None:
        widths = sum(self.groups[one.group].channels * one.repeat for one in stream)
        if stream and widths != layer.inputs:
            raise InternalError(f"{layer.name} reads {layer.inputs} channels, its sources write {widths}")
        for one in stream:
            group = self.groups[one.group]
            slot = Slot(layer=layer.name, offset=one.offset, repeat=one.repeat)
            self.groups[one.group] = replace(group, read=(*group.read, slot))

    def write(self, layer: Layer, *, block: str | None = None) -> list[_Stream]:
        slot = Slot(layer=layer.name)
        self.groups.append(ChannelGroup(name=layer.name, channels=layer.outputs, written=(slot,), read=(), block=block))
        return [_Stream(len(self.groups) - 1, 0, 1)]

    def add(self, layer: Layer, stream: Sequence[_Stream]) -> None:
        """The layer's outputs are added to a stream: they join its group."""
        (one,) = stream
        group = self.groups[one.group]
        if group.channels != layer.outputs:
            raise InternalError(f"{layer.name} adds {layer.outputs} channels to {group.channels}")
        self.groups[one.group] = replace(group, written=(*group.written, Slot(layer=layer.name)))

    def through(self, layer: Layer) -> None:
        """Read the stream; what the layer writes is the stream behind it."""
        self.read(layer, self.stream)
        self.stream = self.write(layer)


ADDED_UP = ("conv4", "conv5", "conv6")
SECOND_STAGE = ("pfe.", "point_head.", "roi_head.")


def channel_groups(layers: Sequence[Layer]) -> tuple[ChannelGroup, ...]:
    """The groups of a detector from its layers in forward order; what no layer reads (final outputs) is in none.

    A second stage stays whole, and so do the channels that it reads: those behind each stage of the sparse backbone.
    Where stages are added up (VoxelNeXt) the sum keeps its channels, and so does what the head reads.
    """
    first = [layer for layer in layers if not layer.name.startswith(SECOND_STAGE)]
    groups = _walked(first)
    last = {layer.name.split(".")[1]: layer.name for layer in first if layer.part == "3d"}
    whole = set(last.values()) if len(first) < len(layers) else set()
    if ADDED_UP[-1] in last:
        whole = {last[stage] for stage in ADDED_UP}
    return tuple(group for group in groups if not whole & {slot.layer for slot in group.written})


def _walked(layers: Sequence[Layer]) -> tuple[ChannelGroup, ...]:
    walk = _Walk()
    inner: list[_Stream] = []
    for layer in (layer for layer in layers if layer.part == "3d" and layer.kind != "linear"):  # pillars stay whole
        if layer.name.endswith(".conv1"):
            walk.read(layer, walk.stream)
            inner = walk.write(layer, block=layer.name.removesuffix(".conv1"))
        elif layer.name.endswith(".conv2"):
            walk.read(layer, inner)
            walk.add(layer, walk.stream)
        else:
            walk.through(layer)
    _height_compression(walk, layers)
    levels: list[_Stream] = []
    for layer in (layer for layer in layers if layer.part == "2d"):
        if ".deblocks." in layer.name:
            walk.read(layer, walk.stream)
            (made,) = walk.write(layer)
            levels.append(_Stream(made.group, sum(walk.groups[one.group].channels for one in levels), 1))
        else:
            walk.through(layer)
    walk.stream = levels
    _head(walk, [layer for layer in layers if layer.part == "head"])
    return tuple(group for group in walk.groups if group.read)


def _height_compression(walk: _Walk, layers: Sequence[Layer]) -> None:
    flat = next((layer for layer in layers if layer.part == "2d"), None)
    if not walk.stream or flat is None:
        return
    (one,) = walk.stream
    channels = walk.groups[one.group].channels
    if flat.inputs % channels:
        raise InternalError(f"{flat.name} reads {flat.inputs} channels, no multiple of the {channels} that are written")
    one.repeat = flat.inputs // channels


def _head(walk: _Walk, layers: Sequence[Layer]) -> None:
    """Branches start from what comes before them: the shared convolution, or the concatenated maps themselves."""
    shared, branch = walk.stream, ""
    for layer in layers:
        words = layer.name.split(".")
        own = ".".join(words[:4]) if "heads_list" in words else ""
        if own != branch:
            branch, walk.stream = own, shared
        if layer.final:
            walk.read(layer, walk.stream)
            walk.stream = shared
        else:
            walk.through(layer)
        if not own and not layer.final:
            shared = walk.stream


def kept_sides(
    layer: Layer, groups: Iterable[ChannelGroup], keep: Keep
) -> tuple[Bool[np.ndarray, " inputs"], Bool[np.ndarray, " outputs"]]:
    """Which inputs and outputs of a layer stay; `keep` holds the groups that lose channels, by name."""
    inputs, outputs = np.ones(layer.inputs, np.bool_), np.ones(layer.outputs, np.bool_)
    for group in groups:
        if group.name not in keep:
            continue
        for side, slots in ((inputs, group.read), (outputs, group.written)):
            for slot in slots:
                if slot.layer == layer.name:
                    stop = slot.offset + group.channels * slot.repeat
                    side[slot.offset : stop] = np.repeat(keep[group.name], slot.repeat)
    return inputs, outputs
