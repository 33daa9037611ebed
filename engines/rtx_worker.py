"""Child process of tensorrt_rtx.py: one TensorRT-RTX build, so that a native abort cannot take the tool down.

It reads a request as JSON on standard input, streams the build log to a file (kept even after an abort), writes the
engine, and leaves its answer as JSON in the file that the request names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, TextIO


def main() -> None:
    """Serve one request: onnx, engine, log, answer (paths), targets (sm_NN names), sparse (flag), rows (least and most
    of each open dimension by its name).
    """
    request = json.load(sys.stdin)
    with Path(request["log"]).open("w", encoding="utf-8", buffering=1) as log:
        answer = _build(request, log)
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")


def _build(request: dict[str, Any], log: TextIO) -> dict[str, Any]:
    import tensorrt_rtx as trt

    known = {name.replace("SM", "sm_"): name for name in dir(trt.ComputeCapability) if name.startswith("SM")}
    unknown = [target for target in request["targets"] if target not in known]
    if unknown:
        return {"unknown_targets": unknown, "known": list(known)}
    logger = _logger(trt, log)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["onnx"]):
        return {"failed": "the ONNX parser refused the graph"}
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = len(request["targets"])
    for index, target in enumerate(request["targets"]):
        if not config.set_compute_capability(getattr(trt.ComputeCapability, known[target]), index):
            return {"failed": f"the builder refused the compute capability {target}"}
    if request["sparse"]:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    unbounded = _bound(builder, network, config, request["rows"])
    if unbounded:
        return {"failed": f"the dimension {unbounded} of the graph has no bounds"}
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return {"failed": "the builder made no engine"}
    Path(request["engine"]).write_bytes(plan)
    return {"version": trt.__version__}


def _bound(builder: Any, network: Any, config: Any, rows: dict[str, list[int]]) -> str:
    """Give every open dimension its bounds, tuned for the most; the name of one that has none, or nothing."""
    profile, open_inputs = builder.create_optimization_profile(), 0
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        names = [str(tensor.get_dimension_name(axis)) if size < 0 else "" for axis, size in enumerate(tensor.shape)]
        for name in filter(None, names):
            if name not in rows:
                return name
        if any(names):
            open_inputs += 1
            shapes = [
                tuple(rows[name][end] if name else size for name, size in zip(names, tensor.shape, strict=True))
                for end in (0, 1, 1)
            ]
            profile.set_shape(tensor.name, *shapes)
    if open_inputs:
        config.add_optimization_profile(profile)
    return ""


def _logger(trt: Any, log: TextIO) -> Any:
    class FileLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.write(f"[{severity.name}] {message}\n")

    return FileLogger()


if __name__ == "__main__":
    main()
