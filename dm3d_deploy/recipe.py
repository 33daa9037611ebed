"""What a build is asked to do: every choice and its default, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from dm3d_deploy.errors import UsageError, nearest

SCOPES = ("backbone", "model")
PATTERNS = ("auto", "unstructured")
PRECISIONS = ("fp16", "fp32")
METHODS = ("dm3d", "uniform", "erk", "lamp", "taylor", "paper-eq13")
RECOVERIES = ("none", "bn", "reconstruct")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A build's choices. `target` is the share of MACs to keep; the other defaults are those of docs/method.md.

    `model` is a name or a YAML path, `frames` is `simulated`, a file or a folder. Of the frames, `calibration_frames`
    rank and price the weights, `selection_frames` accept or refuse the recovery, `held_out_frames` only report.
    `method` is DM3D or a baseline to hold it against; no `sketches` at all is the plain sum of paper-eq13.
    """

    model: str
    target: float
    method: str = "dm3d"
    checkpoint: str | None = None
    frames: str = "simulated"
    scope: str = "backbone"
    patterns: str = "auto"
    device: str = "auto"
    precision: str = "fp16"
    recover: str = "bn"
    calibration_frames: int = 8
    selection_frames: int = 2
    held_out_frames: int = 4
    sketches: int = 2
    ratios: int = 100
    damping: float = 1.0
    kappa: float = 1e-7
    lambda_box: float = 1.0
    lambda_score: float = 1.0
    box_cells: int = 500
    bench_repeats: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.target, (int, float)) or not 0 < self.target <= 1:
            raise UsageError(
                f"the target {self.target} is not a share of MACs in (0, 1].", fix="for example --target 0.3 keeps 30 %"
            )
        for name, value, known in (
            ("scope", self.scope, SCOPES),
            ("patterns", self.patterns, PATTERNS),
            ("precision", self.precision, PRECISIONS),
            ("method", self.method, METHODS),
            ("recover", self.recover, RECOVERIES),
        ):
            if value not in known:
                raise UsageError(f"--{name} {value} is unknown.", fix=nearest(value, known))
        for name in ("calibration_frames", "held_out_frames", "ratios", "box_cells", "bench_repeats"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}.", fix="give at least 1")
        if self.selection_frames < 0 or self.seed < 0:
            raise UsageError("selection_frames and seed cannot be negative.", fix="give 0 or more")
        self._check_method()

    def _check_method(self) -> None:
        if self.method != "dm3d" and self.patterns != "unstructured":
            raise UsageError(
                f"--method {self.method} prunes weights freely, which --patterns {self.patterns} does not mean.",
                fix="add --patterns unstructured",
            )
        plain = self.method == "paper-eq13"
        if self.sketches < 0 or plain != (self.sketches == 0):
            raise UsageError(
                f"sketches is {self.sketches} for the method {self.method}.",
                fix="give at least 1; paper-eq13 takes 0, the gradient of the plain sum",
            )

    def as_json(self) -> dict[str, Any]:
        """Plain data, every field."""
        return asdict(self)


def recipe_from_mapping(data: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data; an unknown key is an error that names the nearest known one."""
    known = [field.name for field in fields(Recipe)]
    for key in data:
        if key not in known:
            raise UsageError(f"the recipe has no key '{key}'.", fix=nearest(key, known))
    for key in ("model", "target"):
        if key not in data:
            raise UsageError(f"the recipe has no '{key}'.", fix=f"add {key}")
    return Recipe(**data)
