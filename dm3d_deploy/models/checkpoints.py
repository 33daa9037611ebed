"""Weights in and out: OpenPCDet's `.pth` (either spconv layout) and `.safetensors`. Nothing in a file is executed."""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dm3d_deploy.artifacts import digest_of_bytes, write_bytes
from dm3d_deploy.errors import CheckpointError
from dm3d_deploy.models.detector import Detector, prunable_layers
from dm3d_deploy.models.naming import made_of
from dm3d_deploy.models.voxel_pruning import expected_tensors, follow_weights

NAMED = 5
SAFETENSORS = ".safetensors"
WRAPPER = "module."  # torch's DistributedDataParallel puts it before every name
# Optimiser states of OpenPCDet hold learning rates as numpy scalars; these names make numbers and nothing else.
NUMPY_SCALARS: tuple[Any, ...] = (
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "bool")),
)
# What damaged or hostile bytes make the unpickler and the archive reader raise.
UNREADABLE = (
    pickle.UnpicklingError,
    struct.error,
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    ImportError,
    MemoryError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """What was loaded: the file's SHA-256, spconv's weight layout ("1.x" or "2.x"), tensors, and casts to float32."""

    path: str
    digest: str
    spconv_layout: str
    tensors: int
    cast: int


def load_checkpoint(detector: Detector, path: Path | str) -> CheckpointInfo:
    """Fill the detector from a file whose names, shapes and types fit exactly; CheckpointError otherwise.

    A refused file leaves the detector as it was.
    """
    path = Path(path)
    data = _bytes_of(path)
    found = _tensors_of(path, data)
    layout, cast = load_tensors(detector, found, str(path))
    return CheckpointInfo(
        path=str(path), digest=digest_of_bytes(data), spconv_layout=layout, tensors=len(found), cast=cast
    )


def load_tensors(detector: Detector, found: Mapping[str, Tensor], source: str) -> tuple[str, int]:
    """Fill the detector with named tensors from `source`; returns spconv's layout and how many were cast to float32.

    CheckpointError for what does not fit exactly, and then the detector stays as it was.
    """
    expected = expected_tensors(detector, found)
    sparse = {f"{layer.name}.weight" for layer in prunable_layers(detector) if layer.kind == "sparse"}
    layout = _spconv_layout(source, found, expected, sparse)
    if layout == "1.x":
        found = {
            name: _from_1x(t, expected[name]) if name in sparse and t.ndim == expected[name].ndim else t
            for name, t in found.items()
        }
    _check_fit(source, detector.config.name, found, expected)
    values = {name: tensor.to(expected[name].dtype) for name, tensor in found.items()}
    _check_values(source, values)
    follow_weights(detector, values)
    detector.load_state_dict(values, strict=False)  # the fit was checked; shares of voxels that are all are not there
    return layout, sum(tensor.dtype != expected[name].dtype for name, tensor in found.items())


def read_tensors(path: Path | str) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name, whatever model it is of; CheckpointError for what is not weights."""
    path = Path(path)
    return _tensors_of(path, _bytes_of(path))


def save_weights(detector: Detector, path: Path | str) -> None:
    """Write every parameter and buffer as safetensors."""
    write_bytes(Path(path), weights_bytes(detector))


def weights_bytes(detector: Detector) -> bytes:
    """Every parameter and buffer as safetensors; the bytes depend on the weights alone."""
    import safetensors.torch

    tensors = {name: value.detach().cpu().contiguous() for name, value in detector.state_dict().items()}
    return safetensors.torch.save(tensors)


def _bytes_of(path: Path) -> bytes:
    """The whole file, so that what is hashed is what is loaded."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder.", fix="name the .pth or .safetensors file inside it")
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}.", fix="check the path")
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror
        raise CheckpointError(f"{path} cannot be read: {reason}.", fix="check the permissions and the disk") from None
    if not data:
        raise CheckpointError(f"{path} is empty.", fix="download or copy it again")
    return data


def _tensors_of(path: Path, data: bytes) -> dict[str, Tensor]:
    """The tensors by name, without executing anything."""
    if path.suffix == SAFETENSORS:
        import safetensors
        import safetensors.torch

        try:
            return safetensors.torch.load(data)
        except (safetensors.SafetensorError, *UNREADABLE) as error:
            raise CheckpointError(
                f"{path} is not a whole safetensors file: {_first_line(error)}.", fix="download or copy it again"
            ) from None
    return _state_of(path, _unpickled(path, data))


