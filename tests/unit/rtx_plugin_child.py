"""Child process of test_rtx_plugin.py: TensorRT-RTX parses and builds a backbone3d.onnx with a plugin of Python's.

    python rtx_plugin_child.py ONNX ANSWER [plugin]

With `plugin`, the node's creator is registered: what it answers about types, shapes and workspace is the plan's that
the node's `plan_file` names, as in dm3d_tensorrt.cpp. ANSWER gets what was parsed and built as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt_rtx as trt

from engines.sparse3d.plan_file import read_plan

TYPES = {"fp32": trt.DataType.FLOAT, "fp16": trt.DataType.HALF, "i32": trt.DataType.INT32, "i64": trt.DataType.INT64}
CALLS: list[str] = []
FILES: list[str] = []


class SparseBackbone(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
    """The node, as far as a build asks."""

    def __init__(self, file: str) -> None:
        for base in SparseBackbone.__bases__:
            base.__init__(self)
        self.file, self.plan = file, read_plan(Path(file))
        FILES.append(file)
        self.plugin_name, self.plugin_version, self.plugin_namespace = "SparseBackbone3d", "1", "dm3d"
        self.num_outputs = len(self.plan.outputs)

    def get_capability_interface(self, kind: Any) -> Any:
        return self

    def clone(self) -> Any:
        made = SparseBackbone(self.file)
        made.__dict__.update(self.__dict__)
        return made

    def get_output_data_types(self, inputs: Any) -> Any:
        return [TYPES[item.dtype] for item in self.plan.outputs]

    def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> Any:
        shapes = []
        for item in self.plan.outputs:
            sizes = trt.DimsExprs(len(item.shape))
            for axis, size in enumerate(item.shape):
                sizes[axis] = builder.constant(size)
            shapes.append(sizes)
        return shapes

    def supports_format_combination(self, place: int, tensors: Any, inputs: int) -> bool:
        item = [*self.plan.inputs, *self.plan.outputs][place]
        given = tensors[place].desc
        return bool(given.type == TYPES[item.dtype] and given.format == trt.TensorFormat.LINEAR)

    def configure_plugin(self, inputs: Any, outputs: Any) -> None:
        CALLS.append(str([list(item.desc.dims) for item in [*inputs, *outputs]]))

    def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
        return self.plan.workspace_bytes

    def get_fields_to_serialize(self) -> Any:
        data = np.frombuffer(Path(self.file).read_bytes(), np.int8)
        return trt.PluginFieldCollection([trt.PluginField("plan", data, trt.PluginFieldType.INT8)])

    def on_shape_change(self, inputs: Any, outputs: Any) -> None:
        pass

    def attach_to_context(self, context: Any) -> Any:
        return self.clone()

    def set_tactic(self, tactic: int) -> None:
        pass

    def enqueue(self, *_: Any) -> None:
        raise RuntimeError("nothing runs in a build check")


class Creator(trt.IPluginCreatorV3One):
    """Takes the field that the adapter takes."""

    def __init__(self) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        self.name, self.plugin_version, self.plugin_namespace = "SparseBackbone3d", "1", "dm3d"
        nothing = np.array([], np.int8)
        self.field_names = trt.PluginFieldCollection([trt.PluginField("plan_file", nothing, trt.PluginFieldType.CHAR)])

    def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
        given = {item.name: bytes(bytearray(item.data)) for item in fields}
        return SparseBackbone(given["plan_file"].rstrip(b"\0").decode())


class Log(trt.ILogger):
    """Keeps what went wrong."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self.errors.append(message)


def main() -> None:
    onnx, answer, *words = sys.argv[1:]
    log = Log()
    creator = Creator()
    if "plugin" in words:
        trt.get_plugin_registry().register_creator(creator, "dm3d")
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    told: dict[str, Any] = {"parsed": parser.parse_from_file(onnx), "errors": log.errors, "calls": CALLS}
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    told["plugins"] = [layer.name for layer in layers if layer.type == trt.LayerType.PLUGIN_V3]
    told["layers"] = len(layers)
    told["outputs"] = {
        item.name: [item.dtype.name, list(item.shape)]
        for item in (network.get_output(index) for index in range(network.num_outputs))
    }
    if told["parsed"] and "plugin" in words:
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM89, 0)
        engine = builder.build_serialized_network(network, config)
        told["built"] = engine is not None
        told["carries_the_plan"] = any(Path(file).read_bytes() in bytes(engine) for file in FILES) if engine else False
    Path(answer).write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main()
