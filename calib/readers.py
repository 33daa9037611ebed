"""Frames from disk: KITTI, nuScenes and ONCE .bin, .npy and .pcd, or a refusal that names the file and the byte."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32

from calib.pcd_reader import Table, read_pcd
from dm3d_deploy.errors import FrameError, UsageError
from dm3d_deploy.pointcloud import PointCloud

SUFFIXES = (".bin", ".pcd", ".npy")
FOLDERS = (Path(), Path("velodyne"), Path("training/velodyne"))
HALF_SUFFIX = ".f16x5.bin"
HALF_COLUMNS = ("x", "y", "z", "intensity", "timestamp")
MAX_FRAME_BYTES = 1 << 29
SENSOR_REACH_M = 300.0
ABSURD_M = 10_000.0
ORIGIN_M = 0.01
PLAUSIBLE = {"intensity": (0.0, 255.0), "ring": (0.0, 127.0), "timestamp": (0.0, 2.0)}  # raw, index, seconds
NPY_HEADER = re.compile(
    r"\{'descr': '[<|=](f[248])', 'fortran_order': (True|False), 'shape': \((\d{1,12}), (\d{1,12})\),? *\}\s*"
)
FIX_FRAME = "give a LiDAR frame in metres (KITTI, nuScenes or ONCE .bin, .npy, .pcd)"


def list_frames(path: str | Path) -> tuple[Path, ...]:
    """The frames of a folder (itself, `velodyne` or `training/velodyne`) sorted by name, or the one file given."""
    path = Path(path)
    try:
        if path.is_file():
            return (path,)
        for folder in FOLDERS:
            if (path / folder).is_dir():
                files = sorted(p for p in (path / folder).iterdir() if p.is_file() and not p.name.startswith("."))
                frames = tuple(p for p in files if p.suffix.lower() in SUFFIXES)
                if frames:
                    return frames
        if not path.is_dir():
            raise FrameError(f"there is no file or folder {path}.", fix="check the path")
    except OSError as error:
        raise FrameError(
            f"{path} cannot be read: {error.strerror}.", fix="check the path and its permissions"
        ) from None
    raise FrameError(
        f"the folder {path} holds no {', '.join(SUFFIXES)} file, nor does velodyne or training/velodyne in it.",
        fix="give a folder of frames",
    )


def read_points(path: str | Path, columns: tuple[str, ...] | None = None) -> PointCloud:
    """Read one frame; `columns` names its columns where the guess would fail.

    float32 .bin has 4 columns (x, y, z, intensity: KITTI, ONCE) or 5 (and ring: nuScenes; or timestamp, seconds: sweeps
    put together); `.f16x5.bin` is float16 with a timestamp; .npy has 3 to 6 columns; .pcd names its own. Where the byte
    count fits both 4 and 5 columns, the reading with fewer implausible values is taken; equal ones are refused.
    `describe` says what was taken. Raises `FrameError` with file, place and fix.
    """
    path = Path(path)
    if columns is not None and (columns[:3] != ("x", "y", "z") or len(set(columns)) != len(columns)):
        raise UsageError(f"columns {', '.join(columns)} do not start with x, y, z.", fix="name each column once")
    data = _bytes_of(path)
    name = path.name.lower()
    if name.endswith(".pcd"):
        names, table = read_pcd(data, str(path), columns)
    elif name.endswith((".npy", ".bin")):
        table = (_npy_table if name.endswith(".npy") else _bin_table)(data, path, columns)
        names = columns or (HALF_COLUMNS if name.endswith(HALF_SUFFIX) else _guessed_names(table[0]))
    else:
        raise FrameError(f"{path} is no frame: known endings are {', '.join(SUFFIXES)}.", fix=FIX_FRAME)
    _check_values(table, names, path)
    if columns is None:
        _check_guess(table, names, path)
    return PointCloud(points=table[0], columns=names, source=str(path))


def describe(cloud: PointCloud) -> str:
    """One line: what the columns were taken to be, the values that say so, and the scale of the intensity."""
    parts = [f"{cloud.source or 'frame'}: {len(cloud.points)} points, columns {', '.join(cloud.columns)}"]
    for name in cloud.columns[3:]:
        column = cloud.column(name)
        low, high = (float(column.min()), float(column.max())) if len(column) else (0.0, 0.0)
        meaning = ""
        if name == "intensity":
            meaning = " (scale 0..1, as KITTI)" if high <= 1 else " (scale 0..255, as nuScenes and ONCE)"
        elif name == "ring":
            meaning = " (whole numbers: the laser of each point, no time)"
        elif name == "timestamp":
            meaning = " s (time before the key frame)"
        parts.append(f"{name} {low:g} to {high:g}{meaning}")
    if "timestamp" not in cloud.columns:
        parts.append("no timestamp: one sweep")
    return "; ".join(parts)


def _bytes_of(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise FrameError(f"{path} is a folder, not a frame.", fix="give one of its files")
        if not path.is_file():
            raise FrameError(f"there is no frame {path}.", fix="check the path")
        with path.open("rb") as file:
            data = file.read(MAX_FRAME_BYTES + 1)
    except OSError as error:
        raise FrameError(
            f"{path} cannot be read: {error.strerror}.", fix="check the path and its permissions"
        ) from None
    if not data:
        raise FrameError(f"{path} is empty (0 bytes).", fix="copy the frame again")
    if len(data) > MAX_FRAME_BYTES:
        raise FrameError(f"{path} is larger than {MAX_FRAME_BYTES} bytes, which no frame is.", fix=FIX_FRAME)
    return data


def _table(data: bytes, dtype: str, start: int, width: int, *, by_column: bool = False) -> Table:
    flat = np.frombuffer(data, dtype=dtype, offset=start)
    rows, item = len(flat) // width, flat.itemsize
    with np.errstate(over="ignore", invalid="ignore"):
        values = flat.reshape((rows, width), order="F" if by_column else "C").astype(np.float32, order="C")

    def place(row: int, column: int) -> str:
        return f"byte {start + item * (column * rows + row if by_column else row * width + column)}"

    return values, place


def _bin_table(data: bytes, path: Path, columns: tuple[str, ...] | None) -> Table:
    half = path.name.lower().endswith(HALF_SUFFIX)
    dtype, item = ("<f2", 2) if half else ("<f4", 4)
    widths = (len(columns),) if columns else ((5,) if half else (4, 5))
    fitting = [width for width in widths if len(data) % (width * item) == 0]
    if not fitting:
        sizes = " or ".join(str(width * item) for width in widths)
        whole = [len(data) // (width * item) * width * item for width in widths]
        raise FrameError(
            f"{path} has {len(data)} bytes, no whole number of points of {sizes} bytes: the last point is cut off "
            f"at byte {max(whole)}.",
            fix="copy the frame again, or name its columns in Python: read_points(path, columns=(...))",
        )
    tables = [_table(data, dtype, 0, width) for width in fitting]
    doubts = [float(_implausible(values, _guessed_names(values)).mean()) for values, _ in tables if columns is None]
    if len(doubts) > 1 and doubts[0] == doubts[1]:
        _check_values(tables[0], _guessed_names(tables[0][0]), path)
        raise FrameError(
            f"{path} has {len(data)} bytes, which fit 4 columns and 5, and its values do not tell which.",
            fix="name the columns: x, y, z, intensity or x, y, z, intensity, ring",
        )
    return tables[doubts.index(min(doubts)) if doubts else 0]


def _npy_table(data: bytes, path: Path, columns: tuple[str, ...] | None) -> Table:
    size_bytes = 2 if data[6:7] == b"\x01" else 4
    start = 8 + size_bytes + int.from_bytes(data[8 : 8 + size_bytes], "little")
    text = data[8 + size_bytes : start].decode("latin-1")
    if not data.startswith(b"\x93NUMPY") or start > len(data) or "'descr'" not in text:
        raise FrameError(f"{path} is no .npy file: its header (bytes 0 to 9) is not NumPy's.", fix=FIX_FRAME)
    found = NPY_HEADER.fullmatch(text)
    if found is None:
        raise FrameError(
            f"{path} is no table of floats: {text.strip()[:120]} (objects, which need pickle, are never read).",
            fix="save points x columns as float32: np.save(path, points.astype(np.float32))",
        )
    kind, by_column, rows, width = found[1], found[2] == "True", int(found[3]), int(found[4])
    if not 3 <= width <= 6 or (columns is not None and width != len(columns)):
        wanted = f"{len(columns)} are named" if columns else "3 to 6 are read"
        raise FrameError(
            f"{path} has {width} columns and {wanted}.", fix="save x, y, z, intensity, then ring or timestamp"
        )
    wanted_bytes = rows * width * int(kind[1])
    if rows == 0 or len(data) - start != wanted_bytes:
        raise FrameError(
            f"{path} states {rows} points of {width} columns, {wanted_bytes} bytes, and has {len(data) - start} "
            f"from byte {start}.",
            fix="save the frame again",
        )
    return _table(data, "<" + kind, start, width, by_column=by_column)


def _guessed_names(values: Float32[np.ndarray, "points columns"]) -> tuple[str, ...]:
    """x, y, z, intensity; then ring where the values are whole numbers, timestamp where they are short times."""
    names = ["x", "y", "z", "intensity"][: values.shape[1]]
    for index in range(4, values.shape[1]):
        rest = [name for name in ("ring", "timestamp") if name not in names]
        doubts = [int(_doubtful(values[:, index], name).sum()) for name in rest]
        names.append(rest[doubts.index(min(doubts))])
    return tuple(names)


def _doubtful(column: Float32[np.ndarray, " points"], name: str) -> Bool[np.ndarray, " points"]:
    """Finite values that a column of this name does not have."""
    low, high = PLAUSIBLE.get(name, (-SENSOR_REACH_M, SENSOR_REACH_M))
    with np.errstate(invalid="ignore"):  # signalling NaNs, which the file may hold
        doubtful: np.ndarray = (column < low) | (column > high)
        if name == "ring":
            doubtful |= np.floor(column) != column
    doubtful &= np.isfinite(column)
    return doubtful


def _implausible(
    values: Float32[np.ndarray, "points columns"], names: tuple[str, ...]
) -> Bool[np.ndarray, "points columns"]:
    return np.stack([_doubtful(values[:, index], name) for index, name in enumerate(names)], axis=1)


def _check_values(table: Table, names: tuple[str, ...], path: Path) -> None:
    """What no frame has: non-finite values, coordinates beyond reason, every point at the origin."""
    values, place = table
    _refuse_first(~np.isfinite(values), table, names, path, "is not finite", "remove points without a return")
    reach = np.abs(values[:, :3])
    absurd = np.zeros(values.shape, dtype=bool)
    absurd[:, :3] = reach > ABSURD_M
    _refuse_first(absurd, table, names, path, f"is beyond {ABSURD_M:g} m: these are no points", FIX_FRAME)
    if not len(values):
        raise FrameError(f"{path} holds 0 points.", fix="copy the frame again")
    outside = int((reach > SENSOR_REACH_M).any(axis=1).sum())
    if 2 * outside > len(values):
        raise FrameError(f"{path}: {outside} of {len(values)} points lie beyond {SENSOR_REACH_M:g} m.", fix=FIX_FRAME)
    if float(reach.max()) < ORIGIN_M:
        raise FrameError(
            f"{path}: all {len(values)} points lie within {ORIGIN_M:g} m of the origin, first value at {place(0, 0)}.",
            fix=FIX_FRAME,
        )


def _check_guess(table: Table, names: tuple[str, ...], path: Path) -> None:
    doubts = _implausible(table[0], names)
    doubts[:, :3] = False
    columns = f"was taken for one of {', '.join(names)} and does not fit"
    _refuse_first(doubts, table, names, path, columns, "name the columns of the file")


def _refuse_first(
    bad: Bool[np.ndarray, "points columns"], table: Table, names: tuple[str, ...], path: Path, what: str, fix: str
) -> None:
    if bad.any():
        row, column = (int(index) for index in np.argwhere(bad)[0])
        values, place = table
        raise FrameError(
            f"{path}: point {row} of {len(values)} has {names[column]} = {values[row, column]:g} "
            f"({place(row, column)}), which {what}.",
            fix=fix,
        )