def _unpickled(path: Path, data: bytes) -> object:
    """The content of a file that torch.save wrote, restricted to tensors and plain values."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(NUMPY_SCALARS)):
            # Strange bytes make torch suggest a report to its authors; the errors below say what matters.
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a plain torch checkpoint, and nothing in it was executed: {_refusal(error)}.",
            fix="save only the state dict: torch.save({'model_state': model.state_dict()}, PATH)",
        ) from None
    except UNREADABLE as error:
        raise CheckpointError(
            f"{path} is damaged or is not a torch checkpoint ({len(data)} bytes): {_first_line(error)}.",
            fix="download or copy it again",
        ) from None


def _refusal(error: pickle.UnpicklingError) -> str:
    """What torch objects to; its first lines advise to load the file without the check, which no caller should read."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines()]
    return next((line for line in lines if re.search("unsupported", line, re.IGNORECASE)), "it is no such file")[:200]


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0][:200].rstrip(". ")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _state_of(path: Path, content: object) -> dict[str, Tensor]:
    """The state dict of an OpenPCDet checkpoint, or the file itself if it is one, by its names without WRAPPER."""
    state = content.get("model_state", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state or not all(isinstance(name, str) for name in state):
        kind = type(state).__name__
        raise CheckpointError(f"{path} holds a {kind} and no named weights.", fix="give OpenPCDet's checkpoint_*.pth")
    strange = [name for name, value in state.items() if not _is_plain(value)]
    if strange:
        raise CheckpointError(
            f"{path} holds {len(strange)} entries that are not plain tensors: {_some(strange)}.",
            fix="give a checkpoint with 'model_state', or a bare state dict",
        )
    wrapped = all(name.startswith(WRAPPER) for name in state)
    return {name.removeprefix(WRAPPER): value for name, value in state.items()} if wrapped else dict(state)


def _is_plain(value: object) -> bool:
    """Dense, on the CPU, with numbers in it."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def _spconv_layout(
    source: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], sparse: Iterable[str]
) -> str:
    """One layout per file: spconv 2.x [Cout, kz, ky, kx, Cin], or 1.x [kz, ky, kx, Cin, Cout], by what fits.

    Cubic kernels with as many input and output channels as taps along an axis fit both and decide nothing.
    """
    only: dict[str, list[str]] = {"1.x": [], "2.x": []}
    both = []
    for name in sorted(set(sparse) & set(found)):
        shape, wanted = tuple(found[name].shape), tuple(expected[name].shape)
        fits = {"1.x": shape == (*wanted[1:], wanted[0]), "2.x": shape == wanted}
        if all(fits.values()):
            both.append(name)
        for layout, fit in fits.items():
            if fit and name not in both:
                only[layout].append(name)
    if only["1.x"] and only["2.x"]:
        raise CheckpointError(
            f"{source} mixes spconv's weight layouts: {len(only['1.x'])} layers fit 1.x only ({_some(only['1.x'])}), "
            f"{len(only['2.x'])} fit 2.x only ({_some(only['2.x'])}).",
            fix="use a file that one version of spconv wrote",
        )
    if both and not only["1.x"] and not only["2.x"]:
        raise CheckpointError(
            f"the spconv layout of {source} cannot be told from its shapes: {_some(both)} fit 1.x and 2.x.",
            fix="use a configuration with other channel counts",
        )
    return "1.x" if only["1.x"] else "2.x"


def _from_1x(old: Tensor, expected: Tensor) -> Tensor:
    """A weight of spconv 1.x in the layout of 2.x, which reads a kernel of one cell as 1.x does: [Cin, Cout]."""
    if old.numel() == expected.numel() and math.prod(expected.shape[1:-1]) == 1:
        return old.reshape(expected.shape)
    return torch.movedim(old, -1, 0)


def _check_fit(source: str, model: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Every name, shape and kind of number, or one error that counts what is wrong."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    wrong = [
        f"{name} {_kind(found[name])} for {_kind(expected[name])}"
        for name in expected
        if name in found and _kind(found[name]) != _kind(expected[name])
    ]
    groups = (("missing", missing), ("unexpected", unexpected), ("misshapen", wrong))
    if missing or unexpected or wrong:
        theirs, ours = (made_of({name: tuple(t.shape) for name, t in side.items()}) for side in (found, expected))
        other = [f"it holds {theirs}, and {model} is {ours}"] if theirs != ours else []
        named = 1 if other else NAMED  # of another family no list of names says more than that
        parts = other + [f"{len(names)} {word}: {_some(names, named)}" for word, names in groups if names]
        sizes = ((tensor.shape, found[name].shape) for name, tensor in expected.items() if name in found)
        turned = all(sorted(ours) == sorted(theirs) for ours, theirs in sizes)
        raise CheckpointError(
            f"{source} does not fit {model}: {'; '.join(parts)}.",
            fix="bring the axes into an order that spconv writes: [Cout, kz, ky, kx, Cin] or [kz, ky, kx, Cin, Cout]"
            if turned and wrong and not missing and not unexpected
            else "use the checkpoint that was trained with this configuration, or the configuration of this checkpoint",
        )


def _kind(tensor: Tensor) -> str:
    """Shape and kind of number, as an error names them."""
    number = "float" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "integer"
    return f"{number} {tuple(tensor.shape)}"


def _check_values(source: str, values: Mapping[str, Tensor]) -> None:
    """No NaN, no infinity, no negative variance."""
    broken = [name for name, tensor in values.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise CheckpointError(
            f"{source} holds NaN or infinity in {len(broken)} tensors: {_some(broken)}.",
            fix="use an earlier checkpoint: this training had diverged",
        )
    negative = [name for name, t in values.items() if name.endswith("running_var") and bool((t < 0).any())]
    if negative:
        raise CheckpointError(
            f"{source} holds negative variances in {len(negative)} tensors: {_some(negative)}.",
            fix="download or copy it again",
        )


def _some(names: Iterable[str], shown: int = NAMED) -> str:
    """The first few, and a sign that there are more."""
    listed = list(names)
    return ", ".join(listed[:shown]) + (", …" if len(listed) > shown else "")
