"""Executed multiplications counted from a run's files, and held against what its allocation claims.

    python -m dm3d_deploy.executed RUN

From bev_head.onnx: the shapes of the weights, and half of them where every four neighbours along the input channels
hold two at most. From backbone3d.onnx by the packing of the 3D plan: the tiles that are stored. Nothing is read of the
allocation but its claim; how often a weight is multiplied is the calibration frames' (layers.json).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dm3d_deploy.errors import VerificationFailed
from dm3d_deploy.pruning.macs import macs_of_counts
from dm3d_deploy.pruning.patterns import tile_size, tile_weights, tiles_kept
from dm3d_deploy.stages import FILES
from dm3d_deploy.steps.layers import PARTS_OF_SCOPE, read_layers
from engines.sparse3d.onnx_reader import read_backbone
from engines.sparse3d.packing import tiled_weights
from engines.sparse3d.plan_file import read_plan
from exporters.graph_checks import sparsity_of

CHOSEN_BY_THE_BUILDER = "2:4 legal; whether a builder chooses it is not measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Executed:
    """One layer: dense MACs, those that its files leave to execute, those that the allocation claims, and how."""

    layer: str
    dense_macs: float
    found_macs: float
    claimed_macs: float
    how: str


def executed_in(root: Path) -> tuple[Executed, ...]:
    """Every layer of the scope; VerificationFailed where the files leave more to execute than was claimed."""
    recipe = json.loads((root / FILES["allocation"]).read_text(encoding="utf-8"))["budget"]["scope"]
    claims = {row["layer"]: row for row in json.loads((root / FILES["masks_info"]).read_text(encoding="utf-8"))}
    found = {**dict(_sparse(root)), **dict(_dense(root))}
    rows = []
    for layer in read_layers(root / FILES["layers"]):
        if layer.part not in PARTS_OF_SCOPE[recipe] or layer.part == "head":
            continue
        counts, how = found.get(layer.name, (np.zeros(layer.taps), "not in the files"))
        claim = claims[layer.name]
        rows.append(
            Executed(
                layer=layer.name,
                dense_macs=layer.dense_macs,
                found_macs=float(macs_of_counts(layer, counts)),
                claimed_macs=claim["executed_macs"],
                how=how,
            )
        )
    more = [row for row in rows if row.found_macs > row.claimed_macs * (1 + 1e-9)]
    if more or not rows:
        worst = max(more, key=lambda row: row.found_macs - row.claimed_macs, default=None)
        told = f"first {worst.layer}: {worst.found_macs:.6g}, claimed {worst.claimed_macs:.6g}" if worst else "no layer"
        raise VerificationFailed(
            f"The files of {root} leave more to execute than the allocation claims in {len(more)} of {len(rows)} "
            f"layers, {told}.",
            fix="build the run again; if it stays, report it with the run's recipe",
        )
    return tuple(rows)


def _sparse(root: Path) -> Iterator[tuple[str, tuple[np.ndarray, str]]]:
    """Weights per tap in the stored tiles of each sparse layer."""
    for layer in read_backbone(root / FILES["backbone3d"]).layers:
        inputs, outputs = layer.weight.shape[1:]
        taps = int(np.prod(layer.kernel))
        full = np.zeros((taps, inputs, outputs), np.float32)
        full[list(layer.taps)] = layer.weight
        alive = tiles_kept(full != 0, *tile_size(inputs, outputs))
        stored = tiled_weights(layer)
        how = f"{stored.kept} of {stored.total} tiles in the plan, {inputs} to {outputs} channels"
        if int(alive.sum()) != stored.kept:
            raise VerificationFailed(
                f"{layer.name}: the plan stores {stored.kept} tiles, its weights fill {int(alive.sum())}.",
                fix="report this with the run's recipe",
            )
        yield f"backbone_3d.{layer.name}", ((alive * tile_weights(inputs, outputs)).sum(axis=(1, 2)), how)


def _dense(root: Path) -> Iterator[tuple[str, tuple[np.ndarray, str]]]:
    """Weights per tap of each convolution of the 2D backbone; half of them where 2:4 is legal."""
    for verdict in sparsity_of(root / FILES["bev_head"]):
        first, second, *kernel = verdict.shape
        counts = np.full(int(np.prod(kernel)), float(first * second))
        sides = (first, second) if verdict.kind == "ConvTranspose" else (second, first)
        how = f"{sides[0]} to {sides[1]} channels"
        if verdict.legal:
            counts, how = counts / 2, f"{how}, {CHOSEN_BY_THE_BUILDER}"
        yield verdict.weight.removesuffix(".weight"), (counts, how)


def main() -> None:
    """Print the table of one run."""
    rows = executed_in(Path(sys.argv[1]))
    for row in rows:
        share, claim = row.found_macs / row.dense_macs, row.claimed_macs / row.dense_macs
        print(f"{row.layer:34} {share:7.4f} of its MACs executed, claimed {claim:7.4f}: {row.how}")
    dense = sum(row.dense_macs for row in rows)
    found, claimed = sum(row.found_macs for row in rows), sum(row.claimed_macs for row in rows)
    print(f"{'both backbones':34} {found / dense:7.4f}, claimed {claimed / dense:7.4f}")
    plan = Path(sys.argv[1]) / FILES["plan"]
    if plan.is_file():
        cost = read_plan(plan).meta["cost"]
        share = cost["multiplications"] / cost["dense_multiplications"]
        print(f"{'3D plan, padding in both':34} {share:7.4f} of its multiplications with nothing pruned")


if __name__ == "__main__":
    main()
