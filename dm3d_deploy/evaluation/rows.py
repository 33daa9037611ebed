"""One line of a result table: an average precision, what it is over, and its precision-recall curve."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

ALL = "all"
RANGE_BINS_M = ((0.0, 30.0), (30.0, 50.0), (50.0, float("inf")))
RANGES = {"0-30 m": RANGE_BINS_M[0], "30-50 m": RANGE_BINS_M[1], "50+ m": RANGE_BINS_M[2]}
VULNERABLE = ("pedestrian", "cyclist", "bicycle", "motorcycle")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApRow:
    """Average precision of a class within a subset (a difficulty, a range or all); None where there was no object."""

    class_name: str
    subset: str
    measure: str
    objects: int
    ap_percent: float | None
    recall: tuple[float, ...]
    precision: tuple[float, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def vulnerable_first(names: tuple[str, ...]) -> tuple[str, ...]:
    """Pedestrians and riders before everything else, otherwise in the order given."""
    return tuple(sorted(names, key=lambda name: _place(name)))


def _place(name: str) -> int:
    lowered = name.lower()
    return VULNERABLE.index(lowered) if lowered in VULNERABLE else len(VULNERABLE)
