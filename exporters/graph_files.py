"""ONNX files out and in: written whole and checked; read with a size limit and without trust."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, helper, numpy_helper

from dm3d_deploy.artifacts import Graph, artifact_of, write_bytes
from dm3d_deploy.errors import ExportError

MAX_GRAPH_BYTES = 1 << 30
OPEN_ROWS = "rows_of_"  # begins the name of a dimension that differs from frame to frame
ELEMENT_TYPES = frozenset(helper.get_all_tensor_dtypes()) - {TensorProto.UNDEFINED}
# ValueError and UnicodeDecodeError come where ONNX formats the error itself.
REFUSALS = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError)


def safe_load(path: Path, *, max_bytes: int = MAX_GRAPH_BYTES) -> onnx.ModelProto:
    """Read an ONNX file: at most `max_bytes`, no external data, structurally valid; anything else is an ExportError."""
    fix = "give an ONNX file that this tool exported"
    if not path.is_file():
        raise ExportError(f"{path} is not a file.", fix=fix)
    size = path.stat().st_size
    if size > max_bytes:
        raise ExportError(f"{path} has {size} bytes; at most {max_bytes} are read.", fix=fix)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
        refuse_external_data(model, path)
        onnx.checker.check_model(model)
    except DecodeError:
        raise ExportError(f"{path} with {size} bytes is not an ONNX file.", fix=fix) from None
    except REFUSALS as error:
        raise ExportError(f"{path} is not a valid ONNX graph: {first_line(error)}", fix=fix) from None
    return model


def first_line(error: Exception) -> str:
    """The first line of an error that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def refuse_external_data(model: onnx.ModelProto, path: Path) -> None:
    """ExportError if any tensor lies in another file: such a path may lead anywhere."""
    for tensor in _tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            raise ExportError(
                f"{path}: tensor '{tensor.name}' lies in another file.", fix="save the graph with its weights inside"
            )


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from model.graph.initializer
    for sparse in model.graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    stack = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while stack:
        for attribute in stack.pop().attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for graph in (attribute.g, *attribute.graphs):
                yield from graph.initializer
                stack.extend(graph.node)


def interface(values: list[onnx.ValueInfoProto]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (element type, shape) of graph inputs or outputs; ExportError for a shape that is not static.

    Rows that differ from frame to frame, which a second stage reads, are named "rows_of_..." and told as -1.
    """
    found = {}
    for value in values:
        tensor = value.type.tensor_type
        if not tensor.HasField("shape") or any(_size(dim) == 0 for dim in tensor.shape.dim):
            dims = [d.dim_value or d.dim_param or "?" for d in tensor.shape.dim]
            raise ExportError(
                f"'{value.name}' has the shape {dims}, which is not static.", fix="export again with static shapes"
            )
        shape = tuple(_size(dim) for dim in tensor.shape.dim)
        if tensor.elem_type not in ELEMENT_TYPES:
            raise ExportError(f"'{value.name}' has the element type {tensor.elem_type}.", fix="export it again")
        found[value.name] = (helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, shape)
    return found


def _size(dim: onnx.TensorShapeProto.Dimension) -> int:
    """Its number, -1 for open rows, 0 for what is neither."""
    if dim.HasField("dim_value"):
        return max(int(dim.dim_value), 0)
    return -1 if dim.dim_param.startswith(OPEN_ROWS) else 0


def array_of(tensor: onnx.TensorProto) -> np.ndarray:
    """The values of a stored tensor; ExportError if its bytes do not fill its shape."""
    try:
        array: np.ndarray = numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError) as error:
        raise ExportError(
            f"tensor '{tensor.name}' of shape {list(tensor.dims)} cannot be read: {first_line(error)}",
            fix="give an ONNX file that this tool exported",
        ) from None
    return array


def write_graph(model: onnx.ModelProto, path: Path, *, kind: str, rounded_to_zero: int = 0) -> Graph:
    """Check a model and write it whole; the artefact's path is relative to the file's folder."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except REFUSALS as error:
        raise ExportError(
            f"{path.name} is not a valid ONNX graph: {first_line(error)}", fix="report this with the detector's YAML"
        ) from error
    inputs, outputs = interface(list(model.graph.input)), interface(list(model.graph.output))
    write_bytes(path, model.SerializeToString(deterministic=True))
    return Graph(
        artifact=artifact_of(path.parent, path.name, kind),
        inputs=inputs,
        outputs=outputs,
        opset=next(entry.version for entry in model.opset_import if entry.domain == ""),
        rounded_to_zero=rounded_to_zero,
    )
