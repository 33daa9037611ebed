"""2:4 masks of the 2D backbone: DM3D's scores against the magnitudes of nvidia-modelopt, on the same layers.

`pip install nvidia-modelopt requests huggingface_hub` (on a CPU, too; the last two it does not declare), then
`python -m benchmarks.two_four --model centerpoint-slim --out docs/measurements/two-four.md`. Both prune every
convolution that modelopt takes, one half each, so their MACs are equal; with and without `--recover reconstruct`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from benchmarks.stamped import Lines, leave, markdown, parser_of, stamped
from calib.pool import FramePool
from dm3d_deploy.artifacts import write_tensors
from dm3d_deploy.build import build
from dm3d_deploy.config import load_config
from dm3d_deploy.errors import MissingDependency
from dm3d_deploy.pruning.masks import masked_state
from dm3d_deploy.pruning.patterns import is_2_4, prune_step, taps_from_native
from dm3d_deploy.recipe import Recipe
from dm3d_deploy.stages import RunContext
from dm3d_deploy.steps.frame_work import distortions, frame_job, frames_of, outputs_of
from dm3d_deploy.steps.layers import read_layers
from dm3d_deploy.steps.recover import reconstruction_settings

Masks = dict[str, np.ndarray]


def modelopt() -> Any:
    """The package's sparsity module."""
    try:
        return importlib.import_module("modelopt.torch.sparsity")
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"the Python package '{error.name}' is not installed.",
            fix="pip install nvidia-modelopt requests huggingface_hub",
        ) from None


def magnitude_masks(run: RunContext) -> Masks:
    """What modelopt's `sparse_magnitude` keeps of the 2D backbone's weights, by layer; it leaves others dense."""
    from dm3d_deploy.models.checkpoints import load_checkpoint
    from dm3d_deploy.models.detector import build_detector

    sparsity = modelopt()
    detector = build_detector(load_config(run.path("model_config")))
    load_checkpoint(detector, run.path("dense_weights"))
    made = sparsity.sparsify(detector.backbone_2d, mode="sparse_magnitude")
    masks = {
        f"backbone_2d.{name.removesuffix('._weight_mask')}": value.numpy().astype(np.bool_)
        for name, value in made.named_buffers()
        if name.endswith("._weight_mask")
    }
    return {name: keep for name, keep in masks.items() if not keep.all()}


def own_masks(run: RunContext, names: Mapping[str, np.ndarray]) -> Masks:
    """The best half of the same layers under 2:4 by DM3D's scores."""
    layers = {layer.name: layer for layer in read_layers(run.path("layers"))}
    with safe_open(run.path("scores"), framework="np") as file:
        return {name: prune_step(layers[name], file.get_tensor(name), "2:4", (0.5,)) > 0 for name in names}


def checked(run: RunContext, masks: Masks) -> float:
    """The share of the layers' MACs that the masks leave; all of them must be 2:4 legal."""
    layers = {layer.name: layer for layer in read_layers(run.path("layers"))}
    illegal = [name for name, keep in masks.items() if not is_2_4(taps_from_native(layers[name], keep))]
    if illegal:
        raise SystemExit(f"not 2:4 along the input channels: {illegal}")
    return math.fsum(layers[name].macs * keep.mean() for name, keep in masks.items()) / math.fsum(
        layers[name].macs for name in masks
    )


def measured(run: RunContext, masks: Masks, truth: Callable[[Path], float]) -> tuple[float, float]:
    """Held-out distortion with the mask alone, and with the kept weights fitted anew."""
    work = run.root / "work"
    trial, kept = work / ".trial.safetensors", work / ".masks.safetensors"
    state = masked_state(load_file(run.path("dense_weights")), masks)
    write_tensors(trial, state)
    write_tensors(kept, masks)
    before = truth(trial)
    first = frames_of(run, "calibration")[:1]
    settings = reconstruction_settings(run, kept)
    job = frame_job(run, "reconstruction", first, weights=trial, folder=".reconstruction", settings=settings)
    (file,) = run.pool.run(job, advanced=lambda done, total: None)
    write_tensors(trial, {**state, **load_file(file)})
    after = truth(trial)
    for path in (trial, kept, file):
        path.unlink()
    return before, after


def main() -> None:
    parser = parser_of(__doc__, frames=16, work="runs/two-four")
    given = parser.parse_args()
    began = time.perf_counter()
    recipe = Recipe(
        model=given.model, checkpoint=given.checkpoint, target=0.5, held_out_frames=given.frames,
        calibration_frames=given.calibration_frames,
    )  # fmt: skip
    modelopt()  # absent, it is told before minutes of work
    build(recipe, given.work, last="curves", watch=Lines())
    with FramePool() as pool:
        run = RunContext(root=given.work, recipe=recipe, watch=Lines(), pool=pool)
        frames = frames_of(run, "held_out")
        dense = outputs_of(run, run.path("dense_weights"), frames, lambda _: None)

        def truth(weights: Path) -> float:
            return float(np.mean(distortions(run, dense, outputs_of(run, weights, frames, lambda _: None))))

        theirs = magnitude_masks(run)
        rows = []
        for name, masks in (("nvidia-modelopt, sparse_magnitude", theirs), ("dm3d", own_masks(run, theirs))):
            before, after = measured(run, masks, truth)
            rows.append([name, f"{checked(run, masks):.4f}", f"{before:.4g}", f"{after:.4g}"])
            print(rows[-1], file=sys.stderr, flush=True)
        page = stamped(run, began)
    head = ["2:4 masks", "of these layers' MACs kept", "distortion", "with `--recover reconstruct`"]
    version = importlib.metadata.version("nvidia-modelopt")
    lines = [
        f"# {Path(given.model).stem}: 2:4 by DM3D and by nvidia-modelopt {version}", "", *page,
        f"{len(theirs)} convolutions of the 2D backbone; the rest stays dense. Whether a builder executes them as 2:4 "
        "was not measured.", "", *markdown(head, rows),
    ]  # fmt: skip
    leave(lines, given.out)


if __name__ == "__main__":
    main()
