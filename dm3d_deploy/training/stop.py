"""How a training is asked to end: it finishes its step and saves, instead of dying where it stands."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(KeyboardInterrupt):
    """A training that ended because it was told to; the message says what is kept, the code which signal told it."""

    def __init__(self, what: str, number: int) -> None:
        super().__init__(what)
        self.exit_code = 128 + number


class Stop:
    """Whether a signal asked for the end: `number` is the first one heard, None before.

    While it is `patient`, SIGINT and SIGTERM only ask, and a second SIGINT raises KeyboardInterrupt; else each does.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._patient = False

    @property
    def asked(self) -> bool:
        """Whether a signal was heard."""
        return self.number is not None

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Within, both signals come here, but those that are ignored already; outside the main thread none can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        ours = [number for number in SIGNALS if before[number] != signal.SIG_IGN]
        try:
            for number in ours:
                signal.signal(number, self._hear)
            yield
        finally:
            for number in ours:
                signal.signal(number, before[number])

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Within, a signal is something to look for."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        again = self.asked and number == signal.SIGINT  # SIGTERM may come twice: to a process and to its group
        self.number = self.number or number
        if again or not self._patient:
            raise KeyboardInterrupt
