"""The stages that decide which weights go: gradients, curves, mask."""

from __future__ import annotations

from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save

from dm3d_deploy.artifacts import write_bytes, write_json
from dm3d_deploy.config import load_config
from dm3d_deploy.pruning.contracts import Curve, Layer, Pattern
from dm3d_deploy.pruning.curves import layer_curve
from dm3d_deploy.pruning.macs import executed_macs, kept_macs
from dm3d_deploy.pruning.masks import masks_of
from dm3d_deploy.pruning.normalisation import output_scale
from dm3d_deploy.pruning.patterns import eligible_patterns, is_2_4, ratio_grid, taps_from_native
from dm3d_deploy.stages import RunContext
from dm3d_deploy.steps.baseline import PAPER, printed_objective, scores_of
from dm3d_deploy.steps.frame_work import frame_job, frames_of
from dm3d_deploy.steps.layers import in_scope, layers_as_json, layers_of, read_allocation, read_layers

ALL_PATTERNS: tuple[Pattern, ...] = ("unstructured", "2:4", "tile")


def gradients(run: RunContext) -> None:
    """Scale the dense outputs over the calibration frames, count kernel-map pairs, and sketch the gradients."""
    from dm3d_deploy.models.detector import build_detector

    frames = frames_of(run, "calibration")
    total = 3 * len(frames)  # a gradient frame costs about two plain forwards
    job = frame_job(
        run, "outputs", frames, weights=run.path("dense_weights"), folder=".outputs", settings={"pairs": True}
    )
    files = run.pool.run(job, advanced=lambda done, _: run.watch.advanced(done, total))
    outputs = [load_file(file) for file in files]
    pairs = [{k.removeprefix("pairs."): v for k, v in frame.items() if k.startswith("pairs.")} for frame in outputs]
    maps = ({k: v for k, v in frame.items() if not k.startswith("pairs.")} for frame in outputs)
    scale = output_scale(maps, run.recipe.box_cells)
    layers = layers_of(build_detector(load_config(run.path("model_config"))), pairs)
    for file in files:
        file.unlink()
    settings = {
        "layers": [layer.name for layer in in_scope(layers, run.recipe.scope) if not layer.final],
        "scale": scale.as_json(),
        "sketches": run.recipe.sketches,
        "seed": run.recipe.seed,
        "lambda_box": run.recipe.lambda_box,
        "lambda_score": run.recipe.lambda_score,
    }
    job = frame_job(run, "gradients", frames, weights=run.start, folder="gradients", settings=settings)
    run.pool.run(job, advanced=lambda done, _: run.watch.advanced(len(frames) + 2 * done, total))
    write_json(run.path("output_scale"), scale.as_json())
    write_json(run.path("layers"), layers_as_json(layers))


def curves(run: RunContext) -> None:
    """Rank every weight and price every ratio of every layer, for each pattern that the layer can take."""
    layers = {layer.name: layer for layer in read_layers(run.path("layers"))}
    handles = [safe_open(file, framework="np") for file in sorted(run.path("gradients").iterdir())]
    names = [name for name in layers if name in set(handles[0].keys())]
    grid = ratio_grid(run.recipe.ratios)
    rows: list[dict[str, Any]] = []
    scores: dict[str, np.ndarray] = {}
    with safe_open(run.start, framework="np") as weights:
        for done, name in enumerate(names):
            layer = layers[name]
            weight = weights.get_tensor(f"{name}.weight")
            gradient = np.concatenate([handle.get_tensor(name) for handle in handles])
            scores[name] = scores_of(run.recipe.method, weight, gradient, run.recipe.damping)
            for pattern in eligible_patterns(layer, ALL_PATTERNS)[0]:
                curve = layer_curve(layer, weight, gradient, scores[name], pattern, grid, kappa=run.recipe.kappa)
                rows.append(_curve_as_json(curve))
                if run.recipe.method == PAPER and pattern == "unstructured":
                    rows[-1]["signed"] = printed_objective(
                        layer, weight, gradient, scores[name], grid, run.recipe.kappa
                    )
            run.watch.advanced(done + 1, len(names))
    write_bytes(run.path("scores"), save(scores))
    write_json(run.path("curves"), rows)


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
    layers = read_layers(run.path("layers"))
    allocation = read_allocation(run.path("allocation"))
    with safe_open(run.path("scores"), framework="np") as file:
        scores = {choice.layer: file.get_tensor(choice.layer) for choice in allocation.choices}
    masks = {m.layer: m for m in masks_of(layers, scores, allocation)}
    rows = []
    for layer in layers:
        found = masks.get(layer.name)
        keep = found.keep if found is not None else np.ones(layer.shape, dtype=np.bool_)
        pattern = "dense" if found is None or keep.all() else found.pattern
        rows.append(
            {
                "layer": layer.name,
                "pattern": pattern,
                "kept_weights": int(np.count_nonzero(keep)),
                "dense_macs": layer.macs,
                "kept_macs": kept_macs(layer, keep),
                "executed_macs": executed_macs(layer, keep, pattern),
                "legal_2_4": is_2_4(taps_from_native(layer, keep)) if _may_be_2_4(layer) else None,
            }
        )
    write_bytes(run.path("masks"), save({name: np.ascontiguousarray(m.keep) for name, m in sorted(masks.items())}))
    write_json(run.path("masks_info"), rows)


def _may_be_2_4(layer: Layer) -> bool:
    return layer.kind != "sparse" and layer.inputs % 4 == 0
