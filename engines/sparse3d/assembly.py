"""Writes a plan step by step with names in place of addresses, then packs and closes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from dm3d_deploy.errors import EngineError, InternalError, UsageError, nearest
from engines.sparse3d.packing import Lifetime, aligned, place
from engines.sparse3d.plan import (
    ELEMENT_BYTES,
    F32,
    I32,
    Arg,
    Binding,
    Buffer,
    BufferKind,
    Kernel,
    Launch,
    Memset,
    Plan,
    PlanLayer,
    Pointer,
    Status,
    StatusWord,
    Step,
    packed_constants,
)

INT_LIMIT = 1 << 31
CLEARED = "cleared"
ELEMENT_OF = {"float32": "fp32", "float16": "fp16", "int32": "i32"}


@dataclass(frozen=True, slots=True)
class Array:
    """A named array of the plan, on which kernels work."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size."""
        return prod(self.shape) * ELEMENT_BYTES[self.dtype]


Value = Array | int | float


@dataclass(frozen=True, slots=True)
class _Call:
    kernel: int
    grid: tuple[int, int, int]
    values: tuple[Value, ...]


class Assembly:
    """Arrays and launches in the order in which they were asked for.

    `cleared` arrays are set to zero by one memset before the first launch. Work arrays live from their first use to
    their last, or to the end where they are named in `keep`.
    """

    def __init__(self, keep: Sequence[str]) -> None:
        self.keep = tuple(keep)
        self.arrays: dict[str, tuple[Array, str]] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.kernels: dict[tuple[Any, ...], Kernel] = {}
        self.calls: list[_Call] = []

    def work(self, name: str, dtype: str, *shape: int) -> Array:
        """An array of the workspace whose first content a kernel writes."""
        return self._add(Array(name, dtype, shape), "work")

    def cleared(self, name: str, dtype: str, *shape: int) -> Array:
        """An array of the workspace that is zero when the plan starts."""
        return self._add(Array(name, dtype, shape), CLEARED)

    def binding(self, kind: BufferKind, name: str, dtype: str, *shape: int) -> Array:
        """An input or output that the caller brings."""
        return self._add(Array(name, dtype, shape), kind)

    def constant(self, name: str, values: np.ndarray) -> Array:
        """A constant."""
        self.constants[name] = values
        return self._add(Array(name, ELEMENT_OF[values.dtype.name], values.shape), "constant")

    def array(self, name: str) -> Array:
        """The array of that name."""
        return self.arrays[name][0]

    def launch(self, function: str, grid: Sequence[int], *values: Value, **constexprs: int | bool) -> None:
        """Append a launch; the kernel's signature follows from the values."""
        signature = tuple(_type_of(value) for value in values)
        key = (function, signature, tuple(sorted(constexprs.items())))
        if key not in self.kernels:
            name = f"{function.partition('.')[2]}_{len(self.kernels)}"
            self.kernels[key] = Kernel(name=name, function=function, signature=signature, constexprs=constexprs)
        x, y, z = (*grid, 1, 1)[:3]
        kernel = list(self.kernels).index(key)
        self.calls.append(_Call(kernel, (x, y, z), values))

    def _add(self, array: Array, kind: str) -> Array:
        if array.name in self.arrays:
            raise InternalError(f"two arrays of a plan are named {array.name}")
        if prod(array.shape) >= INT_LIMIT:
            raise EngineError(
                f"the plan's array {array.name} would have {prod(array.shape):,} elements, beyond 32-bit indices.",
                fix="lower the capacities or the grid",
            )
        self.arrays[array.name] = (array, kind)
        return array

    def close(
        self, *, capacities: Mapping[str, int], layers: Sequence[PlanLayer], words: Sequence[StatusWord],
        report: Array, meta: Mapping[str, Any],
    ) -> Plan:  # fmt: skip
        """Pack the workspace, resolve the names and check the whole."""
        for name in self.keep:
            if name not in self.arrays:
                raise UsageError(f"the plan has no array '{name}' to keep.", fix=nearest(name, self.arrays))
        blob, constant_buffers = packed_constants(self.constants)
        offsets, cleared_bytes, workspace_bytes, inside = self._packed()
        buffers = [*constant_buffers, *self._buffers(offsets, cleared_bytes)]
        index = {buffer.name: number for number, buffer in enumerate(buffers)}
        pointers = {name: Pointer(index[CLEARED], start) for name, start in inside.items()}
        pointers |= {name: Pointer(index[name]) for name in self.arrays if name not in inside}
        steps: list[Step] = []
        if cleared_bytes:
            steps.append(Memset(buffer=index[CLEARED], offset=0, bytes=cleared_bytes))
        for call in self.calls:
            args = tuple(_argument(value, pointers) for value in call.values)
            steps.append(Launch(kernel=call.kernel, grid=call.grid, args=args))
        where = pointers[report.name]
        kept = {name: self.arrays[name][0] for name in self.keep}
        return Plan(
            kernels=tuple(self.kernels.values()),
            buffers=tuple(buffers),
            constants=blob,
            steps=tuple(steps),
            capacities=capacities,
            workspace_bytes=workspace_bytes,
            inputs=self._bindings("input", index),
            outputs=self._bindings("output", index),
            layers=tuple(layers),
            status=Status(buffer=where.buffer, offset=where.offset, words=tuple(words)),
            meta={
                **meta,
                "kept": {
                    name: {
                        "dtype": array.dtype, "shape": list(array.shape),
                        "buffer": pointers[name].buffer, "offset": pointers[name].offset,
                    }
                    for name, array in kept.items()
                },
            },
        )  # fmt: skip

    def _buffers(self, offsets: Mapping[str, int], cleared_bytes: int) -> Iterator[Buffer]:
        if cleared_bytes:
            yield Buffer(name=CLEARED, offset=offsets[CLEARED], bytes=cleared_bytes, kind="workspace")
        for array, kind in self.arrays.values():
            if kind == "work":
                yield Buffer(name=array.name, offset=offsets[array.name], bytes=array.bytes, kind="workspace")
            elif kind in ("input", "output"):
                yield Buffer(name=array.name, offset=0, bytes=array.bytes, kind=_bound(kind))

    def _bindings(self, kind: str, index: Mapping[str, int]) -> tuple[Binding, ...]:
        return tuple(
            Binding(name=array.name, dtype=array.dtype, shape=array.shape, buffer=index[array.name])
            for array, own in self.arrays.values()
            if own == kind
        )

    def _packed(self) -> tuple[dict[str, int], int, int, dict[str, int]]:
        """Offsets of workspace buffers, bytes cleared, bytes in all, and where cleared arrays start in their buffer."""
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for number, call in enumerate(self.calls):
            for value in call.values:
                if isinstance(value, Array):
                    first.setdefault(value.name, number)
                    last[value.name] = number
        last |= dict.fromkeys(self.keep, len(self.calls))
        unused = [name for name, (_, kind) in self.arrays.items() if name not in first and kind != "constant"]
        if unused:
            raise InternalError(f"no kernel of the plan uses {unused}")
        inside: dict[str, int] = {}
        cleared_bytes = 0
        lifetimes = []
        for array, kind in self.arrays.values():
            if kind == CLEARED:
                inside[array.name] = cleared_bytes
                cleared_bytes += aligned(array.bytes)
            elif kind == "work":
                life = Lifetime(name=array.name, bytes=array.bytes, first=first[array.name], last=last[array.name])
                lifetimes.append(life)
        if cleared_bytes:
            lifetimes.append(Lifetime(name=CLEARED, bytes=cleared_bytes, first=0, last=len(self.calls)))
        offsets, workspace_bytes = place(lifetimes)
        return offsets, cleared_bytes, workspace_bytes, inside


def _bound(kind: str) -> BufferKind:
    return "input" if kind == "input" else "output"


def _type_of(value: Value) -> str:
    if isinstance(value, Array):
        return f"*{value.dtype}"
    return "i32" if isinstance(value, int) else "fp32"


def _argument(value: Value, pointers: Mapping[str, Pointer]) -> Arg:
    if isinstance(value, Array):
        return pointers[value.name]
    return I32(value) if isinstance(value, int) else F32(value)
