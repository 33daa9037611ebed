"""The stages that decide which weights go: gradients, curves, mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from dm3d_deploy.artifacts import write_json, write_tensors
from dm3d_deploy.config import load_config
from dm3d_deploy.pruning.channels import GroupCurve, group_curve
from dm3d_deploy.pruning.contracts import Curve, Layer, Pattern
from dm3d_deploy.pruning.curves import layer_curve
from dm3d_deploy.pruning.groups import ChannelGroup, channel_groups
from dm3d_deploy.pruning.macs import executed_macs, kept_macs
from dm3d_deploy.pruning.normalisation import output_scale
from dm3d_deploy.pruning.patterns import eligible_patterns, is_2_4, ratio_grid, taps_from_native
from dm3d_deploy.pruning.sensitivity import relative
from dm3d_deploy.stages import RunContext
from dm3d_deploy.steps.baseline import PAPER, printed_objective, scores_of
from dm3d_deploy.steps.candidates import masks_in
from dm3d_deploy.steps.frame_work import frame_job, frames_of, propose, refit_frames
from dm3d_deploy.steps.layers import (
    group_curves_as_json,
    in_scope,
    layers_as_json,
    layers_of,
    narrowing_of,
    read_allocation,
    read_layers,
)

CHANNEL_MULTIPLE = 8  # what a GPU's fp16 tiles and ONNX Runtime's blocked layout pay for at once
SHARES_OF_VOXELS = "backbone_3d.voxel_permille"
ALL_PATTERNS: tuple[Pattern, ...] = ("unstructured", "2:4", "tile")


def gradients(run: RunContext) -> None:
    """Scale the dense outputs over the calibration frames, count kernel-map pairs, and sketch the gradients."""
    from dm3d_deploy.models.detector import build_detector

    frames = frames_of(run, "calibration")
    total = 3 * len(frames)  # a gradient frame costs about two plain forwards
    config = load_config(run.path("model_config"))
    if config.second_stage is not None:
        propose(run, lambda done: None)
    job = frame_job(
        run, "outputs", frames, weights=run.path("dense_weights"), folder=".outputs", settings={"pairs": True}
    )
    files = run.pool.run(job, advanced=lambda done, _: run.watch.advanced(done, total))
    outputs = [load_file(file) for file in files]
    pairs = [{k.removeprefix("pairs."): v for k, v in frame.items() if k.startswith("pairs.")} for frame in outputs]
    maps = ({k: v for k, v in frame.items() if not k.startswith("pairs.")} for frame in outputs)
    scale = output_scale(maps, run.recipe.box_cells)
    layers = layers_of(build_detector(config), pairs)
    for file in files:
        file.unlink()
    layers = _with_voxels_passed_by(run, layers)
    settings = {
        "layers": _sketched(layers, run.recipe.scope),
        "scale": scale.as_json(),
        "sketches": run.recipe.sketches,
        "seed": run.recipe.seed,
        "lambda_box": run.recipe.lambda_box,
        "lambda_score": run.recipe.lambda_score,
    }
    job = frame_job(run, "gradients", frames, weights=run.start, folder="gradients", settings=settings)
    files = run.pool.run(job, advanced=lambda done, _: run.watch.advanced(len(frames) + 2 * done, total))
    chosen = [file for frame, file in zip(frames, files, strict=True) if frame in refit_frames(run)]
    write_tensors(run.path("sensitivity"), _sensitivity(chosen))
    write_json(run.path("output_scale"), scale.as_json())
    write_json(run.path("layers"), layers_as_json(layers))


def _with_voxels_passed_by(run: RunContext, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The layers with the pairs of the voxels that the weights to prune keep; the same ones where they keep all."""
    with safe_open(run.start, framework="np") as weights:
        if SHARES_OF_VOXELS not in weights.keys():  # noqa: SIM118 - a file, not a mapping
            return layers
    frames = frames_of(run, "calibration")
    job = frame_job(run, "kept_pairs", frames, weights=run.start, folder=".pairs", settings={})
    files = run.pool.run(job, advanced=lambda done, _: None)
    found = [load_file(file) for file in files]
    for file in files:
        file.unlink()
    kept = {name: np.stack([frame[name] for frame in found]).mean(axis=0, dtype=np.float64) for name in found[0]}
    narrowed = ((layer, replace(layer, positions=kept.get(layer.name, layer.positions))) for layer in layers)
    return tuple(replace(less, spared_macs=layer.macs - less.macs) for layer, less in narrowed)


def _sensitivity(files: Sequence[Path]) -> dict[str, np.ndarray]:
    """What the cells of some frames' gradient files count, one array a layer."""
    found: dict[str, list[np.ndarray]] = {}
    for file in files:
        with safe_open(file, framework="np") as handle:
            for key in (key for key in handle.keys() if key.startswith("cells.")):  # noqa: SIM118 - a file, not a mapping
                found.setdefault(key.removeprefix("cells."), []).append(handle.get_tensor(key))
    return relative(found)


