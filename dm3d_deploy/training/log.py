"""What a training leaves, by name, and what it says while it runs: losses and scores, one JSON line each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dm3d_deploy.artifacts import disk_errors

LOG_NAME = "log.jsonl"
STATE_NAME = "training.pth"
WEIGHTS_NAME = "weights.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepValues:
    """The team's mean losses by name, and the norm of the mean gradient, of one step."""

    losses: Mapping[str, float]
    gradient_norm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRow:
    """Means over the steps since the row before; `active_s` are the seconds of work so far."""

    step: int
    active_s: float
    losses: Mapping[str, float]
    gradient_norm: float
    rate: float

    @classmethod
    def of(cls, step: int, active_s: float, rate: float, values: Sequence[StepValues]) -> LogRow:
        """The row of these steps."""
        count = len(values)
        losses = {name: sum(value.losses[name] for value in values) / count for name in values[0].losses}
        norm = sum(value.gradient_norm for value in values) / count
        return cls(step=step, active_s=active_s, losses=losses, gradient_norm=norm, rate=rate)

    def as_json(self) -> dict[str, Any]:
        """Plain data, each loss under its own name."""
        return {
            "step": self.step,
            "active_s": self.active_s,
            **self.losses,
            "gradient_norm": self.gradient_norm,
            "rate": self.rate,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRow:
    """Average precision (percent) by class and their mean, "mean", at a step; None where no object counts."""

    step: int
    active_s: float
    ap_percent: Mapping[str, float | None]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"step": self.step, "active_s": self.active_s, "ap_percent": dict(self.ap_percent)}


Row = LogRow | ScoreRow
Report = Callable[[Row], None]


def write_row(out: Path, row: Row, report: Report | None) -> None:
    """Append the row to the log in `out`, and tell it; OutputError for a full disk."""
    with disk_errors(out / LOG_NAME), (out / LOG_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row.as_json()) + "\n")
    if report is not None:
        report(row)
