"""Runs a plan on a lab's NVIDIA GPU from Python: the driver by ctypes, nothing to install, graphs for measurements.

In continuous integration it meets a stand-in driver: arguments are checked there, nothing is executed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np

from dm3d_deploy.errors import EngineError
from engines.sparse3d.interpreter import NUMPY_OF, PlanRun, check_inputs, read_kept, run_of
from engines.sparse3d.plan import F32, I32, I64, Arg, Memset, Plan, Pointer, Step

MAJOR, MINOR, DYNAMIC_SHARED = 75, 76, 8  # numbers of CUdevice_attribute and CUfunction_attribute
GLOBAL_CAPTURE = 0
CTYPE_OF: Mapping[type, Any] = {I32: ctypes.c_int32, I64: ctypes.c_int64, F32: ctypes.c_float}
Handle = ctypes.c_void_p


class CudaPlan:
    """A plan on device 0: its kernels, constants, workspace and bindings in device memory. Close it, or use `with`.

    EngineError where there is no driver or GPU, or where the plan holds no kernels for this GPU.
    """

    def __init__(self, plan: Plan, *, library: str = "libcuda.so.1") -> None:
        self.plan = plan
        self.memory: list[int] = []
        try:
            self.driver = ctypes.CDLL(library)
        except OSError as error:
            raise EngineError(
                f"the CUDA driver cannot be loaded: {error}.", fix="run on a machine with an NVIDIA GPU"
            ) from None
        self._call("cuInit", ctypes.c_uint(0))
        device, context = ctypes.c_int(), Handle()
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
        self.sm = 10 * self._attribute(MAJOR, device) + self._attribute(MINOR, device)
        if self.sm not in plan.cubins:
            known = ", ".join(f"sm_{sm}" for sm in sorted(plan.cubins)) or "no GPU"
            raise EngineError(
                f"this GPU is sm_{self.sm} and the plan is compiled for {known}.", fix=f"compile it for sm_{self.sm}"
            )
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        self.stream = Handle()
        # not a non-blocking one: uploads go through the default stream, which only others wait for
        self._call("cuStreamCreate", ctypes.byref(self.stream), ctypes.c_uint(0))
        self.functions = [self._function(kernel) for kernel in range(len(plan.kernels))]
        self.constants = self._allocate(plan.constants)
        bindings = [*plan.inputs, *plan.outputs]
        self.bound = {item.buffer: self._allocate(bytes(plan.buffers[item.buffer].bytes)) for item in bindings}
        self.workspace = self._allocate(bytes(plan.workspace_bytes))
        self.memory_of_calls: list[list[Any]] = []
        self.calls = [self._call_of(step) for step in plan.steps]

    def __enter__(self) -> CudaPlan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the device memory back."""
        while self.memory:
            self._call("cuMemFree_v2", ctypes.c_uint64(self.memory.pop()))

    def run(self, frame: Mapping[str, np.ndarray]) -> PlanRun:
        """One frame, copied in, run and copied out."""
        self.upload(frame)
        self.enqueue()
        self._call("cuStreamSynchronize", self.stream)
        plan = self.plan
        found = {}
        for output in plan.outputs:
            data = self._download(self.bound[output.buffer], plan.buffers[output.buffer].bytes)
            found[f"output:{output.name}"] = data.view(NUMPY_OF[output.dtype]).reshape(output.shape)
        workspace = self._download(self.workspace, plan.workspace_bytes)
        found |= {f"kept:{name}": array for name, array in read_kept(plan, workspace).items()}
        if plan.status is not None:
            size = 4 * len(plan.status.words)
            found["status"] = self._download(self._address(Pointer(plan.status.buffer)) + plan.status.offset, size)
        return run_of(found, plan)

    def upload(self, frame: Mapping[str, np.ndarray]) -> None:
        """A frame into the inputs."""
        check_inputs(self.plan, frame)
        for binding in self.plan.inputs:
            self._upload(self.bound[binding.buffer], np.ascontiguousarray(frame[binding.name]).tobytes())

    def enqueue(self) -> None:
        """All steps, in order, on the stream."""
        for name, args in self.calls:
            self._call(name, *args)

    def times_ms(self, repeats: int, *, graph: bool, warm_up: int = 50) -> np.ndarray:
        """Milliseconds of `repeats` runs of the whole plan by events around each: one CUDA graph, or step by step."""
        self.enqueue()  # the driver may load kernels at their first launch, which a capture forbids
        self._call("cuStreamSynchronize", self.stream)
        whole, ready = Handle(), Handle()
        if graph:
            self._call("cuStreamBeginCapture_v2", self.stream, ctypes.c_int(GLOBAL_CAPTURE))
            self.enqueue()
            self._call("cuStreamEndCapture", self.stream, ctypes.byref(whole))
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(ready), whole, ctypes.c_ulonglong(0))
        start, end = Handle(), Handle()
        for event in (start, end):
            self._call("cuEventCreate", ctypes.byref(event), ctypes.c_uint(0))
        times = []
        for _ in range(warm_up + repeats):
            self._call("cuEventRecord", start, self.stream)
            if graph:
                self._call("cuGraphLaunch", ready, self.stream)
            else:
                self.enqueue()
            self._call("cuEventRecord", end, self.stream)
            self._call("cuEventSynchronize", end)
            took = ctypes.c_float()
            self._call("cuEventElapsedTime", ctypes.byref(took), start, end)
            times.append(took.value)
        for event in (start, end):
            self._call("cuEventDestroy_v2", event)
        if graph:
            self._call("cuGraphExecDestroy", ready)
            self._call("cuGraphDestroy", whole)
        return np.array(times[warm_up:])

    def _call_of(self, step: Step) -> tuple[str, tuple[Any, ...]]:
        """The driver's function of a step and its arguments; nothing in them changes from frame to frame."""
        if isinstance(step, Memset):
            start, words = self._address(Pointer(step.buffer)) + step.offset, step.bytes // 4
            fill = (ctypes.c_uint64(start), ctypes.c_uint(step.value), ctypes.c_size_t(words))
            return "cuMemsetD32Async", (*fill, self.stream)
        cubin = self.plan.cubins[self.sm][step.kernel]
        values = [self._value(arg) for arg in step.args] + [ctypes.c_uint64(0) for _ in range(cubin.hidden_params)]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        self.memory_of_calls.append(values)  # `pointers` holds their addresses, and does not keep them alive
        sizes = (*step.grid, cubin.threads, 1, 1, cubin.shared_bytes)
        shape = tuple(ctypes.c_uint(size) for size in sizes)
        return "cuLaunchKernel", (self.functions[step.kernel], *shape, self.stream, pointers, None)

    def _value(self, arg: Arg) -> Any:
        if isinstance(arg, Pointer):
            return ctypes.c_uint64(self._address(arg))
        return CTYPE_OF[type(arg)](arg.value)

    def _address(self, pointer: Pointer) -> int:
        buffer = self.plan.buffers[pointer.buffer]
        if buffer.kind in ("input", "output"):
            return self.bound[pointer.buffer] + pointer.offset
        start = self.workspace if buffer.kind == "workspace" else self.constants
        return start + buffer.offset + pointer.offset

    def _function(self, kernel: int) -> Handle:
        cubin = self.plan.cubins[self.sm][kernel]
        module, function = Handle(), Handle()
        self._call("cuModuleLoadData", ctypes.byref(module), cubin.image)
        self._call("cuModuleGetFunction", ctypes.byref(function), module, cubin.symbol.encode())
        value = ctypes.c_int(cubin.shared_bytes)
        self._call("cuFuncSetAttribute", function, ctypes.c_int(DYNAMIC_SHARED), value)
        return function

    def _attribute(self, number: int, device: ctypes.c_int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(number), device)
        return value.value

    def _allocate(self, data: bytes) -> int:
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(len(data), 1)))
        self.memory.append(address.value)
        if data:
            self._upload(address.value, data)
        return address.value

    def _upload(self, address: int, data: bytes) -> None:
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), data, ctypes.c_size_t(len(data)))

    def _download(self, address: int, size: int) -> np.ndarray:
        data = np.empty(size, np.uint8)
        self._call("cuMemcpyDtoH_v2", Handle(data.ctypes.data), ctypes.c_uint64(address), ctypes.c_size_t(size))
        return data

    def _call(self, name: str, *args: Any) -> None:
        code = getattr(self.driver, name)(*args)
        if code:
            raise EngineError(f"the CUDA driver answers {name} with error {code}.", fix="look the number up in cuda.h")
