"""What a training was asked to do, kept beside its weights: who resumes must ask for the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dm3d_deploy.artifacts import write_json
from dm3d_deploy.errors import StaleArtifact, UsageError
from dm3d_deploy.training.log import STATE_NAME, WEIGHTS_NAME

PLAN_NAME = "plan.json"
SIMULATED = "simulated"
PEAK_RATE = 2e-3
# A pruned detector is tuned, not taught: a tenth of the dense rate (docs/training.md).
MASKED_SHARE = 0.1
NOT_COMPARED = ("out", "resume")


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
            raise UsageError("the length of a training is given once.", fix="give --minutes, --steps or --epochs")
        if not (self.minutes or self.steps or self.epochs or 0) > 0:
            given = next(length for length in (self.minutes, self.steps, self.epochs) if length is not None)
            raise UsageError(f"a training of {given} cannot be.", fix="give a length above 0")
        if self.init is not None and self.masks is not None:
            raise UsageError("--init and --masks exclude each other: both bring weights.", fix="leave one out")
        if not self.score_every >= 0:
            raise UsageError(
                f"scores every {self.score_every} minutes cannot be.", fix="give --score-every above 0, or 0 for none"
            )

    def keep(self, notes: Sequence[str]) -> None:
        """Write the plan beside the weights; a resumed training must follow the plan that it began with.

        It need not name its `init` again, since the state brings the weights. Raises UsageError when it does not
        follow the plan, or when there is no state to resume, and StaleArtifact for a file that is no plan.
        """
        path = Path(self.out) / PLAN_NAME
        now = {name: value for name, value in asdict(self).items() if name not in NOT_COMPARED}
        if not self.resume:
            write_json(path, {**now, "notes": list(notes)})
            return
        if not path.is_file() or not (path.parent / STATE_NAME).is_file():
            raise UsageError(f"{self.out} holds no training to resume.", fix="start one, without --resume")
        if self.init is None:
            del now["init"]
        try:
            began = json.loads(path.read_text(encoding="utf-8"))
            changed = [f"{name} was {began[name]} and is {now[name]}" for name in now if began[name] != now[name]]
        except (ValueError, LookupError, TypeError) as error:
            reason = f"{type(error).__name__} {error}"
            raise StaleArtifact(
                f"{path} is no plan of a training: {reason}.", fix="start again, without --resume"
            ) from None
        if changed:
            raise UsageError(
                f"the training in {self.out} began with other settings: {'; '.join(changed)}.",
                fix="resume with the settings it began with, or start another from its weights: "
                f"--init {path.parent / WEIGHTS_NAME}, another --out",
            )

    def after_divergence(self, step: int) -> str:
        """What to do about a training that diverged behind so many steps; the same settings would diverge again."""
        if not step:
            return "no step was taken yet, so no rate helps: begin from other weights, or check the frames"
        words, last = f"start anew with a --peak-rate below {self.peak_rate:g}", Path(self.out) / WEIGHTS_NAME
        if not last.is_file():
            return words
        return f"{words}, another --out" + (f" and --init {last}, the last checkpoint" if self.masks is None else "")
