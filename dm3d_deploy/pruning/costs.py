"""What each choice costs: multiplications counted, multiplications that hardware runs, or the time of a profile."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from dm3d_deploy.errors import InternalError
from dm3d_deploy.pruning.contracts import Choice, Cost, Layer, Unit

UNIT_OF: dict[Cost, Unit] = {"macs": "macs", "executed": "executed", "latency": "ms"}
LEFT_OUT_WHOLE = ("tile",)  # patterns whose zeros are never multiplied: nominal and executed MACs are the same
TWO_FOUR_SHARE = 0.5


def executed_of_choice(layer: Layer, choice: Choice) -> float:
    """MACs per frame that hardware runs for a choice: `macs.executed_macs` of its mask, known without the mask.

    Dense and unstructured run everything, 2:4 one half, tiles what they keep: whole tiles.
    """
    if choice.ratio == 0 or choice.pattern in ("dense", "unstructured"):
        return layer.macs
    if choice.pattern == "2:4":
        return TWO_FOUR_SHARE * layer.macs
    if choice.pattern in LEFT_OUT_WHOLE:
        return choice.cost
    raise InternalError(f"{layer.name}: nobody said what hardware runs of the pattern '{choice.pattern}'")


def executed_costs(layer: Layer, items: Sequence[Choice]) -> Float64[np.ndarray, " items"]:
    """Executed MACs per frame of each choice of a layer."""
    return np.array([executed_of_choice(layer, item) for item in items])
