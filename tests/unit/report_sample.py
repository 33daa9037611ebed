"""A made-up report of CenterPoint with 35 layers: the layer sizes are real, every result is invented for tests."""

from __future__ import annotations

import base64
import functools
import json
import struct
import zlib
from typing import Any

import numpy as np

from dm3d_deploy.evidence import Comparison, Latency
from dm3d_deploy.reporting.facts import verdict_sentence

PAIRS = {1: 359_710, 2: 835_211, 3: 493_106, 4: 205_877}
DOWN_PAIRS = {2: 204_019, 3: 224_403, 4: 110_991}
CHANNELS = {1: 16, 2: 32, 3: 64, 4: 128}


def tiny_png(width: int = 640, height: int = 320) -> str:
    """A grey PNG in base64, written without an imaging library."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\x00" + bytes(40 + (x // 40 + y // 40) % 2 * 30 for x in range(width)) for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return base64.b64encode(png).decode()


def _layer_sizes() -> list[tuple[str, str, str, int, int]]:
    """Name, part, kind, weights, dense MACs of the 35 layers in scope."""
    sizes = [("backbone_3d.conv_input.0", "3d", "SubMConv3d 5>16", 27 * 5 * 16, PAIRS[1] * 80)]
    for stage, width in CHANNELS.items():
        if stage > 1:
            taps, below = 27, CHANNELS[stage - 1]
            sizes.append(
                (
                    f"backbone_3d.conv{stage}.0.0",
                    "3d",
                    f"SparseConv3d {below}>{width}",
                    taps * below * width,
                    DOWN_PAIRS[stage] * below * width,
                )
            )
        first = 0 if stage == 1 else 1
        for block in (first, first + 1):
            for conv in (1, 2):
                name = f"backbone_3d.conv{stage}.{block}.conv{conv}"
                sizes.append(
                    (name, "3d", f"SubMConv3d {width}>{width}", 27 * width * width, PAIRS[stage] * width * width)
                )
    sizes.append(("backbone_3d.conv_out.0", "3d", "SparseConv3d 128>128", 3 * 128 * 128, 17_936 * 128 * 128))
    for block, (below, width, cells) in enumerate(((256, 128, 128 * 128), (128, 256, 64 * 64))):
        for index, source in zip((1, 4, 7, 10, 13, 16), (below, *[width] * 5), strict=True):
            name = f"backbone_2d.blocks.{block}.{index}"
            sizes.append((name, "2d", f"Conv2d 3x3 {source}>{width}", 9 * source * width, 9 * source * width * cells))
    sizes.append(("backbone_2d.deblocks.0.0", "2d", "ConvTranspose2d 1x1 128>256", 32_768, 32_768 * 128 * 128))
    sizes.append(("backbone_2d.deblocks.1.0", "2d", "ConvTranspose2d 2x2 256>256", 262_144, 262_144 * 64 * 64))
    return sizes


def _layers(rng: np.random.Generator) -> list[dict[str, Any]]:
    layers = []
    for name, part, kind, weights, dense in _layer_sizes():
        wide = "256>256" in kind or "128>128" in kind
        ratio = 0.0 if "conv_input" in name else float(np.round(np.clip(rng.normal(0.68, 0.16), 0.05, 0.98), 2))
        pattern = "dense"
        executed = 1.0
        if ratio > 0 and part == "2d":
            pattern, executed = ("2:4", 0.5) if ratio >= 0.5 else ("unstructured", 1.0)
        elif ratio > 0:
            pattern, executed = "tile 16x16", min(1.0, (1 - ratio) * 1.25)
        layers.append(
            {
                "name": name,
                "part": part,
                "kind": kind,
                "weights": weights,
                "dense_macs": dense,
                "kept_macs": dense * (1 - ratio),
                "executed_macs": dense * max(executed, 1 - ratio),
                "ratio": ratio,
                "pattern": pattern,
                "distortion": float(rng.lognormal(-7, 1)) if ratio else 0.0,
                "why": "cheapest distortion per MAC" if ratio else "5 input channels: too few to prune",
                "legal_2_4": pattern == "2:4" if part == "2d" else None,
                "gain": ""
                if part == "3d"
                else ("a gain is expected from 2:4" if wide else "no gain expected: C, K < 256"),
            }
        )
    return layers


def _latency(rng: np.random.Generator) -> list[dict[str, Any]]:
    entries = []
    stages = {"voxelise": (3.1, 3.1), "3D": (21.0, 13.9), "BEV + head": (27.4, 21.2), "decode + NMS": (4.4, 4.4)}
    totals = {"dense": np.zeros(300), "pruned": np.zeros(300)}
    for stage, medians in (*stages.items(), ("total", (0.0, 0.0))):
        for variant, median in zip(("dense", "pruned"), medians, strict=True):
            samples = totals[variant] if stage == "total" else median * rng.lognormal(0, 0.07, 300)
            totals[variant] = totals[variant] + samples if stage != "total" else samples
            latency = Latency(
                stage=stage,
                variant=variant,
                samples_ms=tuple(round(float(s), 4) for s in samples),
                clock="perf_counter",
                backend="onnxruntime 1.31.0 CPU, fp32",
                voxels=(51_220, 60_000),
                measured=True,
            )
            entries.append(latency.as_json())
    return entries


def _parity() -> list[dict[str, Any]]:
    outputs = ("task 0 heat map", "task 0 centre", "task 0 size", "task 0 rotation", "task 0 velocity", "boxes")
    return [
        Comparison(
            output=output,
            reference="PyTorch, pruned",
            candidate="onnxruntime fp32",
            frames=4,
            max_abs=2.1e-5 * (index + 1),
            max_relative=1.3e-6 * (index + 1),
            cosine=0.99999999,
            worst=f"(0, {index}, 61, 77): 1.23456 against 1.23458",
            tolerance="relative <= 0.0001, cosine >= 0.9999",
            passed=True,
            detail="118 of 118 boxes matched within 1 mm" if output == "boxes" else "",
        ).as_json()
        for index, output in enumerate(outputs)
    ]


def _engines() -> list[dict[str, Any]]:
    common = {"backend": "tensorrt_rtx", "version": "1.7.1", "precision": "fp16", "standing": "built, not run here"}
    onnx = {"backend": "onnxruntime", "version": "1.31.0", "precision": "fp32", "standing": "ran here"}
    note = "this backend ignores 2:4: the engine is byte-identical without the flag"
    return [
        {
            **common,
            "path": "engines/bev_head.rtx.plan",
            "built_for": ["sm_80", "sm_86", "sm_89", "sm_120"],
            "layers": 44,
            "sha256": "3c" * 32,
            "bytes": 12_640_212,
            "rows": [{"dimension": "rows_of_places", "least": 216, "most": 21_600, "source": "the configuration"}],
            "sparsity": {"legal": 11, "eligible": 0, "chosen": 0, "note": note},
        },
        {
            **onnx,
            "path": "engines/bev_head.onnx",
            "built_for": ["CPU"],
            "layers": 61,
            "sha256": "a1" * 32,
            "bytes": 25_071_334,
            "rows": [],
            "sparsity": None,
        },
    ]


def _plan() -> dict[str, Any]:
    return {
        "path": "engines/backbone3d/backbone3d.plan",
        "bytes": 9_012_480,
        "sha256": "5d" * 32,
        "precision": "fp16",
        "workspace_bytes": 95_420_416,
        "launches": 81,
        "memsets": 1,
        "capacities": {"input": 60_000, "conv2": 51_200},
        "tiles_kept": 1_204,
        "tiles_skipped": 1_307,
        "moved_bytes": 812_000_000,
        "multiplications": 21_400_000_000,
        "dense_multiplications": 43_600_000_000,
        "devices": [
            {
                "sm": sm, "kernels": 27, "bytes": 812_000, "made_by": made_by, "most_registers": 116,
                "most_shared_bytes": 33_040, "spilled_bytes": 0,
            }
            for sm, made_by in (("sm_87", "CUDA 12.8"), ("sm_110", "CUDA 13.1"))
        ],
        "standing": "compiled, not run on a device",
        "compiler": "Triton 3.7.1",
    }  # fmt: skip


def _macs(layers: list[dict[str, Any]]) -> dict[str, Any]:
    head = 27_235_713_024.0
    by_part: dict[str, dict[str, float]] = {"head": {"dense": head, "kept": head, "executed": head}}
    for part in ("3d", "2d"):
        own = [layer for layer in layers if layer["part"] == part]
        by_part[part] = {c: float(sum(layer[f"{c}_macs"] for layer in own)) for c in ("dense", "kept", "executed")}
    total = {column: sum(part[column] for part in by_part.values()) for column in ("dense", "kept", "executed")}
    return {**total, "by_part": by_part}


def sample_report(*, trained: bool = False, simulated: bool = True) -> dict[str, Any]:
    """A valid report of your own; the same arguments give the same report."""
    report: dict[str, Any] = json.loads(_sample_as_json(trained, simulated))
    return report


def _ap() -> dict[str, Any]:
    def row(objects: int, dense: float, masked: float, recovered: float, sure: bool = True) -> dict[str, Any]:
        change = round(recovered - dense, 2)
        return {
            "objects": objects, "dense_percent": dense, "masked_percent": masked, "recovered_percent": recovered,
            "change_points": change, "change_low_points": change - 1.5 if sure else None,
            "change_high_points": change + 1.2 if sure else None,
        }  # fmt: skip

    none = {key: None for key in row(0, 0.0, 0.0, 0.0)} | {"objects": 0}
    return {
        "none_because": None,
        "data": "12 simulated nuscenes32 scenes, seeds 1000900000 to 1000900011",
        "measure": "nuScenes centre distance, mean of 0.5, 1, 2 and 4 m",
        "means": [
            {"name": "vulnerable road users", "classes": ["pedestrian", "bicycle"], **row(119, 61.4, 52.2, 59.9)},
            {"name": "all classes", "classes": ["pedestrian", "bicycle", "car"], **row(399, 64.0, 55.1, 62.8)},
        ],
        "classes": [
            {"name": "pedestrian", "subset": "all", "vulnerable": True, **row(81, 85.2, 78.4, 84.1)},
            {"name": "pedestrian", "subset": "0-30 m", "vulnerable": True, **row(70, 88.2, 80.4, 87.1, sure=False)},
            {"name": "pedestrian", "subset": "30-50 m", "vulnerable": True, **row(11, 60.2, 51.7, 58.3, sure=False)},
            {"name": "bicycle", "subset": "all", "vulnerable": True, **row(38, 37.6, 26.0, 35.7)},
            {"name": "bicycle", "subset": "0-30 m", "vulnerable": True, **row(38, 37.6, 26.0, 35.7, sure=False)},
            {"name": "bicycle", "subset": "30-50 m", "vulnerable": True, **none},
            {"name": "car", "subset": "all", "vulnerable": False, **row(280, 69.2, 60.9, 68.6)},
            {"name": "car", "subset": "0-30 m", "vulnerable": False, **row(180, 81.3, 74.8, 80.5, sure=False)},
            {"name": "car", "subset": "30-50 m", "vulnerable": False, **row(100, 44.1, 33.0, 43.3, sure=False)},
        ],
        "notes": ["an object counts from 5 points on", "a mean is over the classes that the scenes hold"],
    }


def _distortion() -> dict[str, Any]:
    return {
        "predicted": 0.118,
        "foresees_refit": False,
        "heldout": 0.214,
        "heldout_after_recovery": 0.097,
        "per_frame": [
            {"frame": f"frame {900 + i}", "heldout": before, "after_recovery": after}
            for i, (before, after) in enumerate(((0.181, 0.090), (0.243, 0.104), (0.199, 0.085), (0.233, 0.109)))
        ],
        "baselines": [{"method": "uniform magnitude", "heldout": 0.802}, {"method": "LAMP", "heldout": 0.455}],
    }


def _recovery() -> dict[str, Any]:
    return {
        "method": "batch-norm re-estimation",
        "accepted": True,
        "before": 0.214,
        "after": 0.097,
        "reason": "held-out distortion fell",
        "seconds": 12.4,
        "steps": [
            {
                "method": "batch-norm re-estimation",
                "measure": "distortion",
                "accepted": True,
                "before": 0.214,
                "after": 0.097,
                "reason": "held-out distortion fell",
                "seconds": 11.9,
            }
        ],
    }


def _detections() -> dict[str, Any]:
    return {
        "frame": "frame 900",
        "dense": 41,
        "pruned": 39,
        "matched": 38,
        "by_class": [
            {"name": "car", "dense": 25, "pruned": 25, "matched": 25},
            {"name": "pedestrian", "dense": 16, "pruned": 14, "matched": 13},
        ],
        "picture": tiny_png(),
    }


def _provenance() -> dict[str, Any]:
    return {
        "version": "0.1.0",
        "recipe": {"target": "0.35", "scope": "backbone", "frames": "8", "seed": "0", "kappa": "1e-07"},
        "tools": {"python": "3.11.2", "torch": "2.13.0", "onnx": "1.23.0", "onnxruntime": "1.31.0"},
        "machine": {
            "device": "2-core x86-64 CPU",
            "clocks": "not locked",
            "power_mode": "not reported",
            "threads": "1",
        },
        "digests": {"model": "0f" * 32, "frames": "7b" * 32, "masks": "c4" * 32},
    }


def _planned_time() -> dict[str, Any]:
    part = {"dense_ms": 12.0, "planned_ms": 9.0, "fixed_ms": 1.5}
    return {
        "label": "estimated for orin, not measured",
        "standing": "estimated",
        "device": "orin",
        "clock": "roofline with wave quantisation",
        "precision": "fp16",
        "voxels": 60_000,
        "sha256": "5d" * 32,
        "dense_ms": 36.0,
        "planned_ms": 27.0,
        "by_part": {"3d": {**part, "band": 0.34}, "2d": {**part, "band": 0.2}, "head": {**part, "band": None}},
        "stamp": {"device": "Jetson AGX Orin 64 GB, MAXN"},
        "notes": ["voxelisation is not in it"],
    }


def _budget(macs: dict[str, Any]) -> dict[str, Any]:
    backbone = {c: macs[c] - macs["by_part"]["head"][c] for c in ("dense", "kept", "executed")}
    return {
        "goal": "at most 30 ms of the network's time (estimated for orin, not measured)",
        "cost": "latency",
        "target": 0.35,
        "kept": backbone["kept"] / backbone["dense"],
        "executed": backbone["executed"] / backbone["dense"],
        "scope": "backbone",
        "unit": "kept MACs",
        "lower_bound_gap": 0.00042,
        "kept_of_backbone": backbone["kept"] / backbone["dense"],
        "kept_of_model": macs["kept"] / macs["dense"],
        "candidates": [
            {"name": name, "predicted": 0.11, "verified": value, "cost": 1e10, "share": 0.35, "chosen": taken,
             "tie": False}
            for name, value, taken in (("least sum of distortions", 0.09, True), ("least sum of squares", 0.12, False))
        ],
    }  # fmt: skip


@functools.cache
def _sample_as_json(trained: bool, simulated: bool) -> str:
    rng = np.random.default_rng(20240917)
    layers = _layers(rng)
    macs = _macs(layers)
    source = "simulated city, seed 7" if simulated else "nuScenes sweeps"
    report: dict[str, Any] = {
        "schema": 2,
        "command": "dm3d-deploy build centerpoint --target 0.35 --frames 8 --device auto --out runs/centerpoint",
        "verdict": {"sentence": "", "passed": True},
        "model": {
            "name": "centerpoint",
            "trained": trained,
            "weights_source": "centerpoint_nuscenes.safetensors" if trained else "random weights, seed 0",
            "classes": ["car", "truck", "bus", "trailer", "pedestrian", "bicycle", "traffic_cone"],
            "parameters": 8_939_880,
        },
        "frames": {
            "source": source,
            "simulated": simulated,
            "held_out_simulated": simulated,
            "calibration": 8,
            "selection": "farthest-point over scene statistics, 8 of 40",
            "held_out": 4,
            "notes": ["2 of 40 frames were over the voxel cap of 60,000: bounded, the rest dropped"],
        },
        "budget": _budget(macs),
        "macs": macs,
        "distortion": _distortion(),
        "ap": _ap(),
        "recovery": _recovery(),
        "layers": layers,
        "skipped": [{"layer": "dense_head.heads_list.0.hm.1", "reason": "final head convolutions stay dense"}],
        "parity": _parity(),
        "planned_time": _planned_time(),
        "latency": _latency(rng),
        "latency_note": "Zeros save no time on a CPU: only removed channels and skipped 3D tiles do.",
        "plan": _plan(),
        "engines": _engines(),
        "detections": _detections(),
        "stages": [
            {"name": name, "seconds": seconds, "fresh": name == "frames"}
            for name, seconds in (("frames", 0.4), ("gradients", 61.2), ("curves", 4.9), ("allocate", 0.7))
        ],
        "provenance": _provenance(),
        "warnings": ["p99 of 300 samples is indicative: 1,000 are needed"],
    }
    report["verdict"]["sentence"] = verdict_sentence(report)
    return json.dumps(report)
