"""Which frames calibrate, which accept the recovery, and which only report: three roles that never share a frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calib.readers import list_frames, read_points
from calib.simulator.frame import simulate_frame
from dm3d_deploy.errors import UsageError
from dm3d_deploy.pointcloud import PointCloud

ROLES = ("calibration", "selection", "held_out")
SENSOR_OF_DATASET = {"NuScenesDataset": "nuscenes32", "KittiDataset": "hdl64", "ONCEDataset": "once40"}
SEED_OF_ROLE = {"calibration": 0, "selection": 500_000, "held_out": 700_000}
TURN_DEG = 45.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameRef:
    """One frame of the set: a file (perhaps turned about z and mirrored in y) or a simulated scene."""

    role: str
    path: str | None = None
    seed: int | None = None
    sensor: str | None = None
    turn_deg: float = 0.0
    mirrored: bool = False

    @property
    def label(self) -> str:
        """What the report calls it."""
        if self.path is None:
            return f"simulated {self.sensor} seed {self.seed}"
        changes = (f" turned {self.turn_deg:g} deg" if self.turn_deg else "") + (" mirrored" if self.mirrored else "")
        return Path(self.path).name + changes

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class FramePlan:
    """The set, with what a reader of the report must know about it."""

    frames: tuple[FrameRef, ...]
    notes: tuple[str, ...]

    def of(self, role: str) -> tuple[FrameRef, ...]:
        """The frames of one role, in order."""
        return tuple(frame for frame in self.frames if frame.role == role)


def _simulated(role: str, count: int, sensor: str, seed: int) -> list[FrameRef]:
    first = SEED_OF_ROLE[role] + 1_000_000 * seed
    return [FrameRef(role=role, seed=first + index, sensor=sensor) for index in range(count)]


def split_counts(available: int, *, calibration: int, selection: int, held_out: int) -> tuple[int, int, int]:
    """How many of `available` >= 2 real frames take each role: the wanted numbers, or shares of about 4 : 1 : 2."""
    if available >= calibration + selection + held_out:
        return calibration, selection, held_out
    held = max(1, min(held_out, available * 2 // 7))
    chosen = min(selection, max(0, (available - held) // 5) or int(available - held >= 2))
    return min(calibration, available - held - chosen), chosen, held


def plan_frames(source: str, *, dataset: str, calibration: int, selection: int, held_out: int, seed: int) -> FramePlan:
    """Choose the frames.

    Simulated: three disjoint ranges of seeds. A folder: evenly spaced files, dealt to the roles in turn. One file:
    calibration on turned and mirrored copies of it; what accepts and reports is simulated, because one frame cannot
    both be calibrated on and held out.
    """
    sensor = SENSOR_OF_DATASET.get(dataset)
    if sensor is None:
        raise UsageError(
            f"no simulated sensor stands for the data set '{dataset}'.",
            fix="use a config of " + ", ".join(SENSOR_OF_DATASET),
        )
    if source == "simulated":
        wanted = {"calibration": calibration, "selection": selection, "held_out": held_out}
        frames = [ref for role in ROLES for ref in _simulated(role, wanted[role], sensor, seed)]
        return FramePlan(frames=tuple(frames), notes=(f"all frames are simulated ({sensor})",))
    files = list_frames(Path(source))
    if len(files) == 1:
        path = str(files[0])
        copies = [
            FrameRef(role="calibration", path=path, turn_deg=TURN_DEG * index, mirrored=bool(index % 2))
            for index in range(calibration)
        ]
        others = [
            ref
            for role, count in (("selection", selection), ("held_out", held_out))
            for ref in _simulated(role, count, sensor, seed)
        ]
        note = (
            f"one real frame: it was calibrated on in {calibration} turned and mirrored copies, so the held-out frames "
            f"are simulated ({sensor}); give a folder of frames to hold out real ones"
        )
        return FramePlan(frames=(*copies, *others), notes=(note,))
    counts = split_counts(len(files), calibration=calibration, selection=selection, held_out=held_out)
    chosen = evenly_spaced(files, sum(counts))
    roles = deal(counts)
    refs = tuple(FrameRef(role=role, path=str(path)) for role, path in zip(roles, chosen, strict=True))
    dealt = f"{counts[0]} calibrate, {counts[1]} select, {counts[2]} report"
    notes = [f"{len(chosen)} of {len(files)} real frames: {dealt}"]
    if counts[1] < selection:
        notes.append(f"{selection} frames were wanted to accept or refuse the recovery, {counts[1]} could be spared")
    if counts[0] < calibration:
        notes.append(f"{calibration} calibration frames were wanted, {counts[0]} could be had")
    return FramePlan(frames=refs, notes=tuple(notes))


def evenly_spaced(files: Sequence[Path], count: int) -> list[Path]:
    """`count` files spread over the whole list, in order."""
    return [files[index * len(files) // count] for index in range(count)]


def deal(counts: tuple[int, int, int]) -> list[str]:
    """Deal the roles in turn, so that no role takes one end of a drive."""
    places = [((index + 0.5) / count, order) for order, count in enumerate(counts) for index in range(count)]
    return [ROLES[order] for _, order in sorted(places)]


def load_frame(ref: FrameRef) -> PointCloud:
    """The point cloud of a reference."""
    if ref.path is None:
        if ref.seed is None or ref.sensor is None:
            raise UsageError("a frame reference names neither a file nor a seed.", fix="rebuild with --from frames")
        return simulate_frame(ref.seed, sensor=ref.sensor).cloud
    return turned(read_points(Path(ref.path)), ref.turn_deg, ref.mirrored)


def turned(cloud: PointCloud, turn_deg: float, mirrored: bool) -> PointCloud:
    """The cloud turned about z, after mirroring it in y where asked."""
    if turn_deg == 0 and not mirrored:
        return cloud
    angle = np.deg2rad(turn_deg)
    points = cloud.points.copy()
    x, y = cloud.points[:, 0].astype(np.float64), cloud.points[:, 1].astype(np.float64) * (-1 if mirrored else 1)
    points[:, 0] = x * np.cos(angle) - y * np.sin(angle)
    points[:, 1] = x * np.sin(angle) + y * np.cos(angle)
    return PointCloud(points=points, columns=cloud.columns, source=cloud.source)
