"""The whole state of a training in one file, so that it goes on as if it had never stopped."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dm3d_deploy.artifacts import write_bytes
from dm3d_deploy.errors import CheckpointError
from dm3d_deploy.models.checkpoints import UNREADABLE, load_checkpoint, save_weights
from dm3d_deploy.models.detector import Detector

STATE_NAME = "training.pth"
WEIGHTS_NAME = "weights.safetensors"


@dataclass(slots=True)
class Progress:
    """Where a training stands: steps, seconds that count, those at the last save, and how long the last step took."""

    step: int = 0
    active_s: float = 0.0
    saved_s: float = 0.0
    step_s: float = 0.0


def save_training(out: Path, detector: Detector, optimiser: torch.optim.Optimizer, progress: Progress) -> None:
    """Write the state and, beside it, the weights alone; each file whole."""
    detector.global_step.fill_(progress.step)
    buffer = io.BytesIO()
    state = {
        "model_state": detector.state_dict(),
        "optimiser": optimiser.state_dict(),
        "progress": asdict(progress),
    }
    torch.save(state, buffer)
    write_bytes(out / STATE_NAME, buffer.getvalue())
    save_weights(detector, out / WEIGHTS_NAME)


def load_training(out: Path, detector: Detector, optimiser: torch.optim.Optimizer) -> Progress:
    """Fill detector and optimiser from the state in `out`; CheckpointError when there is none or it does not fit."""
    path = out / STATE_NAME
    load_checkpoint(detector, path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        optimiser.load_state_dict(state["optimiser"])
        return Progress(**state["progress"])
    except UNREADABLE as error:
        raise CheckpointError(
            f"{path} holds weights but no state of a training: {type(error).__name__} {error}.",
            fix="start from it with init instead of resume",
        ) from None
