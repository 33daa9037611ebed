"""How fast to learn, by how much of the training is over."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dm3d_deploy.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class OneCycle:
    """One-cycle (Smith 2018): the rate climbs to `peak_rate`, then falls on a cosine; momentum does the opposite.

    The rate starts at `start` and ends at `end` times the peak.
    """

    peak_rate: float = 2e-3
    climb: float = 0.15
    start: float = 0.1
    end: float = 0.005
    momentum: tuple[float, float] = (0.95, 0.85)

    def __post_init__(self) -> None:
        if not 0 < self.peak_rate < 1:
            raise UsageError(f"a peak learning rate of {self.peak_rate} cannot train.", fix="use about 0.002")

    def at(self, done: float) -> tuple[float, float]:
        """Learning rate and momentum when the share `done` (0..1) of the training is over."""
        high, low = self.momentum
        if done < self.climb:
            part = done / self.climb
            return self.peak_rate * (self.start + (1 - self.start) * part), high + (low - high) * part
        part = min((done - self.climb) / (1 - self.climb), 1.0)
        fall = 0.5 * (1 + math.cos(math.pi * part))
        return self.peak_rate * (self.end + (1 - self.end) * fall), low + (high - low) * part
