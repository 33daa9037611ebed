"""measurements.json: what varies between two builds of one recipe (seconds, times, engines), beside the manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dm3d_deploy.artifacts import Artifact, Step, write_json
from dm3d_deploy.errors import StaleArtifact

MEASUREMENTS_NAME = "measurements.json"
SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """Steps whose bytes may differ between builds, and the seconds that every stage took when it last ran."""

    steps: tuple[Step, ...]
    seconds: Mapping[str, float]

    def step(self, name: str) -> Step | None:
        """A finished step by name."""
        return next((step for step in self.steps if step.name == name), None)

    def with_steps(self, steps: tuple[Step, ...]) -> Measurements:
        """The same with other steps."""
        return replace(self, steps=steps)

    def with_seconds(self, name: str, seconds: float) -> Measurements:
        """The same with one stage's time."""
        return replace(self, seconds={**self.seconds, name: round(seconds, 3)})

    def as_json(self) -> dict[str, Any]:
        """Plain data for measurements.json."""
        return {"schema": SCHEMA, "seconds": dict(self.seconds), "steps": [step.as_json() for step in self.steps]}


def write_measurements(root: Path, measurements: Measurements) -> None:
    """Write measurements.json whole."""
    write_json(root / MEASUREMENTS_NAME, measurements.as_json())


def read_measurements(root: Path) -> Measurements:
    """Read measurements.json; a run without one has measured nothing yet."""
    path = root / MEASUREMENTS_NAME
    if not path.is_file():
        return Measurements(steps=(), seconds={})
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise StaleArtifact(
                f"{path} has schema {data['schema']}; this version reads {SCHEMA}.", fix="rebuild with this version"
            )
        steps = tuple(Step.from_json(step) for step in data["steps"])
        return Measurements(steps=steps, seconds={str(k): float(v) for k, v in data["seconds"].items()})
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__} {error}"
        raise StaleArtifact(f"{path} is not a record of measurements: {reason}.", fix="delete it and rebuild") from None


def engine_artifact(root: Path, kind: str) -> Artifact | None:
    """A file that the engine stage left, or None when the backend was absent."""
    step = read_measurements(root).step("engine")
    return next((a for a in step.outputs if a.kind == kind), None) if step else None
