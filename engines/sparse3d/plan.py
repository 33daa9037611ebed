"""A launch plan: buffers in one workspace, constants, and a list of kernel launches and memsets. Plain data.

Every executor walks the same steps: the Triton interpreter, CUDA from Python, and the C++ runtime in the vehicle. All
capacities are static, true counts live on the device, and nothing is allocated while a plan runs. A plan refuses to be
born wrong: indices, offsets, alignment and argument kinds are checked here once, for every reader and every writer.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn

import numpy as np

from dm3d_deploy.errors import EngineError

BUFFER_ALIGNMENT_BYTES = 256
POINTER_ALIGNMENT_BYTES = 16  # what every kernel is compiled for (tt.divisibility)
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_ARGS = 64
MAX_BYTES = 1 << 40
MAX_WARPS = 32
ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "i64": 8, "i32": 4, "i8": 1, "u8": 1}
FUNCTION = re.compile(r"kernels\w*\.[A-Za-z_]\w*")

BufferKind = Literal["workspace", "constant", "input", "output"]
StatusKind = Literal["count", "dropped", "cutoff_m"]
BUFFER_KINDS: tuple[BufferKind, ...] = ("workspace", "constant", "input", "output")
STATUS_KINDS: tuple[StatusKind, ...] = ("count", "dropped", "cutoff_m")
FEATURES = {"memset": 1, "i64_arguments": 2, "f32_arguments": 4, "status": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """`bytes` bytes at `offset` of the workspace or of the constants; an input or output stands alone (offset 0).

    Workspace buffers may overlap: whose lifetimes do not is for the planner to know.
    """

    name: str
    offset: int
    bytes: int
    kind: BufferKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One specialisation of a Triton function: `function` is "module.name" in engines.sparse3d, "kernels_index.rank".

    `signature` holds Triton's types of the run-time parameters in their order, constexprs left out.
    """

    name: str
    function: str
    signature: tuple[str, ...]
    constexprs: Mapping[str, int | float | bool]
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True, slots=True)
class Pointer:
    """The address of a byte of a buffer."""

    buffer: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class I32:
    """A 32-bit signed integer argument."""

    value: int


@dataclass(frozen=True, slots=True)
class I64:
    """A 64-bit signed integer argument."""

    value: int


@dataclass(frozen=True, slots=True)
class F32:
    """A float argument; its value is rounded to 32 bits, as the kernel will see it."""

    value: float

    def __post_init__(self) -> None:
        try:
            (rounded,) = struct.unpack("<f", struct.pack("<f", self.value))
        except OverflowError:
            rounded = math.inf
        object.__setattr__(self, "value", rounded)


