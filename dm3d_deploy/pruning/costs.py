"""What each choice costs: multiplications counted, multiplications that hardware runs, or the time of a profile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from dm3d_deploy.errors import InternalError
from dm3d_deploy.pruning.contracts import Choice, Cost, Layer, Unit
from dm3d_deploy.pruning.profiles import LayerTimes, Profile

UNIT_OF: dict[Cost, Unit] = {"macs": "macs", "executed": "executed", "latency": "ms"}
# What is never multiplied: nominal and executed MACs are the same.
LEFT_OUT_WHOLE = ("tile", "channel", "depth")
TWO_FOUR_SHARE = 0.5


def executed_of_choice(layer: Layer, choice: Choice) -> float:
    """MACs per frame that hardware runs for a choice: `macs.executed_macs` of its mask, known without the mask.

    Dense and unstructured run everything, 2:4 one half; tiles, channels and blocks go whole.
    """
    if choice.pattern in ("dense", "unstructured") or (choice.ratio == 0 and choice.pattern in ("2:4", "tile")):
        return layer.macs
    if choice.pattern == "2:4":
        return TWO_FOUR_SHARE * layer.macs
    if choice.pattern in LEFT_OUT_WHOLE:
        return choice.cost
    raise InternalError(f"{layer.name}: nobody said what hardware runs of the pattern '{choice.pattern}'")


def executed_costs(layer: Layer, items: Sequence[Choice]) -> Float64[np.ndarray, " items"]:
    """Executed MACs per frame of each choice of a layer."""
    return np.array([executed_of_choice(layer, item) for item in items])


def time_costs(times: LayerTimes, layer: Layer, items: Sequence[Choice]) -> Float64[np.ndarray, " items"]:
    """Milliseconds of each choice of a layer, by a profile."""
    return np.array([_ms(times, layer, item) for item in items])


def _ms(times: LayerTimes, layer: Layer, item: Choice) -> float:
    return times.ms(item.pattern, executed_of_choice(layer, item) / layer.macs if layer.macs > 0 else 1.0)


def planned_time(profile: Profile, layers: Sequence[Layer], choices: Sequence[Choice]) -> dict[str, Any]:
    """What a profile says of the dense network and of one allocation, by part, as plain data with its label."""
    by_name = {layer.name: layer for layer in layers}
    chosen = {choice.layer: choice for choice in choices}
    parts: dict[str, dict[str, Any]] = {
        part: {"dense_ms": 0.0, "planned_ms": 0.0, "fixed_ms": 0.0, "band": profile.band.get(part)}
        for part in dict.fromkeys([*profile.fixed_ms, *(times.part for times in profile.layers)])
    }
    for part, ms in profile.fixed_ms.items():
        for column in ("dense_ms", "planned_ms", "fixed_ms"):
            parts[part][column] += ms
    for times in profile.layers:
        choice = chosen.get(times.layer)
        planned = times.dense_ms if choice is None else _ms(times, by_name[times.layer], choice)
        parts[times.part]["dense_ms"] += times.dense_ms
        parts[times.part]["planned_ms"] += planned
    return {
        "label": profile.label,
        "standing": profile.standing,
        "device": profile.device,
        "clock": profile.clock,
        "precision": profile.precision,
        "voxels": profile.voxels,
        "sha256": profile.digest(),
        "dense_ms": sum(row["dense_ms"] for row in parts.values()),
        "planned_ms": sum(row["planned_ms"] for row in parts.values()),
        "by_part": parts,
        "stamp": dict(profile.stamp),
        "notes": list(profile.notes),
    }