def _sketched(layers: tuple[Layer, ...], scope: str) -> list[str]:
    """The layers whose weights may go, and those that read channels which may go."""
    own = {layer.name for layer in in_scope(layers, scope) if not layer.final}
    readers = {slot.layer for group in _groups_in(layers, scope) for slot in group.read}
    return [layer.name for layer in layers if layer.name in own | readers]


def _groups_in(layers: tuple[Layer, ...], scope: str) -> list[ChannelGroup]:
    """The groups that only layers in scope write."""
    counted = {layer.name for layer in in_scope(layers, scope)}
    return [group for group in channel_groups(layers) if all(slot.layer in counted for slot in group.written)]


def curves(run: RunContext) -> None:
    """Rank every weight and price every ratio of every layer, for each pattern that the layer can take."""
    layers = {layer.name: layer for layer in read_layers(run.path("layers"))}
    handles = [safe_open(file, framework="np") for file in sorted(run.path("gradients").iterdir())]
    sketched = set(handles[0].keys())
    names = [layer.name for layer in in_scope(tuple(layers.values()), run.recipe.scope) if layer.name in sketched]
    names = [name for name in names if not layers[name].final]
    grid = ratio_grid(run.recipe.ratios)
    rows: list[dict[str, Any]] = []
    scores: dict[str, np.ndarray] = {}
    with safe_open(run.start, framework="np") as weights:
        for done, name in enumerate(names):
            layer = layers[name]
            weight = weights.get_tensor(f"{name}.weight")
            gradient = np.concatenate([handle.get_tensor(name) for handle in handles])
            if layer.part == "head" and not gradient.any():  # a branch that the training left dead: it stays as it is
                continue
            scores[name] = scores_of(run.recipe.method, weight, gradient, run.recipe.damping)
            for pattern in eligible_patterns(layer, ALL_PATTERNS)[0]:
                curve = layer_curve(layer, weight, gradient, scores[name], pattern, grid, kappa=run.recipe.kappa)
                rows.append(_curve_as_json(curve))
                if run.recipe.method == PAPER and pattern == "unstructured":
                    rows[-1]["signed"] = printed_objective(
                        layer, weight, gradient, scores[name], grid, run.recipe.kappa
                    )
            run.watch.advanced(done + 1, len(names))
        groups = _groups_in(tuple(layers.values()), run.recipe.scope)
        made = (_channel_curve(run, group, layers, weights, handles) for group in groups)
        found = [curve for curve in made if curve is not None]
    write_tensors(run.path("scores"), scores)
    write_json(run.path("curves"), rows)
    write_json(run.path("channels"), group_curves_as_json(found))


def _channel_curve(
    run: RunContext, group: ChannelGroup, layers: Mapping[str, Layer], weights: Any, handles: Sequence[Any]
) -> GroupCurve | None:
    """None where no frame gives the group's readers a gradient: pruning it would look free."""
    readers = {slot.layer for slot in group.read}
    gradients = {name: np.concatenate([handle.get_tensor(name) for handle in handles]) for name in readers}
    if not any(gradient.any() for gradient in gradients.values()):
        return None
    return group_curve(
        group, layers, {name: weights.get_tensor(f"{name}.weight") for name in readers}, gradients,
        multiple=CHANNEL_MULTIPLE, kappa=run.recipe.kappa, damping=run.recipe.damping,
    )  # fmt: skip


def _curve_as_json(curve: Curve) -> dict[str, Any]:
    return {
        "layer": curve.layer,
        "pattern": curve.pattern,
        "unit": curve.unit,
        "ratio": curve.ratio.tolist(),
        "distortion": curve.distortion.tolist(),
        "cost": curve.cost.tolist(),
    }


def mask(run: RunContext) -> None:
    """Turn the allocation into masks, and count what they keep and what hardware then executes."""
    layers, narrow = read_layers(run.path("layers")), narrowing_of(run)
    masks = {m.layer: m for m in masks_in(run, read_allocation(run.path("allocation")))}
    rows = []
    for layer in layers:
        found = masks.get(layer.name)
        keep = found.keep if found is not None else np.ones(layer.shape, dtype=np.bool_)
        pattern = "dense" if found is None or keep.all() else found.pattern
        left, kept = narrow.of(layer), narrow.take(layer, keep)
        gone = narrow.gone(layer)
        rows.append(
            {
                "layer": layer.name,
                "pattern": pattern,
                "kept_weights": int(np.count_nonzero(keep)),
                "dense_macs": layer.dense_macs,
                "kept_macs": kept_macs(layer, keep),
                "executed_macs": 0.0 if gone else executed_macs(left, kept, pattern),
                "legal_2_4": is_2_4(taps_from_native(left, kept)) if _may_be_2_4(left) else None,
            }
        )
    write_tensors(run.path("masks"), {name: m.keep for name, m in sorted(masks.items())})
    write_json(run.path("masks_info"), rows)


def _may_be_2_4(layer: Layer) -> bool:
    return layer.kind != "sparse" and layer.inputs % 4 == 0
