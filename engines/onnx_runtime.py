"""ONNX Runtime on the CPU: the engine that every machine has, and the reference for the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from dm3d_deploy.artifacts import digest_of_bytes
from dm3d_deploy.errors import EngineError, FrameError, StaleArtifact, UsageError
from dm3d_deploy.pointcloud import Voxels

Interface = Mapping[str, tuple[str, tuple[int, ...]]]
TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}
SEVERITY_FATAL = 4
GRID = "dm3d.grid_zyx"
OPEN_ROWS = "rows_of_"  # begins the name of a dimension that differs from frame to frame, told as -1


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxSession:
    """A graph ready to run; inputs and outputs: name -> (element type, static shape). See `open_session`."""

    name: str
    inputs: Interface
    outputs: Interface
    metadata: Mapping[str, str]
    version: str
    threads: int | None
    session: Any
    runtime: ModuleType

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once on exactly the declared inputs; equal inputs give equal bits. EngineError says what does not fit."""
        if inputs.keys() != self.inputs.keys():
            raise EngineError(
                f"{self.name} takes the inputs {', '.join(self.inputs)}, not {', '.join(inputs) or 'none'}.",
                fix="give exactly these arrays",
            )
        for name, (kind, shape) in self.inputs.items():
            found = (inputs[name].dtype.name, inputs[name].shape)
            if found[0] != kind or not _fits(found[1], shape):
                raise EngineError(
                    f"{self.name}: input '{name}' must be {kind} {list(shape)}, not {found[0]} {list(found[1])}.",
                    fix="convert the array, or export the graph for this shape",
                )
        try:
            values = self.session.run(list(self.outputs), dict(inputs))
        except _failures(self.runtime) as error:
            raise EngineError(
                f"{self.name} failed in ONNX Runtime {self.version}: {_first_line(error)}",
                fix="check that the inputs lie in the range that the model was exported for",
            ) from error
        return dict(zip(self.outputs, values, strict=True))


def open_session(path: Path, *, digest: str, threads: int | None) -> OnnxSession:
    """Open an ONNX file whose SHA-256 is `digest`, on the CPU; `threads` None leaves the number to the runtime.

    StaleArtifact when the file is absent or another one; EngineError when ONNX Runtime refuses it.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads cannot run anything.", fix="give at least one thread, or none at all")
    if not path.is_file():
        raise StaleArtifact(f"{path} is missing.", fix="run the build again: it makes only what is missing")
    data = path.read_bytes()
    found = digest_of_bytes(data)
    if found != digest:
        raise StaleArtifact(
            f"{path} is not the file that was built: expected sha256 {digest[:12]}…, found {found[:12]}….",
            fix="run the build again, or restore the file",
        )
    import onnxruntime

    runtime: ModuleType = onnxruntime
    try:
        session = runtime.InferenceSession(data, _options(runtime, threads), providers=["CPUExecutionProvider"])
    except _failures(runtime) as error:
        raise EngineError(
            f"ONNX Runtime {runtime.__version__} refuses {path}: {_first_line(error)}",
            fix="export the graph again, or install another onnxruntime",
        ) from error
    return OnnxSession(
        name=path.name,
        inputs=_interface(path, session.get_inputs()),
        outputs=_interface(path, session.get_outputs()),
        metadata=dict(session.get_modelmeta().custom_metadata_map),
        version=str(runtime.__version__),
        threads=threads,
        session=session,
        runtime=runtime,
    )


def _options(runtime: ModuleType, threads: int | None) -> Any:
    """Errors come as exceptions, so the log stays silent; threads sleep while they wait: machines are shared."""
    options = runtime.SessionOptions()
    options.log_severity_level = SEVERITY_FATAL
    options.use_deterministic_compute = True
    options.inter_op_num_threads = 1
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _failures(runtime: ModuleType) -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises; its classes share no base of their own."""
    state = runtime.capi.onnxruntime_pybind11_state
    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException")
    return (*(getattr(state, name) for name in names), RuntimeError)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _interface(path: Path, values: list[Any]) -> Interface:
    found = {}
    for value in values:
        sizes = [-1 if str(size).startswith(OPEN_ROWS) else size for size in value.shape]
        if value.type not in TYPES or any(not isinstance(size, int) for size in sizes):
            raise EngineError(
                f"{path}: '{value.name}' is {value.type} {value.shape}; only static shapes of plain types are run.",
                fix="export the graph with static shapes",
            )
        found[value.name] = (TYPES[value.type], tuple(sizes))
    return found


def _fits(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether an array's shape is the declared one; open rows (-1) may be any number of them."""
    return len(found) == len(shape) and all(size in (-1, own) for own, size in zip(found, shape, strict=True))


def run_backbone(
    session: OnnxSession, voxels: Voxels
) -> tuple[Float32[np.ndarray, "1 channels height width"], Int32[np.ndarray, " stages"]]:
    """BEV map and active sites per stage of one frame, see `run_backbone_stages`."""
    outputs = run_backbone_stages(session, voxels)
    return outputs["bev"], outputs["status"]


def run_backbone_stages(session: OnnxSession, voxels: Voxels) -> dict[str, np.ndarray]:
    """All outputs of the graph for one frame, padded to the graph's capacity.

    FrameError when the frame has more voxels than the graph has room for, other columns, or cells outside its grid.
    """
    if GRID not in session.metadata:
        raise EngineError(
            f"{session.name} is no 3D backbone: it does not record {GRID}.", fix="give the backbone3d.onnx of an export"
        )
    capacity, columns = session.inputs["features"][1]
    count = len(voxels.coords)
    if count > capacity:
        raise FrameError(
            f"the frame has {count} voxels and {session.name} has room for {capacity}.",
            fix=f"cap the voxels at {capacity}, or export with a larger max_voxels",
        )
    if voxels.features.shape[1] != columns:
        raise FrameError(
            f"the voxels have {voxels.features.shape[1]} columns and {session.name} takes {columns}.",
            fix="use a frame of the sensor that the model was trained for",
        )
    grid = tuple(int(size) for size in session.metadata[GRID].split(","))
    outside = ((voxels.coords < 0) | (voxels.coords >= (1, *grid))).any(axis=1)
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise FrameError(
            f"voxel {row} lies at (batch, z, y, x) {voxels.coords[row].tolist()}, outside the grid {grid}.",
            fix="voxelise with the range of the model's config, one frame at a time",
        )
    features = np.zeros((capacity, columns), np.float32)
    coords = np.zeros((capacity, 4), np.int32)
    features[:count], coords[:count] = voxels.features, voxels.coords
    return session.run({"features": features, "coords": coords, "count": np.array([count], np.int32)})
