"""The PCD format of the Point Cloud Library: ascii, binary and binary_compressed, with a header that may lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from dm3d_deploy.errors import FrameError

HEADER_BYTES = 8192
MAX_FIELDS = 64
MAX_POINTS = 50_000_000
TYPES = {"F2", "F4", "F8", "I1", "I2", "I4", "I8", "U1", "U2", "U4", "U8"}
FIX = "write the file again with its own tool, or convert it to a float32 .bin of x, y, z, intensity"


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field of a point: numpy type, how many of them, and its byte within the point."""

    name: str
    dtype: np.dtype
    count: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What the header states; `start` is the first byte of the data."""

    fields: tuple[Field, ...]
    points: int
    encoding: str
    start: int

    @property
    def point_bytes(self) -> int:
        """Bytes of one point in the binary encodings."""
        return sum(field.dtype.itemsize * field.count for field in self.fields)


Table = tuple[Float32[np.ndarray, "points columns"], Callable[[int, int], str]]


def read_pcd(data: bytes, source: str, columns: tuple[str, ...] | None) -> tuple[tuple[str, ...], Table]:
    """Column names and values of a PCD file; `columns` selects fields by name.

    Returns the names, the values and a function that says where value (row, column) stands in the file.
    Raises `FrameError` where header and data disagree.
    """
    header = _header(data, source)
    fields = _chosen(header, source, columns)
    names = tuple(field.name for field in fields)
    if header.encoding == "ascii":
        return names, _ascii_table(data, header, fields, source)
    body = data[header.start :]
    wanted = header.points * header.point_bytes
    if header.encoding == "binary_compressed":
        body = _decompressed(body, wanted, header, source)
    if len(body) != wanted:
        raise FrameError(
            f"{source}: the header states {header.points} points of {header.point_bytes} bytes, {wanted} bytes, but "
            f"{len(body)} follow it from byte {header.start}.",
            fix=FIX,
        )
    return names, _binary_table(body, header, fields)


def _header(data: bytes, source: str) -> Header:
    entries: dict[str, list[str]] = {}
    start = 0
    while "DATA" not in entries:
        end = data.find(b"\n", start, HEADER_BYTES)
        if end < 0:
            raise FrameError(
                f"{source}: no PCD header ends within the first {min(len(data), HEADER_BYTES)} bytes.", fix=FIX
            )
        words = data[start:end].decode("ascii", errors="replace").split()
        start = end + 1
        if words and not words[0].startswith("#"):
            entries[words[0]] = words[1:]
    names = entries.get("FIELDS", [])
    sizes, types = entries.get("SIZE", []), entries.get("TYPE", [])
    counts = [_whole(word, "COUNT", source) for word in entries.get("COUNT", ["1"] * len(names))]
    kinds = [kind + size for kind, size in zip(types, sizes, strict=False)]
    if not len(names) == len(sizes) == len(types) == len(counts) or not set(kinds) <= TYPES:
        raise FrameError(f"{source}: FIELDS, SIZE, TYPE and COUNT of the PCD header do not fit together.", fix=FIX)
    if not 0 < len(names) <= MAX_FIELDS or not all(1 <= count <= 4096 for count in counts):
        raise FrameError(f"{source}: the PCD header has {len(names)} fields, or an impossible COUNT.", fix=FIX)
    width, height = (_whole(entries.get(key, [""])[0:1], key, source) for key in ("WIDTH", "HEIGHT"))
    points = _whole(entries.get("POINTS", [str(width * height)])[0:1], "POINTS", source)
    if points != width * height or points > MAX_POINTS:
        raise FrameError(
            f"{source}: POINTS {points} is not WIDTH {width} x HEIGHT {height}, or is above {MAX_POINTS}.", fix=FIX
        )
    encoding = " ".join(entries["DATA"])
    if encoding not in ("ascii", "binary", "binary_compressed"):
        raise FrameError(
            f"{source}: unknown PCD data '{encoding[:40]}'.", fix="write it as ascii, binary or binary_compressed"
        )
    fields, offset = [], 0
    for name, kind, count in zip(names, kinds, counts, strict=True):
        fields.append(Field(name=name, dtype=np.dtype("<" + kind.lower()), count=count, offset=offset))
        offset += fields[-1].dtype.itemsize * count
    return Header(fields=tuple(fields), points=points, encoding=encoding, start=start)


def _whole(words: str | list[str], key: str, source: str) -> int:
    word = words if isinstance(words, str) else "".join(words)
    if not (word.isascii() and word.isdigit() and len(word) <= 12):
        raise FrameError(f"{source}: {key} of the PCD header is '{word[:40]}', no whole number.", fix=FIX)
    return int(word)


def _chosen(header: Header, source: str, columns: tuple[str, ...] | None) -> tuple[Field, ...]:
    known = ("x", "y", "z", "intensity", "ring", "timestamp")
    present = [field.name for field in header.fields]
    wanted = columns or tuple(name for name in known if name in present or name in known[:3])
    chosen = [field for name in wanted for field in header.fields if field.name == name]
    if [field.name for field in chosen] != list(wanted) or any(field.count != 1 for field in chosen):
        raise FrameError(
            f"{source} has the PCD fields {', '.join(present)[:200]}; {', '.join(wanted)} are needed, once each.",
            fix="rename the fields in the header",
        )
    return tuple(chosen)


def _binary_table(body: bytes, header: Header, fields: tuple[Field, ...]) -> Table:
    compressed = header.encoding == "binary_compressed"
    columns = []
    for field in fields:
        # Compressed data holds one field after the other, plain binary one point after the other.
        first = field.offset * header.points if compressed else field.offset
        stride = field.dtype.itemsize if compressed else header.point_bytes
        columns.append(np.ndarray((header.points,), field.dtype, body, first, (stride,)))
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.stack([column.astype(np.float32) for column in columns], axis=1)

    def place(row: int, column: int) -> str:
        if compressed:
            return "in the compressed data"
        return f"byte {header.start + row * header.point_bytes + fields[column].offset}"

    return values, place


def _ascii_table(data: bytes, header: Header, fields: tuple[Field, ...], source: str) -> Table:
    per_point = sum(field.count for field in header.fields)
    words = data[header.start :].split()
    if len(words) != header.points * per_point:
        raise FrameError(
            f"{source}: the header states {header.points} points of {per_point} numbers, {header.points * per_point} "
            f"numbers, but {len(words)} follow it from byte {header.start}.",
            fix=FIX,
        )
    try:
        numbers = np.array([float(word) for word in words], dtype=np.float64).reshape(header.points, per_point)
    except ValueError as error:
        raise FrameError(f"{source}: the ascii data hold no numbers: {str(error)[:80]}.", fix=FIX) from None
    first = np.cumsum([0, *(field.count for field in header.fields)])
    chosen = [int(first[header.fields.index(field)]) for field in fields]
    with np.errstate(over="ignore", invalid="ignore"):
        values = numbers[:, chosen].astype(np.float32)
    return values, lambda row, column: f"number {row * per_point + chosen[column] + 1} of the ascii data"


def _decompressed(body: bytes, wanted: int, header: Header, source: str) -> bytes:
    sizes = np.frombuffer(body[:8], dtype="<u4")
    if len(sizes) < 2 or int(sizes[0]) != len(body) - 8 or int(sizes[1]) != wanted:
        raise FrameError(
            f"{source}: the compressed data state sizes {[int(size) for size in sizes]}, but {max(len(body) - 8, 0)} "
            f"bytes follow byte {header.start + 8} and the header needs {wanted} after decompression.",
            fix=FIX,
        )
    try:
        return _lzf(body[8:], wanted)
    except IndexError:
        raise FrameError(f"{source}: the compressed data are damaged.", fix=FIX) from None


def _lzf(data: bytes, wanted: int) -> bytes:
    """Decompress LibLZF (Lehmann): literal runs, and copies of up to 264 bytes from up to 8 KiB back.

    Raises `IndexError` where the data refer beyond themselves or do not make `wanted` bytes.
    """
    out = bytearray()
    at = 0
    while at < len(data):
        control = data[at]
        at += 1
        if control < 32:
            out += data[at : at + control + 1]
            at += control + 1
        else:
            length = control >> 5
            if length == 7:
                length += data[at]
                at += 1
            length += 2
            distance = ((control & 31) << 8) + data[at] + 1
            at += 1
            if distance > len(out):
                raise IndexError
            piece = out[-distance:][:length]
            out += (piece * (length // len(piece) + 1))[:length]
        if len(out) > wanted:
            raise IndexError
    if len(out) != wanted or at != len(data):
        raise IndexError
    return bytes(out)
