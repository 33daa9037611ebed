"""ONNX -> TensorRT-RTX engine, on any x86_64 machine. Without a GPU an engine is built and never run.

Such an engine proves that the graph is legal for TensorRT, and its types, shapes and size. Kernels are chosen on the
device, so it proves nothing about speed. SPARSE_WEIGHTS is set where a weight is 2:4; TensorRT-RTX accepts the flag and
does nothing with it (the engines are equal byte for byte), which full TensorRT on the device does not.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dm3d_deploy.artifacts import Engine, artifact_of, digest_of_bytes, disk_errors, write_json, write_whole
from dm3d_deploy.device import gpu_here
from dm3d_deploy.errors import EngineError, MissingDependency, StaleArtifact, UsageError, nearest, require
from engines.onnx_weights import check_precision, kernels_of, two_four_kernels

BACKEND = "tensorrt_rtx"
SPARSE_NOTE = "TensorRT-RTX accepts SPARSE_WEIGHTS and does nothing with it; full TensorRT decides on the device"
BUILD_TIMEOUT_S = 900.0
_LOG_LINE = re.compile(r"^\[(VERBOSE|INFO|WARNING|ERROR|INTERNAL_ERROR)\] ", re.MULTILINE)
_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]+), (?P<rest>.*)$", re.MULTILINE)
_FRAMING = ("--- Begin node ---", "--- End node ---", "While parsing node number")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRows:
    """How many rows an open dimension has, at least and at most, and where the most comes from.

    The engine is tuned for the most: it is the fullest frame that has to be in time.
    """

    least: int
    most: int
    source: str

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise UsageError(
                f"an open dimension cannot have {self.least} to {self.most} rows.",
                fix="give 1 or more, the least first",
            )


NO_ROWS: Mapping[str, OpenRows] = MappingProxyType({})


def rtx_missing() -> MissingDependency | None:
    """Why TensorRT-RTX cannot be used here, or None where it can; nothing is imported."""
    machine = platform.machine().lower()
    if machine not in ("x86_64", "amd64") or sys.platform not in ("linux", "win32"):
        return MissingDependency(
            f"TensorRT-RTX has no package for {machine} on {sys.platform}: it exists for x86_64 on Linux and Windows.",
            fix="build the engine on an x86_64 machine, or on the device with its own TensorRT",
        )
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return MissingDependency(
            "the Python package 'tensorrt_rtx' is not installed.", fix="pip install 'dm3d-deploy[rtx]'"
        )
    return None


def build_rtx_engine(
    onnx_path: Path,
    engine_path: str,
    *,
    root: Path,
    targets: tuple[str, ...],
    precision: str,
    log_path: str,
    rows: Mapping[str, OpenRows] = NO_ROWS,
    timeout_s: float = BUILD_TIMEOUT_S,
) -> Engine:
    """Build one engine for all `targets` ("sm_89", ...) in a child process and write it whole.

    `engine_path` and `log_path` are relative to `root`. `<engine_path>.layers.json` beside the engine holds the layer
    list of the build log. `precision` ("fp16", "fp32" or "int8") is that of the graph: it is checked, never converted.
    `rows` bounds the graph's open dimensions by their names: a graph with others is refused.
    MissingDependency where TensorRT-RTX is absent, UsageError for a target it does not know, EngineError otherwise.
    """
    missing = rtx_missing()
    if missing is not None:
        raise missing
    if not targets or len(set(targets)) != len(targets):
        raise UsageError(f"the targets {list(targets)} are empty or repeated.", fix="for example sm_86 and sm_89")
    kernels = kernels_of(onnx_path)
    check_precision(onnx_path, kernels, precision)
    sparse = two_four_kernels(kernels)
    log = root / log_path
    with disk_errors(log):
        log.parent.mkdir(parents=True, exist_ok=True)
    request = {
        "onnx": str(onnx_path.resolve()), "log": str(log.resolve()), "targets": targets, "sparse": bool(sparse),
        "rows": {name: (bound.least, bound.most) for name, bound in rows.items()},
    }  # fmt: skip
    built: dict[str, Any] = {}

    def write(partial: Path) -> None:
        built.update(_answer_of_child({**request, "engine": str(partial.resolve())}, log, timeout_s))
        built["layers"] = layers_of_log(log)
        if not built["layers"]:
            raise EngineError(f"the build log {log} holds no layer list.", fix="report it with the log")

    write_whole(root / engine_path, write)
    write_json(root / (engine_path + ".layers.json"), _layer_report(built, targets, sparse, rows))
    return Engine(
        artifact=artifact_of(root, engine_path, "engine"), backend=BACKEND, version=str(built["version"]),
        built_for=targets, precision=precision, layers=len(built["layers"]), ran_here=False,
    )  # fmt: skip


def _layer_report(
    built: dict[str, Any], targets: tuple[str, ...], sparse: list[str], bounds: Mapping[str, OpenRows]
) -> dict[str, Any]:
    return {
        "backend": BACKEND,
        "version": built["version"],
        "targets": list(targets),
        "count": len(built["layers"]),
        "layers": built["layers"],
        "two_four_weights": sparse,
        "sparse_weights_flag": bool(sparse),
        "sparse_note": SPARSE_NOTE,
        "rows": {name: asdict(bound) for name, bound in bounds.items()},
    }


def _answer_of_child(request: dict[str, Any], log: Path, timeout_s: float) -> dict[str, Any]:
    """Run the worker on a request; raise what went wrong, return what it answered."""
    with tempfile.TemporaryDirectory() as folder:
        answer_path = Path(folder) / "answer.json"
        try:
            child = subprocess.run(
                [sys.executable, "-m", "engines.rtx_worker"],
                input=json.dumps({**request, "answer": str(answer_path)}),
                cwd=Path(__file__).resolve().parents[1],  # -m looks there first: another package named engines loses
                env={name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"},
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise EngineError(
                f"TensorRT-RTX did not finish within {timeout_s:g} s and was stopped; its log is {log}.",
                fix="give it more time or a smaller graph",
            ) from None
        answer = json.loads(answer_path.read_text(encoding="utf-8")) if answer_path.is_file() else None
    if child.returncode != 0 or answer is None:
        raise EngineError(f"{_death(child)}{_because(log)}; its log is {log}.", fix="read the log; report a crash")
    if "unknown_targets" in answer:
        target = answer["unknown_targets"][0]
        raise UsageError(f"TensorRT-RTX cannot build for {target}.", fix=nearest(target, answer["known"]))
    if "failed" in answer:
        raise EngineError(f"{answer['failed']}{_because(log)}; its log is {log}.", fix="read the log")
    return dict(answer)


def _death(child: subprocess.CompletedProcess[str]) -> str:
    last = child.stderr.strip().splitlines()[-1:] or ["no message"]
    if child.returncode < 0:
        return f"the TensorRT-RTX process was killed by {signal.Signals(-child.returncode).name} ({last[0]})"
    return f"the TensorRT-RTX process ended with code {child.returncode} ({last[0]})"


def _because(log: Path) -> str:
    cause = first_error(log)
    return f": {cause}" if cause else ""


def first_error(log: Path) -> str:
    """The cause of a failed build: its first ERROR, with the node it was parsing, or nothing.

    Every API error on a machine without CUDA is followed by cudaError 35, which is noise, and the parser frames its own
    with lines that say nothing more.
    """
    node = ""
    for severity, message in _messages(log):
        if severity not in ("ERROR", "INTERNAL_ERROR"):
            continue
        lines = [line.strip() for line in message.splitlines() if line.strip() and "cudaError 35" not in line]
        text = " ".join(lines)
        if "While parsing node number" in text:
            node = text[text.index("While parsing node number") :].rstrip(":")
        if text and not any(words in text for words in _FRAMING):
            return f"{text} ({node})" if node else text
    return node


def _messages(log: Path) -> list[tuple[str, str]]:
    """(severity, message) of each log entry; an entry may span lines."""
    parts = _LOG_LINE.split(log.read_text(encoding="utf-8", errors="replace")) if log.is_file() else [""]
    return list(zip(parts[1::2], parts[2::2], strict=True))


def layers_of_log(log: Path) -> list[dict[str, Any]]:
    """The engine's layers from a verbose build log, which stands in for the inspector where there is no CUDA.

    Each has its name, kind, tactic and the ONNX nodes it does; layers that TensorRT added (reformats) do none.
    """
    blocks = [message for severity, message in _messages(log) if severity == "VERBOSE" and message[:8] == "Layers:\n"]
    if not blocks:
        return []
    listed = blocks[-1].split("\n\n", 1)[0]
    return [
        {
            "name": layer["name"],
            "kind": layer["kind"],
            "tactic": _field(layer["rest"], r"TacticName: ([^,]*)"),
            "onnx_nodes": re.findall(r"\[ONNX Layer: ([^\]]*)\]", layer["rest"]),
        }
        for layer in _LAYER.finditer(listed)
    ]


def _field(text: str, pattern: str) -> str | None:
    found = re.search(pattern, text)
    return found[1].strip() if found else None


def open_rtx_engine(path: Path, digest: str) -> Any:
    """The deserialised engine, whose bytes were checked against `digest` (SHA-256) before TensorRT-RTX saw them.

    An engine is code: StaleArtifact where the bytes are not those recorded. EngineError where no GPU can load it.
    """
    if not path.is_file():
        raise StaleArtifact(f"{path} is missing.", fix="build the engine again")
    data = path.read_bytes()
    found = digest_of_bytes(data)
    if found != digest:
        raise StaleArtifact(
            f"{path} is not the engine that was built: expected sha256 {digest[:12]}…, found {found[:12]}….",
            fix="build the engine again, or restore the file",
        )
    if gpu_here() is None:
        raise EngineError(f"{path} cannot be loaded: no NVIDIA GPU answers here.", fix="open it on its device")
    trt = require("tensorrt_rtx", extra="rtx")
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(data)
    if engine is None:
        raise EngineError(f"TensorRT-RTX refused to load {path}.", fix="build it for this device")
    return engine
