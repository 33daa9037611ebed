"""A child process of calib.pool: it takes every n-th frame of each job that standard input names."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from calib.frame_outputs import batch_statistics, decoded_boxes, head_maps, kept_pairs
from calib.gradients import sketch_gradients
from calib.labelled_frames import arrays_from_labels, read_labelled
from calib.pool import DONE_MARK, ERROR_MARK, IDLE_MARK, PART_MARK, FrameJob, result_path
from calib.reconstruct import reconstructed_weights
from calib.refit_shares import refit_shares
from calib.scenes import proposed_rois, read_scenes
from dm3d_deploy.artifacts import write_tensors
from dm3d_deploy.config import DetectorConfig, config_from_text
from dm3d_deploy.errors import Dm3dError, UsageError
from dm3d_deploy.geometry.voxelize import voxelize
from dm3d_deploy.models.checkpoints import load_checkpoint
from dm3d_deploy.models.detector import Detector, build_detector
from dm3d_deploy.models.outputs import Scene

FrameFunction = Callable[[Detector, torch.Tensor, torch.Tensor, int, Mapping[str, Any]], dict[str, np.ndarray]]
KINDS: Mapping[str, FrameFunction] = {
    "outputs": head_maps,
    "detections": decoded_boxes,
    "statistics": batch_statistics,
    "gradients": sketch_gradients,
    "kept_pairs": kept_pairs,
    "reconstruction": reconstructed_weights,
    "refit_shares": refit_shares,
    "proposals": proposed_rois,
}


def read_voxels(frames_file: Path, frame: int) -> tuple[np.ndarray, np.ndarray]:
    """Features Float32[V, C] and coords Int32[V, 4] of one frame of frames.safetensors."""
    with safe_open(frames_file, framework="np") as file:
        return file.get_tensor(f"{frame}.features"), file.get_tensor(f"{frame}.coords").astype(np.int32)


def _inputs(
    job: FrameJob, config: DetectorConfig, frame: int
) -> tuple[np.ndarray, np.ndarray, list[Scene], dict[str, np.ndarray]]:
    """Features, coords and scenes of a stored frame, or of one drawn here with its labels as arrays."""
    if job.frames_file is not None:
        file = Path(job.frames_file)
        return *read_voxels(file, frame), read_scenes(config, file, [frame], job.settings.get("rois")), {}
    drawn = read_labelled(job.settings["drawn"], frame)
    voxels = voxelize(drawn.cloud, config)
    scenes = [] if config.second_stage is None else [Scene(points=voxels.points)]
    return voxels.features, voxels.coords, scenes, arrays_from_labels(drawn.labels)


def work(job: FrameJob, index: int, count: int) -> None:
    """Do this process's share of the job, one line on standard output per frame."""
    torch.set_num_threads(1)
    if job.kind not in KINDS:
        raise UsageError(f"a frame worker cannot do '{job.kind}'.", fix="use one of " + ", ".join(KINDS))
    detector = build_detector(config_from_text(job.config_text, "the run's model.yaml"))
    load_checkpoint(detector, Path(job.weights))
    parent = os.getppid()
    for frame in job.frames[index::count]:
        _leave_if_orphaned(parent)
        features, coords, scenes, labels = _inputs(job, detector.config, frame)
        result = KINDS[job.kind](
            detector,
            torch.from_numpy(features),
            torch.from_numpy(coords.astype(np.int64)),
            frame,
            {**job.settings, "scenes": scenes, "walked": _walked},
        )
        _leave_if_orphaned(parent)  # another build may be writing into this folder by now
        write_tensors(result_path(Path(job.out_dir), frame), result | labels)
        print(f"{DONE_MARK}{frame}", flush=True)


def _walked(layers: int, of: int) -> None:
    print(f"{PART_MARK}{layers} {of}", flush=True)


def _leave_if_orphaned(parent: int) -> None:
    if os.getppid() != parent:
        raise SystemExit(1)


def _job(path: Path) -> FrameJob:
    data = json.loads(path.read_text(encoding="utf-8"))
    return FrameJob(**{**data, "frames": tuple(data["frames"])})


def main() -> int:
    """Take jobs from standard input, one `INDEX COUNT PATH` a line; a Dm3dError is told in one line of JSON."""
    for line in sys.stdin:
        index, count, path = line.rstrip("\n").split(" ", 2)
        try:
            work(_job(Path(path)), int(index), int(count))
        except Dm3dError as error:
            told = {"class": type(error).__name__, "what": error.what, "fix": error.fix}
            print(ERROR_MARK + json.dumps(told), flush=True)
            return error.exit_code
        print(IDLE_MARK, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
