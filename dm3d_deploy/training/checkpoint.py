"""The whole state of a training in one file, so that it goes on as if it had never stopped."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dm3d_deploy.artifacts import write_all, write_bytes
from dm3d_deploy.errors import CheckpointError
from dm3d_deploy.models.checkpoints import UNREADABLE, load_checkpoint, weights_bytes
from dm3d_deploy.models.detector import Detector, prunable_layers
from dm3d_deploy.training.log import STATE_NAME, WEIGHTS_NAME


@dataclass(slots=True)
class Progress:
    """Where a training stands: steps, seconds that count, those at the last save and score, and the last step's."""

    step: int = 0
    active_s: float = 0.0
    saved_s: float = 0.0
    scored_s: float = 0.0
    step_s: float = 0.0


def save_training(out: Path, detector: Detector, optimiser: torch.optim.Optimizer, progress: Progress) -> None:
    """Write the state and, beside it, the weights alone: both, or neither."""
    detector.global_step.fill_(progress.step)
    buffer = io.BytesIO()
    state = {
        "model_state": detector.state_dict(),
        "optimiser": optimiser.state_dict(),
        "progress": asdict(progress),
    }
    torch.save(state, buffer)
    write_all({out / STATE_NAME: buffer.getvalue(), out / WEIGHTS_NAME: weights_bytes(detector)})


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
            fix=f"start another from it: --init {path} in place of --resume, another --out",
        ) from None


def save_half(detector: Detector, path: Path) -> None:
    """Write the weights for delivery: convolutions as float16, everything else (norms, biases, counters) as it is.

    Raises CheckpointError when a weight is too large for float16.
    """
    import safetensors.torch

    halves = {f"{layer.name}.weight" for layer in prunable_layers(detector)}
    tensors = {}
    for name, value in detector.state_dict().items():
        kept = value.detach().cpu().contiguous()
        tensors[name] = kept.half() if name in halves else kept
        if not bool(torch.isfinite(tensors[name]).all()):
            raise CheckpointError(
                f"{name} holds a weight of {float(kept.abs().max()):g}, and float16 ends at 65504.",
                fix="deliver the float32 weights",
            )
    write_bytes(path, safetensors.torch.save(tensors))
