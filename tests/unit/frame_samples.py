"""Frames in the layouts of the data sets, and PCD files whose header may be made to lie."""

import struct

import numpy as np

FIVE = ("x", "y", "z", "intensity", "ring")


def kitti(count=24, seed=0):
    random = np.random.default_rng(seed)
    xyz = random.uniform(-60, 60, (count, 3)) * [1, 1, 0.05]
    return np.column_stack([xyz, random.random(count)]).astype(np.float32)


def nuscenes(count=24, seed=0):
    points = np.column_stack([kitti(count, seed), np.arange(count) % 32]).astype(np.float32)
    points[:, 3] = np.floor(points[:, 3] * 255)
    return points


def swept(count=24):
    points = nuscenes(count)
    points[:, 4] = np.linspace(0, 0.45, count)
    return points


def written(path, points):
    path.write_bytes(np.ascontiguousarray(points).tobytes())
    return path


def pcd_bytes(points, names, encoding="binary", **changes):
    entries = {
        "VERSION": "0.7",
        "FIELDS": " ".join(names),
        "SIZE": " ".join("4" for _ in names),
        "TYPE": " ".join("F" for _ in names),
        "COUNT": " ".join("1" for _ in names),
        "WIDTH": len(points),
        "HEIGHT": 1,
        "VIEWPOINT": "0 0 0 1 0 0 0",
        "POINTS": len(points),
        "DATA": encoding,
    } | changes
    header = "# .PCD v0.7\n" + "".join(f"{key} {value}\n" for key, value in entries.items() if value is not None)
    if encoding == "ascii":
        body = "\n".join(" ".join(repr(float(v)) for v in row) for row in points).encode()
    elif encoding == "binary_compressed":
        raw = np.ascontiguousarray(points.T).tobytes()
        packed = lzf_literals(raw)
        body = struct.pack("<II", len(packed), len(raw)) + packed
    else:
        body = np.ascontiguousarray(points).tobytes()
    return header.encode() + body


def lzf_literals(raw):
    """LZF without any copy: runs of up to 32 literal bytes."""
    return b"".join(bytes([len(raw[i : i + 32]) - 1]) + raw[i : i + 32] for i in range(0, len(raw), 32))
