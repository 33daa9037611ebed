"""The report's rows of layers: what became of each, why, and what time that can save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dm3d_deploy.pruning.contracts import Layer
from dm3d_deploy.pruning.narrowed import Narrowing

LEFT = "; what is left: "
WHY = {
    "dense": "kept whole: its multiplications are worth more than others'",
    "unstructured": "pruned freely below one half, where no hardware form would save time",
    "2:4": "two of four along the input channels, the form of sparse tensor cores",
    "tile": "whole tiles of (offset, input channels, output channels), which a sparse 3D engine can skip",
    "channel": "whole channels, removed from the files: nothing multiplies them any more",
    "depth": "in a residual block of which the identity is left",
}
WHY_UNSTRUCTURED_MODE = "pruned freely, as the paper does: saves nominal multiplications, no time on hardware"


def layer_rows(patterns: str, found: Mapping[str, Any], narrow: Narrowing) -> list[dict[str, Any]]:
    """`layers` of report.json, in the network's order; `patterns` are the recipe's, `found` the run's JSON by kind."""
    choices = {row["layer"]: row for row in found["allocation"]["choices"]}
    masks = {row["layer"]: row for row in found["masks_info"]}
    verdicts = verdicts_by_layer(found["export_info"]["sparsity"])
    rows = []
    for layer in narrow.layers:
        if layer.name not in choices:
            continue
        mask = masks[layer.name]
        pattern = _pattern(layer, mask, narrow)
        free = patterns == "unstructured" and pattern == "unstructured"
        rows.append(
            {
                "name": layer.name,
                "part": layer.part,
                "kind": layer.kind,
                "weights": layer.weights,
                "dense_macs": mask["dense_macs"],
                "kept_macs": mask["kept_macs"],
                "executed_macs": mask["executed_macs"],
                "ratio": 1 - mask["kept_weights"] / layer.weights,
                "pattern": pattern,
                "distortion": choices[layer.name]["distortion"],
                "why": WHY_UNSTRUCTURED_MODE if free else LEFT.join(WHY[part] for part in pattern.split(" + ")),
                "legal_2_4": mask["legal_2_4"],
                "gain": LEFT.join(_gain(part, verdicts.get(layer.name)) for part in pattern.split(" + ")),
            }
        )
    return rows


def _pattern(layer: Layer, mask: Mapping[str, Any], narrow: Narrowing) -> str:
    """The mask's pattern; of a layer that lost channels `channel`, with the pattern of what is left if it prunes."""
    if narrow.gone(layer) or not narrow.touches(layer):
        return str(mask["pattern"])
    return "channel" if mask["kept_weights"] == narrow.of(layer).weights else f"channel + {mask['pattern']}"


def verdicts_by_layer(verdicts: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """By the layer that holds the weight; packed head branches (exporters.head_merge) share one verdict."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in verdicts:
        name = row["weight"].removesuffix(".weight")
        if not name.endswith(".hidden"):
            found[name] = row
            continue
        for output in name.removesuffix(".hidden").split("+"):
            branch, task = output.rsplit("_", 1)
            found[f"dense_head.heads_list.{task}.{branch}.0.0"] = row
    return found


def _gain(pattern: str, verdict: Mapping[str, Any] | None) -> str:
    if pattern == "2:4" and verdict is not None:
        if verdict["expected_gain"]:
            return "a device may gain: wide enough for sparse tensor cores; not measured"
        return str(verdict["reason"])
    if pattern == "tile":
        return "skipped tiles are not computed by a sparse 3D engine; not measured"
    if pattern in ("channel", "depth"):
        return "not in the exported files any more, on any device"
    return "none" if pattern == "dense" else "none: zeros among weights that are all multiplied"
