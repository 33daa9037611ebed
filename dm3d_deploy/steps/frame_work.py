"""Work over a run's frames that several stages share: which frames, jobs over them, outputs and their distortion."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from calib.pool import FrameJob
from dm3d_deploy.artifacts import write_tensors
from dm3d_deploy.pruning.normalisation import OutputScale, output_distortion, top_cells
from dm3d_deploy.stages import RunContext

Maps = dict[str, np.ndarray]

LEAST_REFIT_FRAMES = 4


def frames_of(run: RunContext, role: str) -> tuple[int, ...]:
    """Numbers of the frames with a role."""
    rows = json.loads(run.path("frames_info").read_text(encoding="utf-8"))["frames"]
    return tuple(index for index, row in enumerate(rows) if row["role"] == role)


def refit_frames(run: RunContext) -> tuple[int, ...]:
    """The calibration frames that the kept weights are refitted on: half, or LEAST_REFIT_FRAMES if that is more.

    A refit walks through all its frames at once, and twice as many move its distortion by less than other frames do.
    """
    calibration = frames_of(run, "calibration")
    return calibration[: max(LEAST_REFIT_FRAMES, len(calibration) // 2)]


def frame_job(
    run: RunContext, kind: str, frames: tuple[int, ...], *, weights: Path, folder: str, settings: Mapping[str, Any]
) -> FrameJob:
    """A job over frames of this run with the weights of a file; `folder` is a name below work/.

    A second stage works at the RoIs that the dense detector proposed, once they are there.
    """
    rois = run.path("rois")
    return FrameJob(
        kind=kind,
        config_text=run.path("model_config").read_text(encoding="utf-8"),
        weights=str(weights.resolve()),
        frames_file=str(run.path("frames").resolve()),
        frames=frames,
        out_dir=str((run.root / "work" / folder).resolve()),
        settings={**settings, **({"rois": str(rois.resolve())} if rois.is_file() else {})},
    )


def propose(run: RunContext, advanced: Callable[[int], None]) -> None:
    """Write the RoIs that the dense detector proposes in every frame of the run."""
    frames = tuple(range(len(json.loads(run.path("frames_info").read_text(encoding="utf-8"))["frames"])))
    job = frame_job(run, "proposals", frames, weights=run.path("dense_weights"), folder=".proposals", settings={})
    files = run.pool.run(job, advanced=lambda done, _: advanced(done))
    rois = {str(frame): load_file(file)["rois"] for frame, file in zip(frames, files, strict=True)}
    write_tensors(run.path("rois"), rois)
    shutil.rmtree(job.out_dir)


def outputs_of(
    run: RunContext,
    weights: Path,
    frames: tuple[int, ...],
    advanced: Callable[[int], None],
    *,
    settings: Mapping[str, Any] | None = None,
) -> list[Maps]:
    """Raw head maps of frames by a detector with the weights of a file; `advanced` gets the frames done so far."""
    job = frame_job(run, "outputs", frames, weights=weights, folder=".outputs", settings=settings or {})
    files = run.pool.run(job, advanced=lambda done, _: advanced(done))
    outputs = [load_file(file) for file in files]
    shutil.rmtree(job.out_dir)
    return outputs


def distortions(run: RunContext, dense: Sequence[Maps], other: Sequence[Maps]) -> list[float]:
    """Distortion of each frame's outputs against the dense model's."""
    scale = OutputScale.from_json(json.loads(run.path("output_scale").read_text(encoding="utf-8")))
    return [
        output_distortion(
            a, b, scale, top_cells(a, scale.box_cells),
            lambda_box=run.recipe.lambda_box, lambda_score=run.recipe.lambda_score,
        )
        for a, b in zip(dense, other, strict=True)
    ]  # fmt: skip


class Pieces:
    """Adds up the pieces of several jobs in a row, for one progress bar."""

    def __init__(self, run: RunContext, total: int) -> None:
        self.run = run
        self.total = total
        self.before = 0

    def done(self, count: int) -> None:
        """`count` pieces of the current job are done."""
        self.run.watch.advanced(self.before + count, self.total)

    def walked(self, layers: int, of: int) -> None:
        """The current job, of one piece, has come through `layers` of its layers."""
        self.run.watch.advanced(self.before * of + layers, self.total * of)

    def next_job(self, count: int) -> None:
        """The current job, of `count` pieces, is finished."""
        self.before += count
