"""A plan in plain data, for people and for reports."""

from __future__ import annotations

from collections import Counter
from typing import Any

from engines.sparse3d.plan import FEATURES, Memset, Plan


def describe(plan: Plan) -> dict[str, Any]:
    """What `dm3d-deploy plan inspect` shows; only JSON types.

    buffers (name, kind, offset, bytes), steps (number, kernel, grid or bytes), workspace_bytes, constant_bytes,
    launches, memsets, layers (tiles kept, skipped, and predicted to be multiplied per frame), capacities, inputs and
    outputs, status words, the features that a reader must have, the images by architecture and the CUDA release that
    assembled them, the cost on calibration frames, and what else the planner noted (meta).
    """
    cost, steps, known = plan.meta.get("cost"), _steps(plan), plan.meta.get("assemblers", {})
    memsets = sum(isinstance(step, Memset) for step in plan.steps)
    return {
        "workspace_bytes": plan.workspace_bytes,
        "constant_bytes": len(plan.constants),
        "kernels": len(plan.kernels),
        "launches": len(plan.steps) - memsets,
        "memsets": memsets,
        "launches_of": dict(Counter(str(step["kernel"]) for step in steps)),
        "capacities": dict(plan.capacities),
        "layers": _layers(plan),
        "inputs": {item.name: f"{item.dtype}{list(item.shape)}" for item in plan.inputs},
        "outputs": {item.name: f"{item.dtype}{list(item.shape)}" for item in plan.outputs},
        "status": [{"word": word.name, "kind": word.kind} for word in plan.status.words] if plan.status else [],
        "features": [name for name, bit in FEATURES.items() if plan.features & bit],
        "images": [
            {
                "sm": f"sm_{sm}",
                "kernels": len(cubins),
                "bytes": sum(len(cubin.image) for cubin in cubins),
                "made_by": f"CUDA {known.get(f'sm_{sm}', 'of an unknown release')}",
            }
            for sm, cubins in sorted(plan.cubins.items())
        ],
        "cost": {name: value for name, value in cost.items() if name != "tile_products"} if cost else None,
        "meta": {
            name: value
            for name, value in plan.meta.items()
            if name not in ("cost", "kept", "tile_shapes", "assemblers")
        },
        "buffers": [
            {"name": item.name, "kind": item.kind, "offset": item.offset, "bytes": item.bytes} for item in plan.buffers
        ],
        "steps": steps,
    }


def _steps(plan: Plan) -> list[dict[str, Any]]:
    return [
        {"step": number, "kernel": "memset", "grid": None, "bytes": step.bytes}
        if isinstance(step, Memset)
        else {"step": number, "kernel": plan.kernels[step.kernel].function, "grid": list(step.grid), "bytes": None}
        for number, step in enumerate(plan.steps)
    ]


def _layers(plan: Plan) -> list[dict[str, Any]]:
    tile_shapes, products = plan.meta.get("tile_shapes", {}), plan.meta.get("cost", {}).get("tile_products", {})
    return [
        {
            "name": layer.name,
            "kernel_taps": layer.taps,
            "channels": [layer.in_channels, layer.out_channels],
            "tiles_kept": layer.tiles_kept,
            "tiles_skipped": layer.tiles_total - layer.tiles_kept,
            "stored_tile": tile_shapes.get(layer.name),
            "tile_products": products.get(layer.name),
        }
        for layer in plan.layers
    ]
