"""The contracts of what was found out: comparisons and latencies; one function measures, another judges."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dm3d_deploy.errors import InternalError


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """What a comparison must reach. There are no defaults: whoever compares says what is good enough."""

    max_relative: float
    min_cosine: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One output of two executions: `max_relative` is max|diff| / max|reference|, `worst` locates the largest.

    `detail` carries what a relative error cannot say (boxes matched, centimetres).
    """

    output: str
    reference: str
    candidate: str
    frames: int
    max_abs: float
    max_relative: float
    cosine: float
    worst: str
    tolerance: str
    passed: bool
    detail: str = ""

    def __post_init__(self) -> None:
        if self.passed and (
            self.frames < 1 or not all(map(math.isfinite, (self.max_abs, self.max_relative, self.cosine)))
        ):
            raise InternalError(f"{self.output}: a comparison without finite evidence cannot pass")

    def as_json(self) -> dict[str, Any]:
        """Plain data for report.json, where what is not finite is null."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


def compare_arrays(
    output: str, reference: np.ndarray, candidate: np.ndarray, *, names: tuple[str, str], tolerance: Tolerance
) -> Comparison:
    """Compare one output of one frame; NaN, a different shape or an empty array fails."""
    limits = f"relative <= {tolerance.max_relative:g}, cosine >= {tolerance.min_cosine:g}"
    if reference.shape != candidate.shape or reference.size == 0:
        return Comparison(
            output=output,
            reference=names[0],
            candidate=names[1],
            frames=1,
            max_abs=math.nan,
            max_relative=math.nan,
            cosine=math.nan,
            worst="",
            tolerance=limits,
            passed=False,
            detail=f"shapes {reference.shape} and {candidate.shape} cannot be compared",
        )
    a, b = reference.astype(np.float64).ravel(), candidate.astype(np.float64).ravel()
    difference = np.abs(a - b)
    worst = int(np.nanargmax(difference)) if not np.isnan(difference).all() else 0
    scale = float(np.abs(a).max())
    max_abs = float(difference.max())
    norm = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    cosine = float(a @ b) / norm if norm > 0 else (1.0 if max_abs == 0 else 0.0)
    relative = max_abs / scale if scale > 0 else (0.0 if max_abs == 0 else math.inf)
    passed = relative <= tolerance.max_relative and cosine >= tolerance.min_cosine  # NaN compares false
    index = tuple(int(i) for i in np.unravel_index(worst, reference.shape))
    return Comparison(
        output=output,
        reference=names[0],
        candidate=names[1],
        frames=1,
        max_abs=max_abs,
        max_relative=relative,
        cosine=cosine,
        worst=f"{index}: {a[worst]:.6g} against {b[worst]:.6g}",
        tolerance=limits,
        passed=passed,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Samples of one stage of one variant, in milliseconds, with the clock that timed them."""

    stage: str
    variant: str
    samples_ms: tuple[float, ...]
    clock: str
    backend: str
    voxels: tuple[int, ...]
    measured: bool

    def __post_init__(self) -> None:
        if self.measured and not self.samples_ms:
            raise InternalError(f"{self.stage}: a latency without samples was not measured")

    def percentile_ms(self, percent: float) -> float:
        """Percentile by linear interpolation."""
        return float(np.percentile(np.asarray(self.samples_ms), percent))

    def as_json(self) -> dict[str, Any]:
        """Plain data for report.json: summary first, then every sample."""
        samples = np.asarray(self.samples_ms)
        return {
            "stage": self.stage,
            "variant": self.variant,
            "backend": self.backend,
            "clock": self.clock,
            "n": len(samples),
            "min_ms": float(samples.min()),
            "mean_ms": float(samples.mean()),
            "p50_ms": self.percentile_ms(50),
            "p90_ms": self.percentile_ms(90),
            "p99_ms": self.percentile_ms(99),
            "max_ms": float(samples.max()),
            "p99_indicative": len(samples) < 1000,
            "measured": self.measured,
            "voxels": list(self.voxels),
            "samples_ms": [float(s) for s in samples],
        }
