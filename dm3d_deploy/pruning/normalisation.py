"""What the distortion is measured on: the normalised raw output y of a center-based detector.

Per frame, y holds two parts, each divided by its own energy so that metres, log sizes, sines and confidences weigh
alike:

- score: sqrt(lambda_score / score_energy) * sigmoid(heat map), all classes and cells of every task. `score_energy` is
  the dense model's sum of squared sigmoid maps over all tasks, averaged over the calibration frames.
- box: sqrt(lambda_box / values) * box / deviation, raw box channels at the `count` (500) most confident cells of the
  frame over all tasks. A cell's confidence is the dense model's largest class logit of that task there, and the cell
  brings the box channels of its own task. `values` counts the numbers so selected: cells times channels. `deviation`
  is, per task and channel, the dense model's standard deviation over those cells of the calibration frames; a task
  with fewer than 30 such cells takes the deviation over the cells of all tasks, and is named in `pooled`. It is never
  less than LEAST_DEVIATION: a velocity that the model holds constant to a millimetre a second would otherwise rule all.

The distortion of another model on that frame is ||dy||^2, at the cells that the dense model chose: 1 means an error
as large as the output itself.

Maps are named "<task>.<branch>", "0.hm" or "3.center", raw [1, channels, height, width]; every branch but `hm` is a
box branch. Of an anchor head, each anchor of a cell counts as a task: "0.cls" are its confidences, "0.box" and "0.dir"
its box channels. A second stage is one more task: its cells are the RoIs that the dense model proposes, "N.rcnn_cls"
their confidences and "N.rcnn_reg" their box channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int64

from dm3d_deploy.errors import FrameError, InternalError

BOX_CELLS = 500
MIN_TASK_CELLS = 30  # fewer do not make a standard deviation
# Differences below these matter to nobody: cells of the map, m, logarithms of m, sine and cosine, m/s.
LEAST_DEVIATION = {"center": 0.05, "center_z": 0.05, "dim": 0.02, "rot": 0.05, "vel": 0.1}
LEAST_OF_OTHERS = 0.05

Maps = Mapping[str, Float[np.ndarray, "1 channels height width"]]
Cells = dict[int, Int64[np.ndarray, " cells"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputScale:
    """What the outputs are divided by. `box_deviation` by map name, one number per channel; see the module."""

    score_energy: float
    box_deviation: dict[str, Float64[np.ndarray, " channels"]]
    box_cells: int
    frames: int
    pooled: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.frames < 1 or self.box_cells < 1 or not self.box_deviation or not 0 < self.score_energy < math.inf:
            raise InternalError(f"{self.frames} frames with a score energy of {self.score_energy:g} give no scale")
        for name, deviation in self.box_deviation.items():
            if not (np.isfinite(deviation).all() and (deviation > 0).all()):
                raise InternalError(f"the deviations of {name} must be finite and positive: {deviation}")

    def as_json(self) -> dict[str, Any]:
        """Plain data; numbers survive the way there and back."""
        deviations = {name: deviation.tolist() for name, deviation in self.box_deviation.items()}
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "box_deviation": deviations}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> OutputScale:
        """The inverse of `as_json`."""
        deviations = {name: np.asarray(values, dtype=np.float64) for name, values in data["box_deviation"].items()}
        return cls(**{**data, "box_deviation": deviations, "pooled": tuple(data["pooled"])})


def tasks_of(maps: Iterable[str]) -> tuple[int, ...]:
    """Task numbers, ascending, from the names of maps."""
    return tuple(sorted({int(name.split(".", 1)[0]) for name in maps}))


def score_name(maps: Iterable[str], task: int) -> str:
    """The map of a task's confidences: a CenterHead's heat map, an anchor's class scores, a second stage's scores."""
    return next((name for name in (f"{task}.hm", f"{task}.rcnn_cls") if name in maps), f"{task}.cls")


def box_names(maps: Iterable[str], task: int) -> tuple[str, ...]:
    """Those of the maps' names that are box maps of a task, in the order given."""
    return tuple(name for name in maps if name.startswith(f"{task}.") and name != score_name(maps, task))


def sigmoid(logits: Float[np.ndarray, "*shape"]) -> Float64[np.ndarray, "*shape"]:
    """1 / (1 + exp(-x)) in float64, without overflow."""
    small = np.exp(-np.abs(logits.astype(np.float64)))
    probability: np.ndarray = np.where(logits >= 0, 1.0, small) / (1.0 + small)
    return probability


