"""The contracts of pruning: layers, curves, budgets, choices, masks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float64

from dm3d_deploy.errors import InternalError, UsageError

Part = Literal["3d", "2d", "head"]
Kind = Literal["sparse", "linear", "conv2d", "deconv2d"]
DIMENSIONS = {"sparse": (4, 5), "linear": (2,), "conv2d": (4,), "deconv2d": (4,)}
Pattern = Literal["unstructured", "2:4", "tile", "channel", "depth", "dense"]
Scope = Literal["backbone", "model", "backbone3d"]
Cost = Literal["macs", "executed", "latency"]
Unit = Literal["macs", "executed", "ms"]

ROUNDING = 1e-12  # relative: sums of the same MACs in another order differ by this much at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One convolution: its weight's native shape and how often each of its taps multiplies.

    Native shapes: sparse [Cout, kz, ky, kx, Cin], without kz where flat, linear [Cout, Cin, 1...], conv2d
    [Cout, Cin, kh, kw], deconv2d [Cin, Cout, kh, kw].
    `positions` holds, per tap in row-major order of the kernel ((z * ky + y) * kx + x), the
    multiplications per weight of that tap, averaged over the calibration frames: rulebook pairs for a sparse layer,
    rows for a linear one (points of pillars, places of RoIs), map cells for a dense one. `final` marks the last
    convolution of a head branch, which stays dense.
    """

    name: str
    part: Part
    kind: Kind
    shape: tuple[int, ...]
    positions: Float64[np.ndarray, " taps"]
    final: bool = False
    spared_macs: float = 0.0

    def __post_init__(self) -> None:
        if self.part not in get_args(Part) or self.kind not in get_args(Kind):
            raise InternalError(f"{self.name}: no such part or kind of layer: '{self.part}', '{self.kind}'")
        spare = self.shape[2:] if self.kind == "linear" else ()  # OpenPCDet writes some as convolutions of extent one
        known = len(self.shape) - len(spare) in DIMENSIONS[self.kind]
        if not known or min(self.shape) < 1 or max(spare, default=1) > 1:
            raise InternalError(f"{self.name}: {self.shape} is no {self.kind} weight")
        if self.positions.shape != (self.taps,) or self.positions.dtype != np.float64:
            raise InternalError(
                f"{self.name}: positions of shape {self.positions.shape} and type {self.positions.dtype} "
                f"do not fit {self.taps} taps"
            )
        if not np.isfinite(self.positions).all() or float(self.positions.min()) < 0:
            raise InternalError(f"{self.name}: positions must be finite and not negative")

    @property
    def inputs(self) -> int:
        """Input channels."""
        return self.shape[{"sparse": -1, "linear": 1, "conv2d": 1, "deconv2d": 0}[self.kind]]

    @property
    def outputs(self) -> int:
        """Output channels."""
        return self.shape[1 if self.kind == "deconv2d" else 0]

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel extent: z, y, x of a sparse layer, y, x of a dense one, nothing of a linear one."""
        return self.shape[1:-1] if self.kind == "sparse" else self.shape[2:4]

    @property
    def taps(self) -> int:
        """Kernel offsets."""
        return math.prod(self.kernel)

    @property
    def weights(self) -> int:
        """Number of weights, the bias left out."""
        return math.prod(self.shape)

    @property
    def macs(self) -> float:
        """Multiply-accumulates per frame with all weights."""
        return float((self.positions * (self.inputs * self.outputs)).sum())

    @property
    def dense_macs(self) -> float:
        """The same with all voxels, too: `spared_macs` more."""
        return self.macs + self.spared_macs


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """What one layer loses and costs at each point of one pattern, the other layers left dense.

    `ratio` is the share of weights that the point really prunes (whole tiles may prune less than was asked for, so
    neighbours can be equal), `distortion` the mean squared change of the normalised output, `cost` what is kept.
    """

    layer: str
    pattern: Pattern
    ratio: Float64[np.ndarray, " points"]
    distortion: Float64[np.ndarray, " points"]
    cost: Float64[np.ndarray, " points"]
    unit: Unit = "macs"

    def __post_init__(self) -> None:
        where = f"{self.layer} ({self.pattern})"
        arrays = (self.ratio, self.distortion, self.cost)
        if self.pattern not in get_args(Pattern) or self.unit != "macs":
            raise InternalError(f"{where}: no such pattern or unit '{self.unit}'")
        if self.ratio.ndim != 1 or not len(self.ratio) or any(a.shape != self.ratio.shape for a in arrays):
            raise InternalError(f"{where}: curve arrays disagree: {[a.shape for a in arrays]}")
        if not all(np.isfinite(a).all() for a in arrays):
            raise InternalError(f"{where}: a curve must be finite")
        if self.ratio[0] < 0 or self.ratio[-1] > 1 or (np.diff(self.ratio) < 0).any():
            raise InternalError(f"{where}: pruned shares must rise within 0..1")
        if self.distortion[0] < 0 or (np.diff(self.distortion) < 0).any():
            raise InternalError(f"{where}: distortion must not fall as more is pruned")
        if self.cost[-1] < 0 or (np.diff(self.cost) > 0).any():
            raise InternalError(f"{where}: cost must not rise as more is pruned")
        if self.ratio[0] == 0 and self.distortion[0] != 0:
            raise InternalError(f"{where}: nothing pruned, yet the distortion is {self.distortion[0]:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The share of the dense cost that may be kept: kept / `denominator` <= `value`.

    `denominator` is the dense cost of everything that counts: for MACs, kept or executed, both backbones (`scope`, the
    paper's) or the whole model; for milliseconds the whole network, whatever may be pruned.
    """

    value: float
    denominator: float
    scope: Scope = "backbone"
    unit: Unit = "macs"

    def __post_init__(self) -> None:
        if not 0 < self.value <= 1:
            raise UsageError(
                f"The target {self.value:g} is no share of the dense cost.",
                fix="give --target a number above 0 and at most 1, such as 0.5",
            )
        if self.scope not in get_args(Scope) or self.unit not in get_args(Unit):
            raise InternalError(f"no such scope or unit of a budget: '{self.scope}', '{self.unit}'")
        if not 0 < self.denominator < math.inf:
            raise InternalError(f"a budget's denominator must be finite and positive, not {self.denominator:g}")

    @property
    def limit(self) -> float:
        """The largest allowed cost, in `unit`."""
        return self.value * self.denominator


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One point of one layer's curve: `step` is its index there. The knapsack's item, and its answer."""

    layer: str
    pattern: Pattern
    step: int
    ratio: float
    distortion: float
    cost: float

    def __post_init__(self) -> None:
        if not (0 <= self.ratio <= 1 and 0 <= self.distortion < math.inf and 0 <= self.cost < math.inf):
            raise InternalError(
                f"{self.layer}: ratio {self.ratio:g}, distortion {self.distortion:g} and cost {self.cost:g} "
                "make no choice"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """One choice per layer. `cost` is all that the budget counts, layers that stay dense included.

    `distortion` is predicted (the sum over layers); `lower_bound` is the Lagrangian bound below which no choice of
    these points can get at this budget. Where `max_distortion` was asked for instead, the cost is what was minimised,
    `lower_bound` bounds the cost, and `budget` is what was reached. `widths` holds the channels that are left of each
    group that loses some, `dropped` the residual blocks of which the identity is left.
    """

    choices: tuple[Choice, ...]
    distortion: float
    cost: float
    budget: Budget
    lower_bound: float
    max_distortion: float | None = None
    widths: Mapping[str, int] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [choice.layer for choice in self.choices]
        if not names or len(set(names)) != len(names):
            raise InternalError(f"an allocation needs one choice per layer, not {len(names)} for {len(set(names))}")
        if not self.cost <= self.budget.limit * (1 + ROUNDING):
            raise InternalError(f"an allocation of {self.cost:.17g} exceeds its budget of {self.budget.limit:.17g}")
        if not (math.isfinite(self.distortion) and math.isfinite(self.lower_bound)):
            raise InternalError("an allocation's distortion and bound must be finite")
        if self.max_distortion is not None and not self.distortion <= self.max_distortion * (1 + ROUNDING):
            raise InternalError(f"a distortion of {self.distortion:.17g} exceeds {self.max_distortion:.17g}")

    @property
    def share(self) -> float:
        """Kept cost over dense cost, to be held against the target."""
        return self.cost / self.budget.denominator

    @property
    def gap(self) -> float:
        """How far from the optimum this can be at most: (found - bound) / found, never below 0."""
        found = self.distortion if self.max_distortion is None else self.cost
        return max(0.0, 1 - self.lower_bound / found) if found > 0 else 0.0

    def choice(self, layer: str) -> Choice:
        """The choice made for one layer."""
        for choice in self.choices:
            if choice.layer == layer:
                return choice
        raise InternalError(f"no choice was made for the layer {layer}")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightMask:
    """Which weights of a layer stay, in the weight's native shape."""

    layer: str
    pattern: Pattern
    keep: Bool[np.ndarray, "*shape"]

    def __post_init__(self) -> None:
        if self.keep.dtype != np.bool_ or self.keep.size == 0:
            raise InternalError(f"{self.layer}: a mask holds booleans, not {self.keep.dtype} {self.keep.shape}")

    @property
    def density(self) -> float:
        """Share of the weights that stay."""
        return float(np.count_nonzero(self.keep)) / self.keep.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A layer that was left out of something, and why; it reaches the report."""

    layer: str
    reason: str
