"""Work over frames in child processes of one thread each: twice as fast on two cores, and the same bits on any number.

A frame's result is computed by one thread, so it does not depend on how many processes or cores there are.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dm3d_deploy import errors
from dm3d_deploy.artifacts import disk_errors, write_json
from dm3d_deploy.errors import Dm3dError, InternalError

PROCESSES = 2
ERROR_MARK = "dm3d-error "
DONE_MARK = "dm3d-done "
PART_MARK = "dm3d-part "
IDLE_MARK = "dm3d-idle"


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameJob:
    """What to do with each frame: `kind` names a function of frame_worker, `settings` are its plain parameters.

    Paths are absolute. Frame `i` leaves `out_dir/i.safetensors`. Without `frames_file`, settings["drawn"] describes
    labelled frames that the child draws itself (calib.labelled_frames), and leaves the labels beside the result.
    """

    kind: str
    config_text: str
    weights: str
    frames_file: str | None
    frames: tuple[int, ...]
    out_dir: str
    settings: dict[str, Any]


def result_path(out_dir: Path, frame: int) -> Path:
    """Where the result of a frame lies."""
    return out_dir / f"{frame:04d}.safetensors"


class FramePool:
    """Child processes that take jobs until the pool is closed; they start with the first job.

    A child whose parent is gone leaves at the end of its pipe, or behind the frame it is working on.
    """

    def __init__(self, processes: int = PROCESSES) -> None:
        self._count = max(1, min(processes, os.cpu_count() or 1))
        self._children: list[subprocess.Popen[str]] = []
        self._lines: queue.SimpleQueue[tuple[int, str | None]] = queue.SimpleQueue()

    def __enter__(self) -> FramePool:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def close(self) -> None:
        """End the children, whatever they are doing."""
        for child in self._children:
            child.kill()
            child.wait()
            if child.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    child.stdin.close()
        self._children = []
        self._lines = queue.SimpleQueue()

    def run(
        self,
        job: FrameJob,
        *,
        advanced: Callable[[int, int], None],
        walked: Callable[[int, int], None] | None = None,
    ) -> list[Path]:
        """Run a job and return the frames' result files, in the order of `job.frames`.

        `advanced` gets the frames done and their number; `walked`, from jobs that walk through layers, the layers.

        Raises the child's own Dm3dError, or InternalError with the last lines of a child that died otherwise.
        """
        folder = Path(job.out_dir)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        while len(self._children) < min(self._count, len(job.frames)):
            self._start()
        job_path = folder / "job.json"
        write_json(job_path, asdict(job))
        for index, child in enumerate(self._children):
            if child.stdin is None:
                raise InternalError("a frame worker has no input pipe")
            child.stdin.write(f"{index} {len(self._children)} {job_path}\n")
            child.stdin.flush()
        try:
            self._wait(total=len(job.frames), advanced=advanced, walked=walked)
        except BaseException:
            self.close()
            raise
        job_path.unlink()
        return [result_path(folder, frame) for frame in job.frames]

    def _wait(
        self, *, total: int, advanced: Callable[[int, int], None], walked: Callable[[int, int], None] | None
    ) -> None:
        """Read what the children say until each has finished its share."""
        said: list[list[str]] = [[] for _ in self._children]
        busy = len(self._children)
        done = 0
        advanced(done, total)
        while busy:
            index, line = self._lines.get()
            if line is None:
                raise _failure(said[index], self._children[index].wait())
            if line.startswith(DONE_MARK):
                done += 1
                advanced(done, total)
            elif line.startswith(PART_MARK):
                if walked is not None:
                    walked(*(int(word) for word in line.removeprefix(PART_MARK).split()))
            elif line.startswith(IDLE_MARK):
                busy -= 1
            else:
                said[index].append(line.rstrip())

    def _start(self) -> None:
        child = _child()
        threading.Thread(target=_listen, args=(len(self._children), child, self._lines), daemon=True).start()
        self._children.append(child)


def _listen(index: int, child: subprocess.Popen[str], lines: queue.SimpleQueue[tuple[int, str | None]]) -> None:
    """Pass on a child's lines, then None: pipes of several children cannot be read in turn without blocking."""
    if child.stdout is not None:
        with child.stdout as stream:
            for line in stream:
                lines.put((index, line))
    lines.put((index, None))


def _child() -> subprocess.Popen[str]:
    environment = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    root = str(Path(__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "calib.frame_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
        env=environment,
    )


def _failure(lines: Sequence[str], code: int) -> Exception:
    for line in lines:
        if line.startswith(ERROR_MARK):
            told = json.loads(line[len(ERROR_MARK) :])
            kind = getattr(errors, told["class"], Dm3dError)
            error: Exception = kind(told["what"], fix=told["fix"])
            return error
    return InternalError(f"a frame worker ended with code {code}: " + " | ".join(lines[-3:]))
