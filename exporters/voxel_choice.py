"""Voxel pruning as ONNX functions of standard operators; the torch side is `dm3d_deploy.models.voxel_pruning`."""

from __future__ import annotations

import onnx

from exporters.sparse_functions import Body

CHOOSE, PUT_BACK = "ChooseVoxels", "PutBackVoxels"


def choose_function(permille: int) -> onnx.FunctionProto:
    """(features [M, C], sites [3, M]) -> features and sites of the voxels of greatest mean magnitude, and their rows.

    Rows ascend, so sites stay in raster order; of equals the first is chosen. Numbers are rounded up.
    """
    body = Body()
    importance = body.op("ReduceMean", body.op("Abs", "features"), body.ints([1]), keepdims=0)
    all_rows = body.op("Shape", "sites", start=1, end=2)
    scaled = body.op("Add", body.op("Mul", all_rows, body.ints([permille])), body.ints([999]))
    count = body.op("Div", scaled, body.ints([1000]))
    body.nodes.append(onnx.helper.make_node("TopK", [importance, count], ["largest", "chosen"], axis=0))
    body.nodes.append(onnx.helper.make_node("TopK", ["chosen", count], ["rows", "places"], axis=0, largest=0))
    body.op("Gather", "features", "rows", output="kept_features", axis=0)
    body.op("Gather", "sites", "rows", output="kept_sites", axis=1)
    return body.function(f"{CHOOSE}_{permille}", ["features", "sites"], ["kept_features", "kept_sites", "rows"])


def put_back_function() -> onnx.FunctionProto:
    """(features [M, C], rows [K], kept [K, C]) -> features with the kept rows in place."""
    body = Body()
    body.op("ScatterND", "features", body.op("Unsqueeze", "rows", body.ints([1])), "kept", output="all")
    return body.function(PUT_BACK, ["features", "rows", "kept"], ["all"])
