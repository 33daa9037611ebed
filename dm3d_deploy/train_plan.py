"""What a training was asked to do, kept beside its weights: who resumes must ask for the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dm3d_deploy.artifacts import write_json
from dm3d_deploy.errors import StaleArtifact, UsageError

PLAN_NAME = "plan.json"
SIMULATED = "simulated"
PEAK_RATE = 2e-3
# A pruned detector is tuned, not taught: a tenth of the dense rate (docs/training.md).
MASKED_SHARE = 0.1
NOT_COMPARED = ("out", "init", "resume")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """Everything that decides a training but the machine: processes see other frames, so their number counts too."""

    model: str
    out: str
    data: str
    minutes: float | None
    steps: int | None
    epochs: int | None
    init: str | None
    masks: str | None
    teacher: str | None
    resume: bool
    seed: int
    processes: int
    crops: int
    peak_rate: float
    score_every: float

    def __post_init__(self) -> None:
        if sum(length is not None for length in (self.minutes, self.steps, self.epochs)) != 1:
            raise UsageError("the length of a training is given once.", fix="give minutes, steps or epochs")
        if not (self.minutes or self.steps or self.epochs or 0) > 0:
            given = next(length for length in (self.minutes, self.steps, self.epochs) if length is not None)
            raise UsageError(f"a training of {given} cannot be.", fix="give a positive length")
        if self.init is not None and (self.resume or self.masks is not None):
            other = "resume" if self.resume else "masks"
            raise UsageError(f"init and {other} exclude each other: {other} brings weights.", fix="leave one out")
        if not self.score_every >= 0:
            raise UsageError(f"scores every {self.score_every} minutes cannot be.", fix="give minutes, or 0 for none")

    def keep(self, notes: Sequence[str]) -> None:
        """Write the plan beside the weights; a resumed training must follow the plan that it began with.

        Raises UsageError when it does not, or when there is none, and StaleArtifact for a file that is no plan.
        """
        path = Path(self.out) / PLAN_NAME
        now = {name: value for name, value in asdict(self).items() if name not in NOT_COMPARED}
        if not self.resume:
            write_json(path, {**now, "notes": list(notes)})
            return
        if not path.is_file():
            raise UsageError(f"{self.out} holds no training to resume.", fix="start one, without resume")
        try:
            began = json.loads(path.read_text(encoding="utf-8"))
            changed = [f"{name} was {began[name]} and is {now[name]}" for name in now if began[name] != now[name]]
        except (ValueError, LookupError, TypeError) as error:
            reason = f"{type(error).__name__} {error}"
            raise StaleArtifact(f"{path} is no plan of a training: {reason}.", fix="start again, from init") from None
        if changed:
            raise UsageError(
                f"the training in {self.out} began with other settings: {'; '.join(changed)}.",
                fix="resume with the settings it began with, or start another from its weights with init",
            )