def top_cells(maps: Maps, count: int = BOX_CELLS) -> Cells:
    """The `count` most confident cells of a frame over all tasks: per task flat cell indices, ascending.

    Confidence is the largest class logit; ties go to the lower task, then to the lower cell. All cells when there are
    fewer than `count`.
    """
    tasks = tasks_of(maps)
    confidences = [maps[score_name(maps, task)][0].max(axis=0).ravel() for task in tasks]
    if count < 1 or any(np.isnan(confidence).any() for confidence in confidences):
        raise InternalError("the most confident cells need a count and maps without NaN")
    order = np.argsort(-np.concatenate(confidences), kind="stable")[:count]
    starts = np.cumsum([0, *(len(confidence) for confidence in confidences)])
    return {
        task: np.sort(order[(order >= start) & (order < end)] - start)
        for task, start, end in zip(tasks, starts[:-1], starts[1:], strict=True)
    }


def output_scale(frames: Iterable[Maps], count: int = BOX_CELLS) -> OutputScale:
    """The scale of the dense model's outputs over the calibration frames, one frame at a time.

    FrameError when there is no frame.
    """
    energies: list[float] = []
    values: dict[str, list[np.ndarray]] = {}
    for maps in frames:
        energies.append(math.fsum(_energy(sigmoid(maps[score_name(maps, task)])) for task in tasks_of(maps)))
        for task, cells in top_cells(maps, count).items():
            for name in box_names(maps, task):
                values.setdefault(name, []).append(_at(maps[name], cells))
    if not energies:
        raise FrameError(
            "The outputs cannot be scaled: there are no calibration frames.", fix="give at least one frame"
        )
    deviation, pooled = _deviations({name: np.concatenate(parts, axis=1) for name, parts in values.items()})
    return OutputScale(
        score_energy=math.fsum(energies) / len(energies),
        box_deviation=deviation,
        box_cells=count,
        frames=len(energies),
        pooled=pooled,
    )


def output_distortion(
    dense: Maps, other: Maps, scale: OutputScale, cells: Cells, *, lambda_box: float = 1.0, lambda_score: float = 1.0
) -> float:
    """||y_other - y_dense||^2 of one frame; `cells` are `top_cells(dense, scale.box_cells)`."""
    if dense.keys() != other.keys() or any(dense[name].shape != other[name].shape for name in dense):
        raise InternalError("the outputs of two models differ in their maps")
    names = [score_name(dense, task) for task in tasks_of(dense)]
    score = math.fsum(_energy(sigmoid(other[name]) - sigmoid(dense[name])) for name in names)
    squares, count = [], 0
    for task, chosen in cells.items():
        for name in box_names(dense, task):
            change = (_at(other[name], chosen) - _at(dense[name], chosen)) / scale.box_deviation[name][:, None]
            squares.append(_energy(change))
            count += change.size
    distortion = lambda_score * score / scale.score_energy + lambda_box * math.fsum(squares) / count
    if not math.isfinite(distortion):
        raise InternalError("the outputs of two models differ by no finite number")
    return distortion


def _energy(values: Float64[np.ndarray, "*shape"]) -> float:
    return float(np.square(values).sum())


def _at(values: Float[np.ndarray, "1 channels height width"], cells: Int64[np.ndarray, " cells"]) -> np.ndarray:
    """Channels at flat cells, [channels, cells] in float64."""
    chosen: np.ndarray = values[0].reshape(values.shape[1], -1)[:, cells].astype(np.float64)
    return chosen


def _deviations(
    values: dict[str, Float64[np.ndarray, "channels cells"]],
) -> tuple[dict[str, Float64[np.ndarray, " channels"]], tuple[int, ...]]:
    """Deviation of each map's channels, no less than what its unit makes matter, and the tasks with too few cells."""
    deviations: dict[str, np.ndarray] = {}
    pooled: set[int] = set()
    for name, own in values.items():
        task, branch = name.split(".", 1)
        if own.shape[1] < MIN_TASK_CELLS:
            pooled.add(int(task))
            own = np.concatenate([other for key, other in values.items() if key.split(".", 1)[1] == branch], axis=1)
        deviations[name] = np.maximum(own.std(axis=1), LEAST_DEVIATION.get(branch, LEAST_OF_OTHERS))
    return deviations, tuple(sorted(pooled))
