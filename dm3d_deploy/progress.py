"""How a long run tells whoever watches where it is."""

from __future__ import annotations

from typing import Protocol


class Watch(Protocol):
    """Receives the course of a run. Implementations print, draw or ignore it; they never decide anything."""

    def started(self, stage: str, says: str) -> None:
        """A stage begins."""

    def advanced(self, done: int, total: int) -> None:
        """`done` of `total` equal pieces of the current stage are finished."""

    def finished(self, stage: str, seconds: float, fresh: bool) -> None:
        """A stage ended; `fresh` means that nothing had to be done."""

    def noted(self, text: str) -> None:
        """Something a user should read."""


class Silent:
    """A watch that ignores everything."""

    def started(self, stage: str, says: str) -> None:
        """Ignore."""

    def advanced(self, done: int, total: int) -> None:
        """Ignore."""

    def finished(self, stage: str, seconds: float, fresh: bool) -> None:
        """Ignore."""

    def noted(self, text: str) -> None:
        """Ignore."""
