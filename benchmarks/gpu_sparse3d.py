"""The sparse 3D engine on a CUDA machine: correctness first, then latency. One command:

    python -m benchmarks.gpu_sparse3d [--frame CLOUD] [--repeats 1000] [--out docs/measurements/gpu_sparse3d.json]

It needs an NVIDIA GPU, torch and the extra [sparse3d]; cmake and a C++ compiler for the parity of the C++ runtime,
compute-sanitizer for the memory and race checks, CUDA torch and spconv for the comparison. What is absent is said.
No result of it is known yet: it was written on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import engines
from calib.readers import read_points
from calib.simulator import simulate_frame
from dm3d_deploy.config import load_config
from dm3d_deploy.device import DEVICES
from dm3d_deploy.geometry.voxelize import voxelize
from dm3d_deploy.models.backbone3d import bev_from_sparse
from dm3d_deploy.models.detector import Detector, build_detector
from dm3d_deploy.models.fold import fold_batch_norms
from dm3d_deploy.models.seeded import seed_weights
from dm3d_deploy.models.sparse import SparseConvolution, SparseTensor
from dm3d_deploy.pointcloud import PointCloud, Voxels
from dm3d_deploy.pruning.patterns import tile_size
from engines.sparse3d.aot import TARGETS, compile_plan
from engines.sparse3d.cuda_executor import CudaPlan
from engines.sparse3d.entry import frame_from_config
from engines.sparse3d.onnx_reader import ENTRY, read_backbone
from engines.sparse3d.plan import Plan
from engines.sparse3d.plan_file import write_plan
from engines.sparse3d.planner import plan_backbone
from engines.sparse3d.sites import capacities_from, frame_statistics, stage_sites
from exporters.backbone3d import export_backbone3d

KEPT_TILES = (1.0, 0.7, 0.5, 0.3)
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3}
RUNTIME = Path(str(engines.__file__)).parent / "sparse3d" / "runtime"
Feed = dict[str, np.ndarray]


def detector_with(kept: float) -> Detector:
    """CenterPoint with seeded weights; a share of every layer's tiles is kept, drawn at random."""
    detector = build_detector(load_config("centerpoint"))
    seed_weights(detector, 0)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for module in detector.backbone_3d.modules():
            if isinstance(module, SparseConvolution):
                cout, *kernel, cin = module.weight.shape
                rows, columns = tile_size(cin, cout)
                keep = rng.random((-(-cout // columns), *kernel, -(-cin // rows))) < kept
                wide = np.repeat(np.repeat(keep, columns, axis=0)[:cout], rows, axis=4)[..., :cin]
                module.weight *= torch.from_numpy(wide)
    return detector.eval()


def plan_of(detector: Detector, voxels: Voxels, *, precision: str, points: int = 0, keep: bool = False) -> Plan:
    """The neutral plan for frames like this one; with `points`, from that many points on."""
    config = detector.config.voxels
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "backbone3d.onnx"
        export_backbone3d(detector, path, max_voxels=config.max_voxels)
        backbone = read_backbone(path)
    statistics = frame_statistics(backbone, voxels.coords, conv_rows=64, points=points or None)
    frame = frame_from_config(config, rows=points or config.max_voxels, points=points > 0)
    names = [f"{stage.name}.sites" for stage in backbone.stages]
    return plan_backbone(
        backbone, frame=frame, precision="fp16" if precision == "fp16" else "fp32",
        capacities=capacities_from([statistics], margin=1.2, max_voxels=config.max_voxels),
        keep=names if keep else (), calibration=[statistics], count_tiles=keep,
    )  # fmt: skip


def voxel_feed(voxels: Voxels, rows: int) -> Feed:
    count = len(voxels.coords)
    features = np.full((rows, voxels.features.shape[1]), np.nan, np.float32)
    coords = np.full((rows, 4), 2**30, np.int32)
    features[:count], coords[:count] = voxels.features, voxels.coords
    return {"features": features, "coords": coords, "count": np.array([count], np.int32)}


def point_feed(cloud: PointCloud, columns: tuple[str, ...]) -> Feed:
    values = np.stack(
        [cloud.column(name) if name in cloud.columns else np.zeros(len(cloud.points), np.float32) for name in columns],
        axis=1,
    )
    return {"points": values.astype(np.float32), "count": np.array([len(values)], np.int32)}


def reference(detector: Detector, voxels: Voxels) -> np.ndarray:
    """The map by torch on the CPU, in fp32."""
    x = SparseTensor(
        torch.from_numpy(voxels.features), torch.from_numpy(voxels.coords.astype(np.int64)),
        detector.backbone_3d.shape_zyx, 1,
    )  # fmt: skip
    with torch.no_grad():
        dense: np.ndarray = bev_from_sparse(detector.backbone_3d(x)).numpy()
    return dense


def here() -> int:
    """The SM of device 0."""
    found = subprocess.run(
        ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True, check=True
    )
    return int(found.stdout.splitlines()[0].replace(".", ""))


def check_numbers(voxels: Voxels, cloud: PointCloud, sm: int) -> Iterator[str]:
    """Every stage's sites, the map, the tile counts, repeatability, order of rows, and points against voxels."""
    detector = detector_with(0.5)
    expected = reference(detector, voxels)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "backbone3d.onnx"
        export_backbone3d(detector, path, max_voxels=detector.config.voxels.max_voxels)
        sites = stage_sites(read_backbone(path), voxels.coords)
    for precision, tolerance in TOLERANCE.items():
        plan, _ = compile_plan(plan_of(detector, voxels, precision=precision, keep=True), [sm])
        feed = voxel_feed(voxels, plan.inputs[1].shape[0])
        order = np.random.default_rng(1).permutation(len(voxels.coords))
        mixed = replace(voxels, features=voxels.features[order], coords=voxels.coords[order])
        with CudaPlan(plan) as cuda:
            run, again = cuda.run(feed), cuda.run(feed)
            shuffled = cuda.run(voxel_feed(mixed, len(feed["coords"])))
        for name, keys in sites.items():
            assert np.array_equal(run.kept[f"{name}.sites"][: len(keys)], keys), f"sites of {name}"
        worst = np.abs(run.outputs["bev"].astype(np.float64) - expected).max() / np.abs(expected).max()
        assert worst <= tolerance, f"{precision}: relative error {worst:.1e}"
        for other in (again, shuffled):
            assert other.outputs["bev"].tobytes() == run.outputs["bev"].tobytes(), "two runs differ"
        executed = {layer.name: int(n) for layer, n in zip(plan.layers, run.kept["executed"], strict=True)}
        assert executed == plan.meta["cost"]["tile_products"], "executed tiles are not those predicted"
        yield f"{precision}: {len(sites)} stages equal, relative error {worst:.1e}, repeatable, tiles as predicted"
    yield check_points(detector, voxels, cloud, sm)


def check_points(detector: Detector, voxels: Voxels, cloud: PointCloud, sm: int) -> str:
    """The plan that starts at points finds the same first stage, and the same bytes for points in another order."""
    feed = point_feed(cloud, detector.config.voxels.columns)
    plan, _ = compile_plan(plan_of(detector, voxels, precision="fp16", points=len(feed["points"]), keep=True), [sm])
    order = np.random.default_rng(2).permutation(len(feed["points"]))
    with CudaPlan(plan) as cuda:
        run, other = cuda.run(feed), cuda.run(feed | {"points": feed["points"][order]})
    assert run.status[ENTRY] == voxels.found, f"{run.status[ENTRY]} cells of points, not {voxels.found}"
    assert run.outputs["bev"].tobytes() == other.outputs["bev"].tobytes(), "the order of points changes the map"
    return f"points: {run.status[ENTRY]} cells from {len(feed['points'])} points, the same in any order"


def check_runtime(voxels: Voxels, sm: int) -> str:
    """The C++ runtime writes the bytes that the executor of this file reads."""
    if shutil.which("cmake") is None:
        return "C++ runtime: not checked, cmake is absent"
    plan, _ = compile_plan(plan_of(detector_with(0.5), voxels, precision="fp16"), [sm])
    feed = voxel_feed(voxels, plan.inputs[1].shape[0])
    with CudaPlan(plan) as cuda:
        expected = cuda.run(feed).outputs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for command in (["cmake", "-S", str(RUNTIME), "-B", name + "/build"], ["cmake", "--build", name + "/build"]):
            subprocess.run(command, check=True, capture_output=True)
        write_plan(folder / "plan", plan)
        (folder / "frame").mkdir()
        for key, array in feed.items():
            (folder / "frame" / f"{key}.bin").write_bytes(array.tobytes())
        program = [name + "/build/dm3d_run_plan", name + "/plan", name + "/out", name + "/frame"]
        subprocess.run(program, check=True)
        for key, array in expected.items():
            written = (folder / "out" / "frame" / f"{key}.bin").read_bytes()
            assert written == array.tobytes(), f"the C++ runtime writes another {key}"
    return "C++ runtime: equal bytes"


def check_memory() -> Iterator[str]:
    """This program's first checks again, under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer")
    for kind in ("memcheck", "racecheck"):
        if tool is None:
            yield f"{kind}: not run, compute-sanitizer is absent"
            continue
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu_sparse3d"]
        done = subprocess.run([*command, "--checks-only"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        yield f"{kind}: clean"


def percentiles(times_ms: np.ndarray) -> dict[str, float]:
    p50, p99 = np.quantile(times_ms, [0.5, 0.99])
    return {"p50_ms": round(float(p50), 4), "p99_ms": round(float(p99), 4), "runs": len(times_ms)}


def measure(voxels: Voxels, sm: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Latency of the whole plan as a CUDA graph, and what it moves and multiplies in that time."""
    for kept in KEPT_TILES:
        plan, _ = compile_plan(plan_of(detector_with(kept), voxels, precision="fp16"), [sm])
        with CudaPlan(plan) as cuda:
            cuda.upload(voxel_feed(voxels, plan.inputs[1].shape[0]))
            row: dict[str, Any] = {"kept tiles": kept, **percentiles(cuda.times_ms(repeats))}
        cost = plan.meta["cost"]
        moved = cost["moved_bytes"]
        row |= {"launches": len(plan.steps), "workspace_mib": round(plan.workspace_bytes / 2**20, 1)}
        row |= {"moved_mb": round(moved / 1e6, 1), "gflop": round(2 * cost["multiplications"] / 1e9, 2)}
        row |= {"gb_per_s": round(moved / row["p50_ms"] / 1e6), "tflop_per_s": round(row["gflop"] / row["p50_ms"], 2)}
        yield row | floors_ms(moved, row["gflop"], sm)


def floors_ms(moved_bytes: int, gflop: float, sm: int) -> dict[str, float | str]:
    """The least time for these bytes and these operations, at the peaks of the device table where it has this SM."""
    peaks = [device for device in DEVICES if device.sm == f"sm_{sm}" and device.gb_per_s and device.fp16_tflops]
    if not peaks:
        return {"floors": f"no peaks are known for sm_{sm}"}
    peak = peaks[0]
    return {
        "peaks of": peak.name,
        "bytes_floor_ms": round(moved_bytes / (peak.gb_per_s or 1) / 1e6, 4),
        "flops_floor_ms": round(gflop / (peak.fp16_tflops or 1), 4),
    }


def measure_spconv(voxels: Voxels, repeats: int) -> dict[str, Any] | str:
    """spconv's backbone on the same frame, in fp16 with folded norms, by events around each run."""
    from dm3d_deploy.models import spconv_backend

    if importlib.util.find_spec("spconv") is None or not torch.cuda.is_available():
        return "spconv: not measured, spconv or CUDA torch is absent"
    # The bridge makes its modules in every call; a runtime would keep them.
    spconv_backend._native = functools.cache(spconv_backend._native)
    detector = fold_batch_norms(detector_with(1.0)).cuda().half()
    features = torch.from_numpy(voxels.features).cuda().half()
    coords = torch.from_numpy(voxels.coords.astype(np.int64)).cuda()
    times = []
    with torch.no_grad():
        for number in range(50 + repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            spconv_backend.backbone_to_bev(detector, features, coords)
            end.record()
            end.synchronize()
            if number >= 50:
                times.append(start.elapsed_time(end))
    return {"kept tiles": "spconv", **percentiles(np.array(times))}


def stamp(voxels: Voxels, source: str) -> Mapping[str, Any]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,clocks.max.memory", "--format=csv,noheader"]
    gpu = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return {"gpu": gpu, "torch": torch.__version__, "machine": platform.machine(), "frame": source,
            "voxels": len(voxels.coords)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--frame", help="a point cloud that the readers know; a simulated one otherwise")
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--checks-only", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    config = load_config("centerpoint").voxels
    cloud = read_points(options.frame) if options.frame else simulate_frame(0, sensor="nuscenes32").cloud
    voxels = voxelize(cloud, config)
    sm = here()
    assert sm in TARGETS, f"no kernels are compiled for sm_{sm}"
    for line in check_numbers(voxels, cloud, sm):
        print(line, flush=True)
    if options.checks_only:
        return
    print(check_runtime(voxels, sm))
    for line in check_memory():
        print(line, flush=True)
    rows = [*measure(voxels, sm, options.repeats), measure_spconv(voxels, options.repeats)]
    for row in rows:
        print(row)
    if options.out:
        told = {**stamp(voxels, options.frame or "simulated, seed 0"), "rows": rows}
        options.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
