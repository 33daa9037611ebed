"""What a build is asked to do: every choice and its default, in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from dm3d_deploy.errors import UsageError, nearest

SCOPES = ("backbone", "model", "backbone3d")
PATTERNS = ("auto", "unstructured", "channels")
PRECISIONS = ("fp16", "fp32")
COSTS = ("macs", "executed", "latency")
METHODS = ("dm3d", "uniform", "erk", "lamp", "taylor", "paper-eq13")
RECOVERIES = ("none", "bn", "reconstruct", "distill", "finetune")
LEARNING = ("distill", "finetune")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A build's choices; the defaults are those of docs/method.md.

    One goal: `target`, the share of the cost to keep, `target_ms`, the network's time, or `max_distortion`, within
    which the cheapest is chosen. `cost` is kept MACs, executed MACs, or latency by a `profile` (a .json file or a
    device's name, else the one `device`). `candidates` allocations for a target are verified by a true forward, unless
    curves foresee a refit (steps.foresee).
    `model` is a name or a YAML path, `frames` is `simulated`, a file or a folder. Of the frames, `calibration_frames`
    rank and price the weights, `selection_frames` accept or refuse the recovery, `held_out_frames` only report.
    The `recover_steps` of distill and finetune learn from `recover_data`: simulated scenes, or a folder, which
    finetune needs labelled.
    Average precision is counted on `score_frames` simulated scenes beside them, 0 for none.
    `start` names weights that pruning starts from in place of the dense ones, those of an earlier round.
    The 3D plan has room for `capacity_margin` times the rows of the fullest calibration frame, or for what `capacities`
    says: "stage2_down=60000,points=300000".
    `method` is DM3D or a baseline to hold it against; no `sketches` at all is the plain sum of paper-eq13.
    """

    model: str
    target: float | None = None
    target_ms: float | None = None
    max_distortion: float | None = None
    cost: str = "macs"
    profile: str | None = None
    candidates: int = 3
    method: str = "dm3d"
    checkpoint: str | None = None
    start: str | None = None
    frames: str = "simulated"
    scope: str = "backbone"
    patterns: str = "auto"
    device: str = "auto"
    precision: str = "fp16"
    voxel_keep: float = 1.0
    voxel_stages: str = "2,3"
    capacity_margin: float = 1.25
    capacities: str = ""
    recover: str = "reconstruct"
    recover_steps: int = 500
    recover_data: str = "simulated"
    calibration_frames: int = 8
    selection_frames: int = 2
    held_out_frames: int = 4
    score_frames: int = 12
    sketches: int = 2
    ratios: int = 100
    damping: float = 1.0
    kappa: float = 1e-7
    lambda_box: float = 1.0
    lambda_score: float = 1.0
    box_cells: int = 500
    bench_repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("scope", self.scope, SCOPES),
            ("patterns", self.patterns, PATTERNS),
            ("precision", self.precision, PRECISIONS),
            ("cost", self.cost, COSTS),
            ("method", self.method, METHODS),
            ("recover", self.recover, RECOVERIES),
        ):
            if value not in known:
                raise UsageError(f"--{name} {value} is unknown.", fix=nearest(value, known))
        counts = ("ratios", "box_cells", "bench_repeats", "candidates", "recover_steps")
        for name in ("calibration_frames", "held_out_frames", *counts):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}.", fix="give at least 1")
        if min(self.selection_frames, self.score_frames, self.seed) < 0:
            raise UsageError("selection_frames, score_frames and seed cannot be negative.", fix="give 0 or more")
        if self.recover not in LEARNING and self.recover_data != "simulated":
            raise UsageError(
                f"--recover {self.recover} learns from no --recover-data.", fix="give --recover distill or finetune"
            )
        if not 1 <= self.capacity_margin < math.inf:
            raise UsageError(
                f"--capacity-margin {self.capacity_margin:g} leaves no room for the calibration frames themselves.",
                fix="give a number from 1 on",
            )
        rooms_from_text(self.capacities)
        if not 0.001 <= self.voxel_keep <= 1 or (self.voxel_keep < 1 and self.cost == "latency"):
            raise UsageError(
                f"--voxel-keep {self.voxel_keep:g} is no share of voxels that --cost {self.cost} can count.",
                fix="give 0.001 to 1, and a target in MACs: no profile holds times of fewer voxels",
            )
        self._check_goal()
        self._check_method()

    def _check_goal(self) -> None:
        goals = {"--target": self.target if self.target is not None else self.target_ms}
        goals["--max-distortion"] = self.max_distortion
        given = [name for name, value in goals.items() if value is not None]
        if len(given) != 1 or (self.target is not None and self.target_ms is not None):
            raise UsageError(
                f"a build has one goal, not {len(given) or 'none'}.",
                fix="give --target 0.3, --target 25ms or --max-distortion 0.05, and only one of them",
            )
        if self.target is not None and not (isinstance(self.target, (int, float)) and 0 < self.target <= 1):
            raise UsageError(
                f"the target {self.target} is not a share of MACs in (0, 1].", fix="for example --target 0.3 keeps 30 %"
            )
        for word, value in (("target in ms", self.target_ms), ("largest distortion", self.max_distortion)):
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"the {word} is {value}.", fix="give a number above 0")
        if self.target_ms is not None and self.cost != "latency":
            raise UsageError(f"a target in ms is a latency, not --cost {self.cost}.", fix="give --cost latency")
        if self.profile is not None and self.cost != "latency":
            raise UsageError(f"--cost {self.cost} reads no profile.", fix="give --cost latency, or no --profile")

    @property
    def goal(self) -> str:
        """The goal in a word, as a run's folder is named after it: `0.3`, `25ms`, `distortion0.05`."""
        if self.target is not None:
            return f"{self.target:g}"
        return f"{self.target_ms:g}ms" if self.target_ms is not None else f"distortion{self.max_distortion:g}"

    def _check_method(self) -> None:
        if self.patterns == "channels" and (self.cost == "macs" or self.max_distortion is not None):
            raise UsageError(
                "--patterns channels takes channels and blocks whole, by executed MACs or by a time only.",
                fix="give --target 0.5 and --cost executed, or --target 25ms",
            )
        if self.method != "dm3d" and (self.target is None or self.cost != "macs"):
            raise UsageError(
                f"--method {self.method} knows no budget but a share of MACs.", fix="give --target 0.3 and no --cost"
            )
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
    if "model" not in data:
        raise UsageError("the recipe has no 'model'.", fix="add model")
    return Recipe(**data)


def rooms_from_text(text: str) -> dict[str, int]:
    """Rows by stage of the 3D plan, and of `points`: "stage2_down=60000,points=300000"; nothing where it is empty."""
    rooms: dict[str, int] = {}
    for word in filter(None, text.split(",")):
        name, _, rows = (part.strip() for part in word.partition("="))
        if not name or name in rooms or not rows.isascii() or not rows.isdigit() or int(rows) < 1:
            raise UsageError(
                f"--capacities {text} is no list of STAGE=ROWS: '{word}' is wrong or comes twice.",
                fix="for example stage2_down=60000,points=300000; `dm3d-deploy plan inspect RUN` names the stages",
            )
        rooms[name] = int(rows)
    return rooms


def goal_from_text(text: str) -> dict[str, float]:
    """The recipe field that a target means: `0.3` a share of the cost, `25ms` a time."""
    number, field = (text[:-2], "target_ms") if text.strip().endswith("ms") else (text, "target")
    try:
        return {field: float(number)}
    except ValueError:
        raise UsageError(f"the target '{text}' is no number.", fix="give --target 0.3 or --target 25ms") from None
