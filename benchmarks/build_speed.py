"""Time and memory of the main job: `python -m benchmarks.build_speed [--frames FILE]`, a table on standard output.

The bars of the other models are for four frames: `--model second --calibration-frames 4`. `--voxels 60000` keeps the
nearest points of the file, until they fill that many voxels: what OpenPCDet's cap leaves of a frame.

Memory is the largest sum of proportional set sizes over the whole tree of processes, read once a second: ten times took
a third of a core, and held the pages that the build was waiting for. Processor
time is that of all its processes: on a machine that does other work, it says more than the clock does.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from dm3d_deploy.device import stamp_here
from dm3d_deploy.measurements import read_measurements


def tree_bytes(session: int) -> int:
    """Proportional set size of every process of a session."""
    total = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if int((entry / "stat").read_text().rsplit(")", 1)[1].split()[3]) != session:
                continue
            rollup = (entry / "smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) * 1024
    return total


def watched(command: list[str]) -> tuple[float, int, int]:
    """Seconds, peak bytes and exit code of a command."""
    started = time.perf_counter()
    child = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    peak = 0
    ended = threading.Event()

    def poll() -> None:
        nonlocal peak
        while not ended.wait(1.0):
            peak = max(peak, tree_bytes(child.pid))

    thread = threading.Thread(target=poll)
    thread.start()
    code = child.wait()
    seconds = time.perf_counter() - started
    ended.set()
    thread.join()
    return seconds, peak, code


def nearest(frame: str, model: str, voxels: int, into: Path) -> Path:
    """A file of the frame's nearest points, as many as fill at most this number of the model's voxels."""
    import numpy as np

    from dm3d_deploy.config import load_config

    grid = load_config(model).voxels
    points = np.fromfile(frame, dtype=np.float32).reshape(-1, len(grid.columns))
    low, high = np.array(grid.point_range_m[:3]), np.array(grid.point_range_m[3:])
    inside = points[((points[:, :3] >= low) & (points[:, :3] < high)).all(axis=1)]
    inside = inside[np.argsort(np.hypot(inside[:, 0], inside[:, 1]), kind="stable")]
    cells = np.floor((inside[:, :3] - low) / np.array(grid.voxel_size_m)).astype(np.int64)
    first = np.sort(np.unique(cells, axis=0, return_index=True)[1])
    inside[: first[voxels] if len(first) > voxels else None].tofile(into)
    return into


def detect_seconds(run: Path, repeats: int) -> tuple[float, float]:
    """Seconds to load a run, and the median seconds per frame after that."""
    import json

    import numpy as np
    from safetensors import safe_open

    from dm3d_deploy.detect import load_run
    from dm3d_deploy.pointcloud import PointCloud

    info = json.loads((run / "work/frames.json").read_text())
    with safe_open(run / "work/frames.safetensors", framework="np") as file:
        cloud = PointCloud(points=file.get_tensor("shown.points"), columns=tuple(info["shown_columns"]))
    started = time.perf_counter()
    detector = load_run(run)
    loaded = time.perf_counter() - started
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        detector.detect(cloud)
        times.append(time.perf_counter() - started)
    return loaded, float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", default="simulated")
    parser.add_argument("--model", default="centerpoint")
    parser.add_argument("--target", default="0.3")
    parser.add_argument("--calibration-frames", type=int, default=8)
    parser.add_argument("--voxels", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    tool = [sys.executable, "-m", "dm3d_deploy"]
    rows: list[tuple[str, str, str]] = []
    helps = [watched([*tool, "--help"])[0] for _ in range(options.repeats)]
    rows.append(("--help", f"{sorted(helps)[len(helps) // 2]:.2f} s", "<= 0.5 s"))
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        frames = options.frames
        if options.voxels:
            frames = str(nearest(frames, options.model, options.voxels, Path(folder) / Path(frames).name))
        build = [*tool, "build", "--model", options.model, "--target", options.target, "--frames", frames]
        build += ["--calibration-frames", str(options.calibration_frames), "--out", str(run), "--quiet"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds, peak, code = watched(build)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        bars = ("<= 300 s", "<= 6 GiB") if options.model == "centerpoint" else ("<= 360 s", "<= 8 GiB")
        rows.append((f"cold build, {options.calibration_frames} calibration frames", f"{seconds:.1f} s", bars[0]))
        rows.append(("its processor time", f"{processor:.1f} s", ""))
        rows.append(("its memory, all processes", f"{peak / 2**30:.2f} GiB", bars[1]))
        rows.append(("its exit code", str(code), "0"))
        took = read_measurements(run).seconds
        seconds, _, code = watched(build)
        rows.append(("repeated build", f"{seconds:.2f} s", "<= 5 s"))
        loaded, each = detect_seconds(run, options.repeats)
        rows.append(("detect: load", f"{loaded:.2f} s", ""))
        rows.append(("detect: a frame after load (median)", f"{each:.2f} s", "<= 6 s"))
    stamp = stamp_here()
    most = f", the nearest {options.voxels:,} voxels" if options.voxels else ""
    print(f"{options.model}, target {options.target}, frames {Path(options.frames).name}{most}")
    print(f"{stamp.as_json()['cpu']}, {os.cpu_count()} cores, load {stamp.as_json()['load_average']}")
    for name, value, bar in rows:
        print(f"  {name:<38} {value:>12}   {bar}")
    print("  seconds by stage: " + ", ".join(f"{name} {value:.1f}" for name, value in took.items()))


if __name__ == "__main__":
    main()
