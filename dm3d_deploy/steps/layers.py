"""layers.json and its readers: every layer of the detector with its exact multiplications."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from dm3d_deploy.pruning.channels import GroupCurve
from dm3d_deploy.pruning.contracts import Allocation, Budget, Choice, Curve, Kind, Layer, Part
from dm3d_deploy.pruning.narrowed import Narrowing
from dm3d_deploy.stages import RunContext

if TYPE_CHECKING:
    from dm3d_deploy.models.detector import Detector

PARTS_OF_SCOPE = {"backbone": ("3d", "2d"), "model": ("3d", "2d", "head"), "backbone3d": ("3d",)}


def layers_of(detector: Detector, pairs: Sequence[Mapping[str, np.ndarray]]) -> tuple[Layer, ...]:
    """All layers of a detector; `pairs` are each calibration frame's multiplied rows per tap, averaged."""
    from dm3d_deploy.models.detector import dense_positions, prunable_layers

    dense = dense_positions(detector)
    layers = []
    for found in prunable_layers(detector):
        shape = tuple(found.weight.shape)
        if found.kind in ("sparse", "linear"):
            positions = np.stack([frame[found.name] for frame in pairs]).mean(axis=0, dtype=np.float64)
        else:
            positions = np.full(int(np.prod(shape[2:])), float(dense[found.name]))
        layers.append(
            Layer(
                name=found.name,
                part=cast(Part, found.part),
                kind=cast(Kind, found.kind),
                shape=shape,
                positions=np.asarray(positions),
                final=found.final,
            )
        )
    return tuple(layers)


def layers_as_json(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """Plain data."""
    return [
        {
            "name": layer.name,
            "part": layer.part,
            "kind": layer.kind,
            "shape": list(layer.shape),
            "positions": layer.positions.tolist(),
            "final": layer.final,
            "spared_macs": layer.spared_macs,
        }
        for layer in layers
    ]


def read_layers(path: Path) -> tuple[Layer, ...]:
    """The layers that `layers_as_json` wrote."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return tuple(
        Layer(
            name=row["name"], part=row["part"], kind=row["kind"], shape=tuple(row["shape"]),
            positions=np.asarray(row["positions"], dtype=np.float64), final=row["final"],
            spared_macs=row["spared_macs"],
        )
        for row in rows
    )  # fmt: skip


def in_scope(layers: Sequence[Layer], scope: str) -> tuple[Layer, ...]:
    """The layers that the budget counts."""
    return tuple(layer for layer in layers if layer.part in PARTS_OF_SCOPE[scope])


def allocation_as_json(allocation: Allocation) -> dict[str, Any]:
    """Plain data."""
    return {
        "budget": {
            "value": allocation.budget.value,
            "denominator": allocation.budget.denominator,
            "scope": allocation.budget.scope,
            "unit": allocation.budget.unit,
        },
        "cost": allocation.cost,
        "distortion": allocation.distortion,
        "lower_bound": allocation.lower_bound,
        "gap": allocation.gap,
        "share": allocation.share,
        "widths": dict(allocation.widths),
        "dropped": list(allocation.dropped),
        "choices": [
            {
                "layer": c.layer, "pattern": c.pattern, "step": c.step, "ratio": c.ratio, "distortion": c.distortion,
                "cost": c.cost,
            }
            for c in allocation.choices
        ],
    }  # fmt: skip


def read_allocation(path: Path) -> Allocation:
    """The allocation that `allocation_as_json` wrote."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return Allocation(
        choices=tuple(Choice(**choice) for choice in data["choices"]),
        distortion=data["distortion"],
        cost=data["cost"],
        budget=Budget(**data["budget"]),
        lower_bound=data["lower_bound"],
        widths=data["widths"],
        dropped=tuple(data["dropped"]),
    )


def group_curves_as_json(curves: Sequence[GroupCurve]) -> list[dict[str, Any]]:
    """Plain data."""
    return [
        {
            "group": curve.group,
            "order": curve.order.tolist(),
            "widths": curve.widths.tolist(),
            "distortion": curve.distortion.tolist(),
        }
        for curve in curves
    ]


def read_group_curves(path: Path) -> dict[str, GroupCurve]:
    """The curves that `group_curves_as_json` wrote, by group."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return {
        row["group"]: GroupCurve(
            group=row["group"],
            order=np.asarray(row["order"], dtype=np.int64),
            widths=np.asarray(row["widths"], dtype=np.int64),
            distortion=np.asarray(row["distortion"], dtype=np.float64),
        )
        for row in rows
    }


def read_curves(path: Path) -> list[Curve]:
    """The curves that the stage `curves` wrote."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return [
        Curve(
            layer=row["layer"],
            pattern=row["pattern"],
            unit=row["unit"],
            ratio=np.asarray(row["ratio"], dtype=np.float64),
            distortion=np.asarray(row["distortion"], dtype=np.float64),
            cost=np.asarray(row["cost"], dtype=np.float64),
        )
        for row in rows
    ]


def narrowing_of(run: RunContext) -> Narrowing:
    """What the run's allocation leaves of every layer."""
    allocation, curves = read_allocation(run.path("allocation")), read_group_curves(run.path("channels"))
    return Narrowing(read_layers(run.path("layers")), curves, allocation.widths, allocation.dropped)
