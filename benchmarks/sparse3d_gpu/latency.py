"""Times on a GPU, with the floors of what is moved and multiplied; spconv on the same frame, in the same two modes."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.sparse3d_gpu.cases import Case
from benchmarks.sparse3d_gpu.findings import Finding, missing
from dm3d_deploy.device import DEVICES
from dm3d_deploy.models.fold import fold_batch_norms
from engines.sparse3d.cuda_executor import CudaPlan
from engines.sparse3d.plan import Plan

WARM_UP = 50
PART = "latency"


def percentiles(times_ms: np.ndarray) -> dict[str, float | int]:
    """p50, p99 and how many."""
    p50, p99 = np.quantile(times_ms, [0.5, 0.99])
    return {"p50_ms": round(float(p50), 4), "p99_ms": round(float(p99), 4), "runs": len(times_ms)}


def measure_ours(case: Case, plan: Plan, gpu: str, repeats: int, *, points: bool) -> Finding:
    """The whole plan in fp16, from voxels or points to the map: as one CUDA graph, and launch by launch from Python."""
    cost, start = plan.meta["cost"], "points" if points else "voxels"
    told = {
        "launches": len(plan.steps),
        "workspace_mib": round(plan.workspace_bytes / 2**20, 1),
        "moved_mb": round(cost["moved_bytes"] / 1e6, 1),
        "gflop": round(2 * cost["multiplications"] / 1e9, 2),
        **floors_ms(cost["moved_bytes"], 2 * cost["multiplications"], min(plan.cubins), gpu),
    }
    rows = []
    with CudaPlan(plan) as cuda:
        cuda.upload(case.feed(points=points))
        for mode in ("graph", "eager"):
            times = cuda.times_ms(repeats, graph=mode == "graph", warm_up=WARM_UP)
            row = {"what": "ours", "kept_tiles": case.kept, "start": start, "mode": mode, **percentiles(times)}
            rows.append({**row, **told})
    words = f"{rows[0]['p50_ms']:g} ms as a graph, {rows[1]['p50_ms']:g} ms launch by launch"
    name = f"{case.kept:g} of the tiles, from {start}"
    return Finding(part=PART, name=name, standing="measured", words=words, rows=tuple(rows))


def floors_ms(moved_bytes: float, operations: float, sm: int, gpu: str) -> dict[str, Any]:
    """The least time for these bytes and operations, at the peaks of the device table: this GPU's, or its SM's."""
    known = [device for device in DEVICES if device.sm == f"sm_{sm}" and device.gb_per_s and device.fp16_tflops]
    plain = "".join(gpu.lower().split())
    peak = next((device for device in known if device.name in plain), known[0] if known else None)
    if peak is None or not peak.gb_per_s or not peak.fp16_tflops:
        return {}
    return {
        "peaks_of": peak.name,
        "bytes_floor_ms": round(moved_bytes / peak.gb_per_s / 1e6, 4),
        "flops_floor_ms": round(operations / peak.fp16_tflops / 1e9, 4),
    }


def measure_spconv(case: Case, repeats: int) -> list[Finding]:
    """spconv's backbone in fp16 with folded norms, voxels to map: launch by launch, and as a graph if it can be."""
    from dm3d_deploy.models import spconv_backend

    if importlib.util.find_spec("spconv") is None or not torch.cuda.is_available():
        return [missing(PART, "spconv", "not measured: spconv or a torch that finds the GPU is absent")]
    # The bridge makes its modules in every call; a runtime would keep them.
    spconv_backend._native = functools.cache(spconv_backend._native)
    voxels = case.voxels(points=False)
    detector = fold_batch_norms(case.detector).cuda().half()
    features = torch.from_numpy(voxels.features).cuda().half()
    coords = torch.from_numpy(voxels.coords.astype(np.int64)).cuda()

    @torch.no_grad()
    def forward() -> None:
        spconv_backend.backbone_to_bev(detector, features, coords)

    row = {"what": "spconv", "kept_tiles": 1.0, "start": "voxels"}
    times = timed(forward, repeats)
    rows = [{**row, "mode": "eager", **percentiles(times)}]
    words = f"{rows[0]['p50_ms']:g} ms launch by launch"
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            forward()
    except RuntimeError as error:  # a capture forbids what waits for the GPU, as reading a count does
        words += f"; it cannot be captured in a graph: {str(error).splitlines()[0]}"
    else:
        rows.append({**row, "mode": "graph", **percentiles(timed(graph.replay, repeats))})
        words += f", {rows[1]['p50_ms']:g} ms as a graph"
    return [Finding(part=PART, name="spconv", standing="measured", words=words, rows=tuple(rows))]


def timed(call: Callable[[], None], repeats: int) -> np.ndarray:
    """Milliseconds of each call by events around it, behind a warm-up."""
    times = []
    for number in range(WARM_UP + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if number >= WARM_UP:
            times.append(start.elapsed_time(end))
    return np.array(times)
