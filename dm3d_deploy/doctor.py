"""What this machine has, what is missing, which extra brings it, and what cannot be done without it."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dm3d_deploy.device import DEVICES, ON_DEVICE, RTX, gpu_here, usable_cores, version_of

if TYPE_CHECKING:
    from rich.console import Console

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
CORE = "core"

PACKAGES: tuple[tuple[tuple[str, ...], str, str], ...] = (  # distributions (any one will do), extra, what it is for
    (("numpy",), CORE, "everything"),
    (("onnx",), CORE, "reading and writing graphs"),
    (("onnxruntime", "onnxruntime-gpu"), CORE, "detect, verify, bench"),
    (("safetensors",), CORE, "weights"),
    (("pyyaml",), CORE, "model configs"),
    (("typer",), CORE, "the command line"),
    (("rich",), CORE, "the command line"),
    (("jinja2",), CORE, "the report page"),
    (("matplotlib",), CORE, "the report's figures"),
    (("jaxtyping",), CORE, "shapes in signatures"),
    (("torch",), "compile", "build: pruning and export"),
    (("tensorrt-rtx",), "rtx", "engines for RTX devices, made without a GPU"),
    (("tensorrt",), "tensorrt", "engines made on the device"),
    (("spconv-cu120", "spconv-cu126"), "cuda", "calibration of the 3D backbone on a CUDA GPU"),
    (("onnxruntime-gpu",), "cuda", "ONNX Runtime on CUDA"),
    (("triton",), "sparse3d", "the 3D plan: compiling its kernels"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A package of one extra (`core` comes with every installation): its version, or None where it is absent."""

    name: str
    version: str | None
    extra: str
    enables: str

    @property
    def fix(self) -> str:
        """The command that installs it."""
        return f"pip install 'dm3d-deploy{'' if self.extra == CORE else f'[{self.extra}]'}'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The state of this machine for this tool."""

    version: str | None
    python: str
    platform: str
    cores_usable: int
    threads: dict[str, str | None]
    gpu: str | None
    disk_free_bytes: int
    rtx_refusal: str | None
    packages: tuple[Package, ...]

    @property
    def missing(self) -> tuple[Package, ...]:
        """What is not installed."""
        return tuple(package for package in self.packages if package.version is None)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        packages = [{**asdict(package), "fix": None if package.version else package.fix} for package in self.packages]
        return {**asdict(self), "packages": packages}


def diagnose(folder: Path = Path()) -> Diagnosis:
    """Look at this machine without importing anything heavy; `folder` is where runs would be written."""
    from engines.tensorrt_rtx import rtx_missing

    refusal = rtx_missing()
    return Diagnosis(
        version=version_of("dm3d-deploy"),
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        cores_usable=usable_cores(),
        threads={name: os.environ.get(name) for name in THREAD_VARIABLES},
        gpu=gpu_here(),
        disk_free_bytes=shutil.disk_usage(folder).free,
        rtx_refusal=None if refusal is None else str(refusal),
        packages=tuple(
            Package(name=" or ".join(names), version=version_of(*names), extra=extra, enables=enables)
            for names, extra, enables in PACKAGES
        ),
    )


def print_diagnosis(diagnosis: Diagnosis, console: Console | None = None) -> None:
    """Print a diagnosis as a table; what is missing stands with the command that brings it."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console if console is not None else Console()

    facts = Table(show_header=False, box=None)
    threads = ", ".join(f"{name}={value or 'unset'}" for name, value in diagnosis.threads.items())
    for name, value in (
        ("dm3d-deploy", diagnosis.version or "not installed (checkout)"),
        ("Python", f"{diagnosis.python}, {diagnosis.platform}"),
        ("cores", f"{diagnosis.cores_usable} ({threads})"),
        ("GPU", diagnosis.gpu or "no GPU"),
        ("disk", f"{diagnosis.disk_free_bytes / 1e9:.1f} GB free"),
        ("TensorRT-RTX", diagnosis.rtx_refusal or "can build here"),
    ):
        facts.add_row(name, escape(value))
    console.print(facts)
    table = Table("package", "version", "extra", "for")
    for package in diagnosis.packages:
        table.add_row(package.name, package.version or "missing", package.extra, package.enables)
    console.print(table)
    for fix in dict.fromkeys(package.fix for package in diagnosis.missing):
        names = ", ".join(package.name for package in diagnosis.missing if package.fix == fix)
        console.print(escape(f"{fix}   brings {names}"), soft_wrap=True, highlight=False)


def device_rows() -> list[dict[str, Any]]:
    """One row per known device, with what can be done for it on this machine."""
    from engines.tensorrt_rtx import rtx_missing

    refusal = rtx_missing()
    tensorrt = version_of("tensorrt")
    rows = []
    for device in DEVICES:
        if device.refused:
            here = f"refused: {device.refused}"
        elif device.builds_here == RTX:
            here = "engines are built here" if refusal is None else f"no engine here: {refusal.what}"
        elif device.builds_here == ON_DEVICE:
            how = f"TensorRT {tensorrt} is installed here" if tensorrt else "its own TensorRT"
            here = f"ONNX here; the engine is built on the device ({how})"
        else:
            here = "runs here with ONNX Runtime"
        rows.append(
            {
                "device": device.name,
                "sm": device.sm,
                "platform": device.platform,
                "tensorrt": device.tensorrt,
                "cuda": device.cuda,
                "python": device.python,
                "patterns": ", ".join(device.patterns),
                "here": here,
                "note": device.note,
            }
        )
    return rows
