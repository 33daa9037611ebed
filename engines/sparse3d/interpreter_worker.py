"""Child process of interpreter.py: walks the steps of a plan through Triton's interpreter.

It reads a request as JSON on standard input: folder, frames, backwards. In the folder are `plan` and `frame_N.npz`; it
leaves `run_N.npz` and `trace.json`. TRITON_INTERPRET=1 must be set before it starts.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import numpy as np

from dm3d_deploy.errors import EngineError, require
from engines.sparse3d.interpreter import NUMPY_OF, read_kept
from engines.sparse3d.plan import Launch, Memset, Plan, Pointer
from engines.sparse3d.plan_file import decode_plan


class Address:
    """A typed pointer in the clothes of a tensor: all that the interpreter asks of an argument."""

    def __init__(self, address: int, dtype: str) -> None:
        self.address = address
        self.dtype = dtype

    def data_ptr(self) -> int:
        """The address."""
        return self.address

    def untyped_storage(self) -> Address:
        """Itself: it lies on the host already."""
        return self

    def cpu(self) -> Address:
        """Itself."""
        return self

    def copy_(self, other: Address) -> None:
        """Nothing: kernels worked in place."""

    def new_empty(self, *_: Any, **__: Any) -> Address:
        """An equal pointer."""
        return Address(self.address, self.dtype)

    def set_(self, *_: Any) -> None:
        """Nothing: the pointer is set."""

    def storage_offset(self) -> int:
        """Always 0."""
        return 0

    def size(self) -> tuple[int, ...]:
        """Always ()."""
        return ()

    stride = size


class WithoutTorch(MetaPathFinder):
    """Triton would import torch to look for a GPU, which takes longer than many a run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Torch is absent, all else is for others to find."""
        if name == "torch":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


class Memory:
    """The buffers of a plan in host memory."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.constants = np.frombuffer(plan.constants, np.uint8).copy()
        self.workspace = np.zeros(plan.workspace_bytes, np.uint8)
        self.bound = {
            binding.buffer: np.zeros(plan.buffers[binding.buffer].bytes, np.uint8)
            for binding in (*plan.inputs, *plan.outputs)
        }

    def bytes_of(self, buffer: int) -> np.ndarray:
        """The bytes of one buffer."""
        told = self.plan.buffers[buffer]
        if told.kind in ("input", "output"):
            return self.bound[buffer]
        space = self.workspace if told.kind == "workspace" else self.constants
        return space[told.offset : told.offset + told.bytes]

    def fill(self, frame: dict[str, np.ndarray]) -> None:
        """The frame into the inputs, all ones into everything that a run must write before it reads."""
        self.workspace[:] = 255
        for output in self.plan.outputs:
            self.bound[output.buffer][:] = 255
        for binding in self.plan.inputs:
            self.bound[binding.buffer][:] = frame[binding.name].reshape(-1).view(np.uint8)

    def result(self) -> dict[str, Any]:
        """Outputs, kept arrays and status of the last run."""
        plan = self.plan
        found: dict[str, Any] = {}
        for output in plan.outputs:
            values = self.bound[output.buffer].view(NUMPY_OF[output.dtype]).reshape(output.shape)
            found[f"output:{output.name}"] = values
        found |= {f"kept:{name}": array for name, array in read_kept(plan, self.workspace).items()}
        if plan.status is not None:
            start, words = plan.status.offset, len(plan.status.words)
            found["status"] = self.bytes_of(plan.status.buffer)[start : start + 4 * words]
        return found