Arg = Pointer | I32 | I64 | F32
TYPE_OF_SCALAR: Mapping[type, str] = {I32: "i32", I64: "i64", F32: "fp32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One kernel launch."""

    kernel: int
    grid: tuple[int, int, int]
    args: tuple[Arg, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Memset:
    """Fill `bytes` bytes with a 32-bit word (0 <= value < 2**32); offset and bytes are multiples of 4."""

    buffer: int
    offset: int
    bytes: int
    value: int = 0


Step = Launch | Memset


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """An input or output that the caller brings: its element type in Triton's words, its shape, its buffer."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    buffer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusWord:
    """One 32-bit word that a run leaves.

    "count": the true i32 count of the stage `name`, over `capacities[name]` when the stage overflowed. "dropped": i32
    rows left out. "cutoff_m": f32 radius in metres beyond which cells were dropped, 0 where none was.
    """

    name: str
    kind: StatusKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Where the status words lie, one after the other."""

    buffer: int
    offset: int = 0
    words: tuple[StatusWord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanLayer:
    """What the plan says of one convolution: weight tiles executed and in all, kernel taps, channels."""

    name: str
    tiles_kept: int
    tiles_total: int
    taps: int
    in_channels: int
    out_channels: int

    def __post_init__(self) -> None:
        numbers = (self.tiles_kept, self.tiles_total, self.taps, self.in_channels, self.out_channels)
        whole = all(isinstance(number, int) and number >= 0 for number in numbers)
        if not isinstance(self.name, str) or not whole or self.tiles_kept > self.tiles_total:
            _refuse(f"the layer {self.name!r} has the tiles, taps and channels {numbers}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cubin:
    """One kernel for one architecture; `hidden_params` trailing pointers of Triton's own are passed as null."""

    symbol: str
    image: bytes
    shared_bytes: int
    threads: int
    hidden_params: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The whole; `cubins` holds one image per kernel for each SM (87: ...), and may be empty: a neutral plan.

    `constants` is one blob that constant buffers point into; `capacities` are rows per stage; `meta` is anything JSON.
    """

    kernels: tuple[Kernel, ...]
    buffers: tuple[Buffer, ...]
    constants: bytes
    steps: tuple[Step, ...]
    capacities: Mapping[str, int]
    workspace_bytes: int
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    layers: tuple[PlanLayer, ...] = ()
    status: Status | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    cubins: Mapping[int, tuple[Cubin, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kernel in self.kernels:
            _check_kernel(kernel)
        for buffer in self.buffers:
            self._check_buffer(buffer)
        self._check_bindings()
        for number, step in enumerate(self.steps):
            self._check_step(f"step {number}", step)
        if self.status is not None:
            self._check_status(self.status)
        for sm, cubins in self.cubins.items():
            _check_cubins(sm, cubins, len(self.kernels))

    @property
    def features(self) -> int:
        """The bits of what a reader must be able to do (FEATURES)."""
        launches = [step for step in self.steps if isinstance(step, Launch)]
        kinds = {type(arg) for step in launches for arg in step.args}
        used = {
            "memset": len(launches) < len(self.steps),
            "i64_arguments": I64 in kinds,
            "f32_arguments": F32 in kinds,
            "status": self.status is not None,
        }
        return sum(bit for name, bit in FEATURES.items() if used[name])

    def buffer_index(self, name: str) -> int:
        """The index of the buffer of that name."""
        found = [index for index, buffer in enumerate(self.buffers) if buffer.name == name]
        if len(found) != 1:
            _refuse(f"{len(found)} buffers are named '{name}' where one was expected")
        return found[0]

    def _check_buffer(self, buffer: Buffer) -> None:
        what = f"the buffer '{buffer.name}'"
        if buffer.kind not in BUFFER_KINDS:
            _refuse(f"{what} is of the unknown kind '{buffer.kind}'")
        if not 0 < buffer.bytes <= MAX_BYTES or not 0 <= buffer.offset <= MAX_BYTES:
            _refuse(f"{what} has {buffer.bytes} bytes at offset {buffer.offset}")
        if buffer.offset % BUFFER_ALIGNMENT_BYTES:
            _refuse(f"{what} starts at {buffer.offset}, no multiple of {BUFFER_ALIGNMENT_BYTES}")
        room = {"workspace": self.workspace_bytes, "constant": len(self.constants)}.get(buffer.kind, buffer.bytes)
        if buffer.offset + buffer.bytes > room:
            _refuse(f"{what} ends at byte {buffer.offset + buffer.bytes} of {room}")

    def _check_bindings(self) -> None:
        if not 0 <= self.workspace_bytes <= MAX_BYTES:
            _refuse(f"the workspace has {self.workspace_bytes} bytes")
        bound = []
        for kind, bindings in (("input", self.inputs), ("output", self.outputs)):
            for binding in bindings:
                buffer = self._buffer(f"the {kind} '{binding.name}'", binding.buffer)
                if binding.dtype not in ELEMENT_BYTES:
                    _refuse(f"the {kind} '{binding.name}' is of the unknown type '{binding.dtype}'")
                size = math.prod(binding.shape) * ELEMENT_BYTES[binding.dtype]
                if buffer.kind != kind or min(binding.shape, default=1) <= 0 or buffer.bytes != size:
                    _refuse(
                        f"the {kind} '{binding.name}' {binding.dtype}{list(binding.shape)} does not fit the "
                        f"{buffer.kind} buffer '{buffer.name}' of {buffer.bytes} bytes"
                    )
                bound.append(binding.buffer)
        outside = [index for index, buffer in enumerate(self.buffers) if buffer.kind in ("input", "output")]
        if sorted(bound) != outside:
            _refuse(f"the bindings name the buffers {sorted(bound)}, but inputs and outputs are the buffers {outside}")

    def _check_step(self, what: str, step: Step) -> None:
        if isinstance(step, Memset):
            buffer = self._buffer(what, step.buffer)
            if buffer.kind not in ("workspace", "output"):
                _refuse(f"{what} fills the {buffer.kind} '{buffer.name}'")
            if not 0 <= step.value < 2**32 or step.offset % 4 or step.bytes % 4:
                _refuse(f"{what} fills {step.bytes} bytes at {step.offset} with {step.value}, no words of 32 bits")
            if step.offset < 0 or step.bytes <= 0 or step.offset + step.bytes > buffer.bytes:
                _refuse(f"{what} fills bytes {step.offset}..{step.offset + step.bytes} of {buffer.bytes}")
            return
        if not 0 <= step.kernel < len(self.kernels):
            _refuse(f"{what} launches kernel {step.kernel} of {len(self.kernels)}")
        if any(not 1 <= size <= most for size, most in zip(step.grid, MAX_GRID, strict=True)):
            _refuse(f"{what} has the grid {step.grid}, outside 1..{MAX_GRID}")
        kernel = self.kernels[step.kernel]
        if len(step.args) != len(kernel.signature):
            _refuse(
                f"{what} passes {len(step.args)} arguments to {kernel.function}, which takes {len(kernel.signature)}"
            )
        for position, (arg, wanted) in enumerate(zip(step.args, kernel.signature, strict=True)):
            self._check_arg(f"{what}, argument {position} of {kernel.function}", arg, wanted)

    def _check_arg(self, what: str, arg: Arg, wanted: str) -> None:
        if not isinstance(arg, Pointer):
            given = TYPE_OF_SCALAR[type(arg)]
            if given != wanted:
                _refuse(f"{what} is {given}, not {wanted}")
            bits = {I32: 32, I64: 64}.get(type(arg))
            if bits is not None and not -(2 ** (bits - 1)) <= arg.value < 2 ** (bits - 1):
                _refuse(f"{what} is {arg.value}, more than {bits} bits")
            if not math.isfinite(arg.value):
                _refuse(f"{what} is {arg.value}, no 32-bit number")
            return
        if not wanted.startswith("*"):
            _refuse(f"{what} is a pointer, not {wanted}")
        buffer = self._buffer(what, arg.buffer)
        if not 0 <= arg.offset < buffer.bytes or arg.offset % POINTER_ALIGNMENT_BYTES:
            _refuse(
                f"{what} points at byte {arg.offset} of '{buffer.name}', outside its {buffer.bytes} bytes or no "
                f"multiple of {POINTER_ALIGNMENT_BYTES}"
            )

    def _check_status(self, status: Status) -> None:
        buffer = self._buffer("the status", status.buffer)
        end = status.offset + 4 * len(status.words)
        if status.offset < 0 or status.offset % 4 or end > buffer.bytes or not status.words:
            _refuse(f"the status has {len(status.words)} words at byte {status.offset} of {buffer.bytes}")
        if buffer.kind not in ("workspace", "output"):
            _refuse(f"the status lies in the {buffer.kind} '{buffer.name}'")
        for word in status.words:
            if word.kind not in STATUS_KINDS or (word.kind == "count" and word.name not in self.capacities):
                _refuse(
                    f"the status word '{word.name}' is of the kind '{word.kind}' or counts a stage without capacity"
                )

    def _buffer(self, what: str, index: int) -> Buffer:
        if not 0 <= index < len(self.buffers):
            _refuse(f"{what} names buffer {index} of {len(self.buffers)}")
        return self.buffers[index]


def add_cubins(plan: Plan, sm: int, cubins: Iterable[Cubin]) -> Plan:
    """The plan with the images of one SM (87), one per kernel; those of an SM it had are replaced."""
    return replace(plan, cubins={**plan.cubins, sm: tuple(cubins)})


def packed_constants(arrays: Mapping[str, np.ndarray]) -> tuple[bytes, tuple[Buffer, ...]]:
    """One aligned little-endian blob, and a constant buffer for each array, in the mapping's order."""
    blob = bytearray()
    buffers = []
    for name, array in arrays.items():
        data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        buffers.append(Buffer(name=name, offset=len(blob), bytes=len(data), kind="constant"))
        blob += data + bytes(-len(data) % BUFFER_ALIGNMENT_BYTES)
    return bytes(blob), tuple(buffers)


def _check_kernel(kernel: Kernel) -> None:
    known = {f"*{name}" for name in ELEMENT_BYTES} | set(TYPE_OF_SCALAR.values())
    strange = [name for name in kernel.signature if name not in known]
    if FUNCTION.fullmatch(kernel.function) is None:
        _refuse(f"'{kernel.function}' names no kernel of ours")
    if strange or len(kernel.signature) > MAX_ARGS:
        _refuse(f"{kernel.function} takes {len(kernel.signature)} arguments, of unknown types: {strange}")
    if any(not isinstance(value, (int, float)) for value in kernel.constexprs.values()):
        _refuse(f"{kernel.function} has constexprs that are no numbers: {dict(kernel.constexprs)}")
    warps = kernel.num_warps
    if not 1 <= warps <= MAX_WARPS or warps & (warps - 1) or not 1 <= kernel.num_stages <= 8:
        _refuse(f"{kernel.function} asks for {warps} warps and {kernel.num_stages} stages")


def _check_cubins(sm: int, cubins: tuple[Cubin, ...], kernels: int) -> None:
    if not 10 <= sm < 1000 or len(cubins) != kernels:
        _refuse(f"sm_{sm} has {len(cubins)} images for {kernels} kernels")
    for cubin in cubins:
        fits = 0 <= cubin.shared_bytes < 2**20 and 0 <= cubin.hidden_params <= 8 and len(cubin.image) > 0
        if not fits or not cubin.symbol or cubin.threads % 32 or not 32 <= cubin.threads <= 1024:
            _refuse(
                f"the image of '{cubin.symbol}' for sm_{sm} has {len(cubin.image)} bytes, {cubin.threads} threads, "
                f"{cubin.shared_bytes} bytes of shared memory and {cubin.hidden_params} hidden parameters"
            )


def _refuse(what: str) -> NoReturn:
    raise EngineError(f"the launch plan is wrong: {what}.", fix="plan the backbone again with this version")
