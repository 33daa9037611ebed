"""Recovery: which steps there are, batch-norm statistics, and acceptance on evidence alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from dm3d_deploy.errors import InternalError

# What `recover` in a recipe means: the steps, in order, each judged on its own.
STEPS_OF: dict[str, tuple[str, ...]] = {
    "none": (),
    "bn": ("bn",),
    "reconstruct": ("reconstruct",),
    "distill": ("reconstruct", "distill"),
    "finetune": ("reconstruct", "finetune"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """Whether a step of recovery is taken: the mean of a measure, on what did not make the step, before and after."""

    method: str
    measure: str
    before: float
    after: float
    accepted: bool
    reason: str


def mean_statistics(
    frames: Sequence[Mapping[str, Float[np.ndarray, " channels"]]],
) -> dict[str, Float[np.ndarray, " channels"]]:
    """Statistics "MODULE.mean" and "MODULE.var" averaged over frames with equal weight.

    That is PyTorch's cumulative moving average (momentum None) over one pass; its variances are unbiased within a
    frame and leave out the spread between frames, as training with running averages does.
    """
    if not frames:
        raise InternalError("batch-norm statistics need at least one frame")
    names = frames[0].keys()
    if any(frame.keys() != names for frame in frames):
        raise InternalError("the frames' statistics name different layers")
    return {
        name: np.stack([frame[name] for frame in frames]).mean(axis=0, dtype=np.float64).astype(np.float32)
        for name in names
    }


def judge(
    method: str,
    before: Sequence[float],
    after: Sequence[float],
    *,
    measure: str = "distortion",
    where: str = "selection frames",
) -> Acceptance:
    """Accept a step when the mean of what is measured falls; NaN and no evidence are refusals."""
    if not before or len(before) != len(after):
        raise InternalError(f"a recovery is judged on the same {where}, not {len(before)} and {len(after)}")
    first, second = math.fsum(before) / len(before), math.fsum(after) / len(after)
    fell = second < first
    reason = (
        f"the {measure} of {len(before)} {where} fell from {first:.4g} to {second:.4g}"
        if fell
        else f"the {measure} of {len(before)} {where} did not fall: {first:.4g} before, {second:.4g} after"
    )
    return Acceptance(method=method, measure=measure, before=first, after=second, accepted=fell, reason=reason)
