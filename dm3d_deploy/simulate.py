"""Write simulated, labelled frames to disk; a run that was interrupted goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from calib.dataset import INFO_NAME, LABELS, DatasetInfo, read_info
from calib.simulated_dataset import write_frame
from calib.simulator import CLASS_NAMES, simulate_frame
from calib.simulator.sensor import sensor_named
from dm3d_deploy.artifacts import disk_errors, write_json
from dm3d_deploy.errors import UsageError

MOST_FRAMES = 1_000_000


def simulate(
    out: Path | str,
    *,
    sensor: str = "hdl64",
    frames: int = 100,
    seed: int = 0,
    advanced: Callable[[int, int], None] | None = None,
) -> DatasetInfo:
    """Write the frames of the seeds `seed`, `seed` + 1, ... into the folder `out` in KITTI's layout.

    Points of every sensor keep their own columns as float32; dataset.json names them. Frames that are there already
    stay, so the same call finishes what was interrupted and a larger `frames` adds to it. `advanced(done, frames)` is
    called after each frame. Raises UsageError for settings that make no frames and for a folder that holds
    anything but frames of this sensor and seed, Dm3dError for a disk that refuses.
    """
    root = Path(out)
    model = sensor_named(sensor)
    if not 1 <= frames <= MOST_FRAMES:
        raise UsageError(f"{frames} frames cannot be simulated.", fix=f"ask for 1 to {MOST_FRAMES} frames")
    if seed < 0:
        raise UsageError(f"{seed} is no seed.", fix="use a whole number of 0 or more")
    info = DatasetInfo(sensor=sensor, seed=seed, frames=frames, columns=model.columns, classes=CLASS_NAMES)
    _prepare(root, info)
    for index in range(frames):
        name = f"{index:06d}"
        if not (root / LABELS / f"{name}.txt").is_file():
            write_frame(root, name, simulate_frame(seed + index, sensor=sensor))
        if advanced is not None:
            advanced(index + 1, frames)
    return info


def _prepare(root: Path, info: DatasetInfo) -> None:
    """State the set before its first frame, so that a later call knows what it finds."""
    path = root / INFO_NAME
    if path.is_file():
        found = read_info(path)
        if replace(found, frames=info.frames) != info:
            raise UsageError(
                f"{root} holds frames of {found.sensor} from seed {found.seed}, not of {info.sensor} from seed "
                f"{info.seed}.",
                fix="choose another folder, or the same --sensor and --seed",
            )
        if found.frames >= info.frames:
            return
    elif root.is_dir():
        with disk_errors(root):
            other = min((path.name for path in root.iterdir()), default=None)
        if other is not None:
            raise UsageError(
                f"{root} holds {other} and no {INFO_NAME}: it is no data set that simulate wrote.",
                fix="choose a new or empty folder",
            )
    write_json(path, info.as_json())
