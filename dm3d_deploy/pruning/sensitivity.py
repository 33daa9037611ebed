"""What each output cell of a layer counts: the energy of the output's gradient there, and cells drawn by it.

A refit that weighs all cells alike serves those with the largest values, and in a detector trained on crops these lie
where no point is: heat maps of -150, which a sigmoid makes equal to any other no. The gradient says which cells count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

FLOOR = 0.003  # of the mean: what a cell counts that the output does not feel now, and might after a change


def relative(energies: Mapping[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    """Energies of several frames, one array a layer, over their mean: Float16[all cells]; none without a gradient."""
    found = {}
    for name, arrays in energies.items():
        whole = np.concatenate(arrays).astype(np.float64)
        if whole.any():
            found[name] = np.minimum(whole / whole.mean(), np.finfo(np.float16).max).astype(np.float16)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Cells, ascending, and what each counts in a sum; the mean is 1."""

    cells: Int64[np.ndarray, " drawn"]
    weights: Float32[np.ndarray, " drawn"]

    def within(self, start: int, stop: int) -> Drawn:
        """Those of a range of cells, counted from its start."""
        low, high = np.searchsorted(self.cells, (start, stop))
        return Drawn(cells=self.cells[low:high] - start, weights=self.weights[low:high])


def drawn(count: int, limit: int, sensitivity: np.ndarray | None, rng: np.random.Generator) -> Drawn:
    """At most `limit` of `count` cells, so that sums weighted by `weights` stand for sums weighted by sensitivity.

    Half of the weight, its root, lies in how often a cell is drawn and half in what it then counts: few cells with all
    the weight would leave most systems underdetermined. Without replacement by exponential keys (Efraimidis and
    Spirakis 2006). None: all cells count alike.
    """
    weights = np.ones(count) if sensitivity is None else sensitivity.astype(np.float64) + FLOOR
    if count <= limit:
        return Drawn(cells=np.arange(count), weights=(weights / weights.mean()).astype(np.float32))
    roots = np.sqrt(weights)
    keys = rng.exponential(size=count) / roots
    cells = np.sort(np.argpartition(keys, limit)[:limit])
    return Drawn(cells=cells, weights=(roots[cells] / roots[cells].mean()).astype(np.float32))