@contextmanager
def watched(ranges: list[tuple[int, int]], *, backwards: bool) -> Iterator[Any]:
    """Refuse addresses outside `ranges` (start, end), and turn the order of programs round if asked."""
    interpreter = require("triton.runtime.interpreter", extra="sparse3d")
    builder = interpreter.interpreter_builder
    # Computes whether integers overflow and then, without a debugger, drops the answer: half of the time.
    builder.options = replace(builder.options, sanitize_overflow=False)
    names = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "set_grid_idx")
    own = {name: getattr(builder, name) for name in names}

    def check(pointers: Any, mask: Any) -> None:
        width = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = np.asarray(pointers.data)[np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape)]
        for start, end in ranges:
            addresses = addresses[(addresses < start) | (addresses + width > end)]
        if len(addresses):
            raise EngineError(f"{len(addresses)} addresses lie outside the arrays of the launch.", fix="report it")

    def load(pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return own["create_masked_load"](pointers, mask, *rest)

    def store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return own["create_masked_store"](pointers, value, mask, *rest)

    def atomic(kind: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return own["create_atomic_rmw"](kind, pointers, value, mask, *rest)

    def place(x: int, y: int, z: int) -> None:
        size = builder.grid_dim
        own["set_grid_idx"](*(n - 1 - i for n, i in zip(size, (x, y, z), strict=True)))

    builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw = load, store, atomic
    if backwards:
        builder.set_grid_idx = place
    try:
        yield None
    finally:
        for name in names:
            setattr(builder, name, own[name])


def run_launch(step: Launch, plan: Plan, memory: Memory, *, backwards: bool) -> None:
    """One launch."""
    kernel = plan.kernels[step.kernel]
    module, name = kernel.function.split(".")
    function = getattr(importlib.import_module(f"engines.sparse3d.{module}"), name)
    values: list[Any] = []
    ranges: list[tuple[int, int]] = []
    for arg, wanted in zip(step.args, kernel.signature, strict=True):
        if isinstance(arg, Pointer):
            buffer = memory.bytes_of(arg.buffer)
            ranges.append((buffer.ctypes.data, buffer.ctypes.data + buffer.nbytes))
            values.append(Address(buffer.ctypes.data + arg.offset, NUMPY_OF[wanted[1:]]))
        else:
            values.append(arg.value)
    parameters = [word for word in function.arg_names if word not in kernel.constexprs]
    with watched(sorted(set(ranges)), backwards=backwards):
        function[step.grid](**dict(zip(parameters, values, strict=True)), **kernel.constexprs)


def trace_of(plan: Plan) -> list[dict[str, Any]]:
    """Every step as plain data: kernel or "memset", grid, arguments."""
    rows: list[dict[str, Any]] = []
    for step in plan.steps:
        if isinstance(step, Memset):
            target = _place(plan, Pointer(step.buffer, step.offset))
            rows.append({"kernel": "memset", "grid": [], "args": [target, step.value, step.bytes]})
        else:
            args = [_place(plan, arg) if isinstance(arg, Pointer) else arg.value for arg in step.args]
            rows.append({"kernel": plan.kernels[step.kernel].name, "grid": list(step.grid), "args": args})
    return rows


def _place(plan: Plan, pointer: Pointer) -> list[Any]:
    buffer = plan.buffers[pointer.buffer]
    space = {"workspace": "workspace", "constant": "constants"}.get(buffer.kind, buffer.name)
    return [space, buffer.offset + pointer.offset]


def main() -> None:
    """Serve one request."""
    sys.meta_path.insert(0, WithoutTorch())
    request = json.load(sys.stdin)
    folder = Path(request["folder"])
    plan = decode_plan((folder / "plan").read_bytes())
    memory = Memory(plan)
    for number in range(request["frames"]):
        with np.load(folder / f"frame_{number}.npz") as file:
            memory.fill({name: file[name] for name in file.files})
        for step in plan.steps:
            if isinstance(step, Memset):
                area = memory.bytes_of(step.buffer)[step.offset : step.offset + step.bytes]
                area.view(np.uint32)[:] = step.value
            else:
                run_launch(step, plan, memory, backwards=request["backwards"])
        np.savez(folder / f"run_{number}.npz", **memory.result())
    (folder / "trace.json").write_text(json.dumps(trace_of(plan)), encoding="utf-8")


if __name__ == "__main__":
    main()
