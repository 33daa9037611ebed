"""The devices an engine can be for, and the facts of this machine that stand beside each number measured on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dm3d_deploy.errors import UsageError, nearest

RTX = "tensorrt_rtx"
ON_DEVICE = "on the device"
ONNXRUNTIME = "onnxruntime"
RTX_GROUP_SMS = ("sm_80", "sm_86", "sm_89", "sm_120")
GPU_QUERY = (
    "name", "driver_version", "compute_cap", "clocks.sm", "clocks.max.sm", "power.limit", "pstate", "temperature.gpu",
    "memory.total",
)  # fmt: skip
QUERY_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One row of platform x TensorRT x CUDA x SM x Python; None where no source we trust says it.

    `fp16_tflops` and `int8_tops` are dense peaks, `gb_per_s` is memory bandwidth, `standing` says how far a latency
    estimate from them was checked. `patterns` are the hardware forms that a mask can be nested in. `builds_here` says
    how its engine is made on a machine without a GPU. A `refused` device cannot be a target, for the reason given.
    """

    name: str
    sm: str | None
    platform: str
    tensorrt: str | None = None
    cuda: str | None = None
    python: str | None = None
    plugin_form: str | None = None
    multiprocessors: int | None = None
    clock_ghz: float | None = None
    fp16_tflops: float | None = None
    int8_tops: float | None = None
    gb_per_s: float | None = None
    standing: str | None = None
    patterns: tuple[str, ...] = ("2:4", "tile")
    builds_here: str
    note: str = ""
    refused: str = ""


_SM80_NOTE = "TensorRT-RTX builds for sm_80, but no support matrix we saw lists it"
_THOR_NOTE = "one chip: sm_101 under CUDA 12.8, sm_110 under CUDA 13"

DEVICES: tuple[Device, ...] = (
    Device(
        name="orin", sm="sm_87", platform="Jetson AGX Orin 64 GB, MAXN, JetPack 6", tensorrt="10.3", cuda="12.6",
        python="3.10", plugin_form="IPluginV3", multiprocessors=16, clock_ghz=1.30, fp16_tflops=42.7, int8_tops=85.5,
        gb_per_s=204.8, standing="published modes", builds_here=ON_DEVICE,
    ),
    Device(
        name="orin-jp7", sm="sm_87", platform="Jetson AGX Orin 64 GB, MAXN, JetPack 7.2.2+", tensorrt="11.4",
        plugin_form="IPluginV3", multiprocessors=16, clock_ghz=1.30, fp16_tflops=42.7, int8_tops=85.5, gb_per_s=204.8,
        standing="published modes", builds_here=ON_DEVICE,
    ),
    Device(
        name="drive-orin", sm="sm_87", platform="DRIVE Orin, DriveOS 6", tensorrt="8.x", multiprocessors=16,
        clock_ghz=1.275, fp16_tflops=41.8, int8_tops=83.6, gb_per_s=204.8, standing="derived", builds_here=ON_DEVICE,
        refused="DriveOS 6 brings TensorRT 8.x, which has no IPluginV3",
    ),
    Device(
        name="thor", sm="sm_101", platform="DRIVE Thor, DriveOS 7.0.3", tensorrt="10.10", cuda="12.8",
        plugin_form="IPluginV3", builds_here=ON_DEVICE, note=_THOR_NOTE,
    ),
    Device(
        name="thor-jp7", sm="sm_110", platform="Jetson Thor T5000, JetPack 7.2.2+", tensorrt="11.4",
        plugin_form="IPluginV3", multiprocessors=20, clock_ghz=1.57, fp16_tflops=258.0, int8_tops=517.0, gb_per_s=273.0,
        standing="unvalidated", builds_here=ON_DEVICE, note=_THOR_NOTE,
    ),
    Device(
        name="a100", sm="sm_80", platform="A100 PCIe 40 GB", multiprocessors=108, clock_ghz=1.41, fp16_tflops=312.0,
        int8_tops=624.0, gb_per_s=1555.0, standing="fitted", builds_here=RTX, note=_SM80_NOTE,
    ),
    Device(
        name="a30", sm="sm_80", platform="A30", multiprocessors=56, clock_ghz=1.44, fp16_tflops=165.0, int8_tops=330.0,
        gb_per_s=933.0, standing="checked", builds_here=RTX, note=_SM80_NOTE,
    ),
    Device(name="rtx3090", sm="sm_86", platform="GeForce RTX 3090", builds_here=RTX),
    Device(
        name="rtx4090", sm="sm_89", platform="GeForce RTX 4090 (fp32 accumulate)", multiprocessors=128, clock_ghz=2.52,
        fp16_tflops=165.0, int8_tops=660.0, gb_per_s=1008.0, standing="unvalidated", builds_here=RTX,
    ),
    Device(name="h100", sm="sm_90", platform="H100", plugin_form="IPluginV3", builds_here=ON_DEVICE),
    Device(
        name="h200", sm="sm_90", platform="H200 SXM", plugin_form="IPluginV3", multiprocessors=132, clock_ghz=1.98,
        fp16_tflops=989.0, int8_tops=1979.0, gb_per_s=4800.0, standing="unvalidated", builds_here=ON_DEVICE,
    ),
    Device(name="rtx5090", sm="sm_120", platform="GeForce RTX 5090", builds_here=RTX),
    Device(
        name="gb10", sm="sm_121", platform="GB10 (DGX Spark)", builds_here=RTX,
        note="built on x86_64; the device itself is aarch64, where TensorRT-RTX has no wheel",
    ),
    Device(
        name="cpu", sm=None, platform="any CPU", patterns=(), builds_here=ONNXRUNTIME,
        note="zeros bring nothing: only physically removed channels help",
    ),
)  # fmt: skip

