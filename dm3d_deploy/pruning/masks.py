"""From choices to masks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from dm3d_deploy.errors import InternalError
from dm3d_deploy.pruning.contracts import Allocation, Choice, Layer, WeightMask
from dm3d_deploy.pruning.macs import kept_macs
from dm3d_deploy.pruning.patterns import prune_step


def mask_of(layer: Layer, scores: Float[np.ndarray, "*shape"], choice: Choice) -> WeightMask:
    """The mask that a choice stands for; `scores` are those that its curve was made from."""
    if choice.layer != layer.name:
        raise InternalError(f"the choice for {choice.layer} is no choice for {layer.name}")
    if choice.pattern == "dense":
        keep = np.ones(layer.shape, dtype=np.bool_)
    else:
        keep = prune_step(layer, scores, choice.pattern, (choice.ratio,)) > 0
    kept = kept_macs(layer, keep)
    if not math.isclose(kept, choice.cost, rel_tol=1e-12):
        raise InternalError(f"{layer.name}: the mask keeps {kept:.17g} MACs, its choice counted {choice.cost:.17g}")
    return WeightMask(layer=layer.name, pattern=choice.pattern, keep=keep)


def masks_of(
    layers: Sequence[Layer], scores: Mapping[str, Float[np.ndarray, "*shape"]], allocation: Allocation
) -> tuple[WeightMask, ...]:
    """The masks of an allocation, in its order; `scores` by layer name."""
    by_name = {layer.name: layer for layer in layers}
    return tuple(mask_of(by_name[choice.layer], scores[choice.layer], choice) for choice in allocation.choices)
