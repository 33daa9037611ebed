"""From choices to masks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

from dm3d_deploy.errors import InternalError
from dm3d_deploy.pruning.channels import GroupCurve
from dm3d_deploy.pruning.contracts import Allocation, Choice, Layer, WeightMask
from dm3d_deploy.pruning.macs import kept_macs
from dm3d_deploy.pruning.narrowed import Narrowing
from dm3d_deploy.pruning.patterns import prune_step


def mask_of(layer: Layer, scores: Float[np.ndarray, "*shape"], choice: Choice) -> WeightMask:
    """The mask that a choice stands for; `scores` are those that its curve was made from."""
    if choice.layer != layer.name:
        raise InternalError(f"the choice for {choice.layer} is no choice for {layer.name}")
    if choice.pattern in ("channel", "dense"):
        keep = np.ones(layer.shape, dtype=np.bool_)
    else:
        keep = prune_step(layer, scores, choice.pattern, (choice.ratio,)) > 0
    kept = kept_macs(layer, keep)
    if not math.isclose(kept, choice.cost, rel_tol=1e-12):
        raise InternalError(f"{layer.name}: the mask keeps {kept:.17g} MACs, its choice counted {choice.cost:.17g}")
    return WeightMask(layer=layer.name, pattern=choice.pattern, keep=keep)


def masks_of(
    layers: Sequence[Layer],
    scores: Mapping[str, Float[np.ndarray, "*shape"]],
    allocation: Allocation,
    curves: Mapping[str, GroupCurve],
) -> tuple[WeightMask, ...]:
    """The masks of an allocation, in its order, then those of layers that only lose channels.

    `scores` by layer name; `curves` of the groups say which channels a width keeps. Patterns rule what is left of a
    layer between its kept channels; masks have the whole layer's shape.
    """
    narrow = Narrowing(layers, curves, allocation.widths, allocation.dropped)
    by_name = {layer.name: layer for layer in layers}
    masks = []
    for choice in allocation.choices:
        layer = by_name[choice.layer]
        kept = np.ones(0, np.bool_)
        if not narrow.gone(layer):
            free = choice.pattern in ("channel", "dense")
            own = np.zeros(narrow.of(layer).shape) if free else narrow.take(layer, scores[layer.name])
            kept = mask_of(narrow.of(layer), own, choice).keep
        masks.append(WeightMask(layer=layer.name, pattern=choice.pattern, keep=narrow.whole(layer, kept)))
    chosen = {choice.layer for choice in allocation.choices}
    for layer in layers:
        if layer.name not in chosen and narrow.touches(layer):
            kept = narrow.whole(layer, np.ones(narrow.of(layer).shape, np.bool_))
            masks.append(WeightMask(layer=layer.name, pattern="channel", keep=kept))
    return tuple(masks)


def masked_state(
    state: Mapping[str, np.ndarray], masks: Mapping[str, Bool[np.ndarray, "*shape"]]
) -> dict[str, np.ndarray]:
    """A detector's tensors with masked weights at zero.

    A residual block whose second convolution keeps nothing is to be its identity: the norm behind adds nothing either.
    """
    masked = {**state, **{f"{name}.weight": state[f"{name}.weight"] * keep for name, keep in masks.items()}}
    for name, keep in masks.items():
        if name.endswith(".conv2") and not keep.any():
            for part in ("weight", "bias"):
                norm = f"{name.removesuffix('conv2')}bn2.{part}"
                masked[norm] = np.zeros_like(masked[norm])
    return masked