ALIASES = {"dgx-spark": "gb10"}
GROUPS: dict[str, tuple[str, ...]] = {
    "rtx": tuple(device.name for device in DEVICES if device.builds_here == RTX and device.sm in RTX_GROUP_SMS)
}


def device_named(name: str) -> Device:
    """The row of one device, refused or not; UsageError with the nearest spelling where there is none."""
    wanted = ALIASES.get(name, name)
    for device in DEVICES:
        if device.name == wanted:
            return device
    known = [device.name for device in DEVICES] + list(ALIASES) + list(GROUPS) + ["auto"]
    raise UsageError(f"the device '{name}' is unknown.", fix=nearest(name, known))


def devices_from(names: str) -> tuple[Device, ...]:
    """The devices that a comma-separated list of names and groups means, each once, in the order given.

    `auto` is the GPU of this machine, or the RTX group where there is none. UsageError for an unknown or refused
    device, and for `auto` on a GPU that is not one row of the table.
    """
    words = [word.strip().lower() for word in names.split(",") if word.strip()]
    if not words:
        raise UsageError("no device was named.", fix="for example --device auto, --device rtx or --device orin")
    found: dict[str, Device] = {}
    for word in words:
        for device in _devices_of_word(word):
            if device.refused:
                raise UsageError(
                    f"the device '{device.name}' cannot be a target: {device.refused}.",
                    fix="choose orin (JetPack 6) or thor (DriveOS 7)",
                )
            found[device.name] = device
    return tuple(found.values())


def _devices_of_word(word: str) -> tuple[Device, ...]:
    if word == "auto":
        facts = _gpu_facts()
        if facts is not None:
            return (_device_of_gpu(facts["name"], facts["compute_cap"]),)
        word = "rtx"
    return tuple(device_named(name) for name in GROUPS.get(word, (word,)))


def _device_of_gpu(gpu: str, compute_capability: str) -> Device:
    sm = "sm_" + compute_capability.replace(".", "")
    plain = gpu.lower().replace(" ", "")
    same_sm = [device for device in DEVICES if device.sm == sm]
    matches = [device for device in same_sm if any(word in plain for word in device.name.split("-"))]
    if len(matches) == 1:
        return matches[0]
    close = matches or same_sm
    fix = "--device " + " or ".join(device.name for device in close) if close else "name a device of `devices`"
    raise UsageError(f"this machine's GPU, {gpu} ({sm}), is not one row of the device table.", fix=fix)


def rtx_targets(devices: Iterable[Device]) -> tuple[str, ...]:
    """The compute capabilities, each once, for which TensorRT-RTX builds engines of these devices without a GPU."""
    sms = {device.sm for device in devices if device.builds_here == RTX and device.sm is not None}
    return tuple(sorted(sms, key=lambda sm: int(sm.removeprefix("sm_"))))


def gpu_here() -> str | None:
    """The name of this machine's first NVIDIA GPU, or None where nvidia-smi is absent, silent or slow."""
    facts = _gpu_facts()
    return None if facts is None else facts["name"]


def _gpu_facts() -> dict[str, str] | None:
    rows = _answer("nvidia-smi", f"--query-gpu={','.join(GPU_QUERY)}", "--format=csv,noheader")
    values = [value.strip() for value in rows.splitlines()[0].split(",")] if rows else []
    if len(values) != len(GPU_QUERY):
        return None
    facts = dict(zip(GPU_QUERY, values, strict=True))
    mode = _answer("nvpmodel", "-q")
    if mode:
        facts["power_mode"] = " ".join(mode.split())
    return facts


def _answer(*command: str) -> str:
    """What a program printed, or nothing where it is absent, fails or hangs."""
    program = shutil.which(command[0])
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, *command[1:]], capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """Where and under what load a number was measured. `gpu` is None where no GPU answered."""

    cpu: str
    cores: int
    cores_usable: int
    omp_num_threads: str | None
    os: str
    python: str
    libraries: dict[str, str]
    load_average: tuple[float, float, float] | None
    gpu: dict[str, str] | None

    def as_json(self) -> dict[str, Any]:
        """Plain data for report.json."""
        return {**asdict(self), "gpu": self.gpu if self.gpu is not None else "no GPU"}


def stamp_here() -> Stamp:
    """The facts of this machine now; torch is named only where this process has loaded it, as only then it counts."""
    libraries = {"numpy": version_of("numpy"), "onnxruntime": version_of("onnxruntime", "onnxruntime-gpu")}
    if "torch" in sys.modules:
        libraries["torch"] = version_of("torch")
    return Stamp(
        cpu=_cpu_model(),
        cores=os.cpu_count() or 1,
        cores_usable=usable_cores(),
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        os=platform.platform(),
        python=platform.python_version(),
        libraries={name: version for name, version in libraries.items() if version is not None},
        load_average=os.getloadavg() if hasattr(os, "getloadavg") else None,
        gpu=_gpu_facts(),
    )


def version_of(*distributions: str) -> str | None:
    """The version of the first of these distributions that is installed, read without importing it."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
