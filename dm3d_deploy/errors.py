"""Every way this tool says no: what happened, with its numbers, then the fix."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class Dm3dError(Exception):
    """Something the caller can act on: `what` happened, and the `fix`."""

    exit_code = 1

    def __init__(self, what: str, *, fix: str) -> None:
        super().__init__(f"{what} Fix: {fix}")
        self.what = what
        self.fix = fix


class UsageError(Dm3dError):
    """Unknown model, unknown key, impossible combination."""

    exit_code = 2


class MissingDependency(Dm3dError):
    """An optional package is absent; the fix names the extra that brings it."""

    exit_code = 3


class CheckpointError(Dm3dError):
    """Weights that do not fit the detector, or a file that is not weights."""

    exit_code = 4


class FrameError(Dm3dError):
    """A point cloud that cannot be read or cannot be used."""

    exit_code = 4


class InfeasibleBudget(Dm3dError):
    """No allocation meets the budget; `cheapest` is the smallest reachable share."""

    exit_code = 5

    def __init__(self, what: str, *, fix: str, cheapest: float) -> None:
        super().__init__(what, fix=fix)
        self.cheapest = cheapest


class DistortionMissed(Dm3dError):
    """No allocation truly stays within the distortion that was asked for."""

    exit_code = 5


class ExportError(Dm3dError):
    """A detector that cannot be written as ONNX, or an ONNX file that breaks its contract."""

    exit_code = 6


class EngineError(Dm3dError):
    """A backend refused a graph or an engine; its first error line is in `what`."""

    exit_code = 6


class StaleArtifact(Dm3dError):
    """A file is not the one that the manifest recorded."""

    exit_code = 7


class OutputError(Dm3dError):
    """Something could not be written: a full or read-only disk, a name that is taken."""

    exit_code = 8


class VerificationFailed(Dm3dError):
    """The question was asked and the answer is no."""

    exit_code = 1


class InternalError(Exception):
    """A bug of ours, not the caller's: it asks for a bug report."""

    exit_code = 70


def nearest(word: str, known: Iterable[str]) -> str:
    """A phrase that names the closest known spelling, or lists what is known."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return "known: " + ", ".join(names)


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional dependency, or say in one sentence which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingDependency(
            f"the Python package '{module.split('.')[0]}' is not installed.",
            fix=f"pip install 'dm3d-deploy[{extra}]'",
        ) from None
