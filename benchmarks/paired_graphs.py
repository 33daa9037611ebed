"""ONNX graphs of one input timed in turns on this machine's CPU: wall clock, processor time, ratios to the first.

    python -m benchmarks.paired_graphs DENSE.onnx PRUNED.onnx ...      # graphs of bird's-eye view and head
    python -m benchmarks.paired_graphs --merge centerpoint             # separate head branches against packed ones

Turns cancel what changes slowly; the median of the ratios within a turn cancels more than the ratio of the medians.
Processor time is what other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime

from dm3d_deploy.config import load_config
from dm3d_deploy.models.detector import build_detector
from dm3d_deploy.models.seeded import seed_weights
from exporters import bev_head

WARMUP = 1


def sessions(graphs: list[Path], threads: int) -> dict[str, onnxruntime.InferenceSession]:
    """One session of ONNX Runtime's CPU provider for each file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    providers = ["CPUExecutionProvider"]
    return {str(path): onnxruntime.InferenceSession(path, options, providers=providers) for path in graphs}


def timed(made: dict[str, onnxruntime.InferenceSession], turns: int) -> dict[str, list[tuple[float, float]]]:
    """Wall-clock and processor milliseconds of every turn; the order of graphs is turned round each time."""
    rng = np.random.default_rng(0)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    feeds = {}
    for name, session in made.items():
        (given,) = session.get_inputs()
        kind = np.float16 if given.type == "tensor(float16)" else np.float32
        feeds[name] = {given.name: np.abs(rng.normal(size=given.shape)).astype(kind)}
    for turn in range(WARMUP + turns):
        for name in sorted(made, reverse=bool(turn % 2)):
            start = time.perf_counter(), time.process_time()
            made[name].run(None, feeds[name])
            end = time.perf_counter(), time.process_time()
            if turn >= WARMUP:
                times[name].append(((end[0] - start[0]) * 1e3, (end[1] - start[1]) * 1e3))
    return times


def told(times: dict[str, list[tuple[float, float]]]) -> None:
    """Medians, and medians of the ratios to the first graph."""
    first = next(iter(times.values()))
    for name, rows in times.items():
        for clock, column in (("wall", 0), ("processor", 1)):
            middle = statistics.median(row[column] for row in rows)
            ratio = statistics.median(row[column] / base[column] for row, base in zip(rows, first, strict=True))
            print(f"{name:50} {clock:10} {middle:9.1f} ms   x {ratio:.3f}")


def merge_graphs(model: str, folder: Path) -> list[Path]:
    """The seeded model's head with separate branches, and packed."""
    detector = build_detector(load_config(model))
    seed_weights(detector, 0)
    packed, separate = folder / "packed.onnx", folder / "separate.onnx"
    bev_head.export_bev_head(detector, packed, precision="fp32")
    merge, bev_head.merge_heads = bev_head.merge_heads, lambda graph: graph
    bev_head.export_bev_head(detector, separate, precision="fp32")
    bev_head.merge_heads = merge
    return [separate, packed]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("graphs", nargs="*", type=Path)
    parser.add_argument("--merge", metavar="MODEL")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        graphs = merge_graphs(asked.merge, Path(folder)) if asked.merge else asked.graphs
        told(timed(sessions(graphs, asked.threads), asked.turns))


if __name__ == "__main__":
    main()
