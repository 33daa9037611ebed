"""A plan in plain data, for people and for reports."""

from __future__ import annotations

from collections import Counter
from typing import Any

from engines.sparse3d.plan import FEATURES, Memset, Plan


def describe(plan: Plan) -> dict[str, Any]:
    """What `dm3d-deploy plan inspect` shows; only JSON types.

    buffers (name, kind, offset, bytes), steps (number, kernel, grid), workspace_bytes, constant_bytes, launches,
    memsets, layers (tiles kept and skipped), capacities, inputs and outputs, status words, the features that a reader
    must have, the architectures that kernels are compiled for, and what the planner noted (meta, its cost apart).
    """
    steps = [
        {"step": number, "kernel": "memset", "bytes": step.bytes}
        if isinstance(step, Memset)
        else {"step": number, "kernel": plan.kernels[step.kernel].function, "grid": list(step.grid)}
        for number, step in enumerate(plan.steps)
    ]
    memsets = sum(isinstance(step, Memset) for step in plan.steps)
    return {
        "workspace_bytes": plan.workspace_bytes,
        "constant_bytes": len(plan.constants),
        "kernels": len(plan.kernels),
        "launches": len(plan.steps) - memsets,
        "memsets": memsets,
        "launches_of": dict(Counter(str(step["kernel"]) for step in steps)),
        "capacities": dict(plan.capacities),
        "layers": [
            {
                "name": layer.name,
                "kernel_taps": layer.taps,
                "channels": [layer.in_channels, layer.out_channels],
                "tiles_kept": layer.tiles_kept,
                "tiles_skipped": layer.tiles_total - layer.tiles_kept,
            }
            for layer in plan.layers
        ],
        "inputs": {item.name: f"{item.dtype}{list(item.shape)}" for item in plan.inputs},
        "outputs": {item.name: f"{item.dtype}{list(item.shape)}" for item in plan.outputs},
        "status": [word.name for word in plan.status.words] if plan.status else [],
        "features": [name for name, bit in FEATURES.items() if plan.features & bit],
        "compiled_for": [f"sm_{sm}" for sm in sorted(plan.cubins)],
        "cost": plan.meta.get("cost"),
        "meta": {name: value for name, value in plan.meta.items() if name not in ("cost", "kept")},
        "buffers": [
            {"name": item.name, "kind": item.kind, "offset": item.offset, "bytes": item.bytes} for item in plan.buffers
        ],
        "steps": steps,
    }
