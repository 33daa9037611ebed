"""Sparse convolution as ONNX functions against dense conv3d, row by row, and the whole backbone against a dense one."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch.nn import functional

from exporters import sparse_functions as fn
from exporters.backbone3d import SparseLayer, backbone_model

CUBE = (3, 3, 3)
ONE = (1, 1, 1)
SHAPES = [
    pytest.param(True, CUBE, ONE, ONE, id="sub-manifold"),
    pytest.param(False, CUBE, (2, 2, 2), (1, 1, 1), id="strided"),
    pytest.param(False, CUBE, (2, 2, 2), (0, 1, 1), id="strided-flat-z"),
    pytest.param(False, (3, 1, 1), (2, 1, 1), (0, 0, 0), id="column"),
]
GRIDS = [(5, 7, 6), (6, 5, 8), (4, 4, 4), (3, 9, 1)]


def run(model, feed, threads=1):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feed)


def random_sites(grid, count, rng):
    """`count` different cells, in no order."""
    flat = rng.permutation(int(np.prod(grid)))[:count]
    return np.stack(np.unravel_index(flat, grid), axis=1).astype(np.int64)


def dense_twin(features, cells, grid, weight, bias, stride, padding, submanifold):
    """Convolve a dense volume; active outputs are the inputs, or whatever an active input reaches."""
    volume = torch.zeros(1, features.shape[1], *grid, dtype=torch.float64)
    occupied = torch.zeros(1, 1, *grid, dtype=torch.float64)
    z, y, x = cells.T
    volume[0, :, z, y, x] = torch.from_numpy(features.T.astype(np.float64))
    occupied[0, 0, z, y, x] = 1
    kernel = torch.from_numpy(weight.astype(np.float64).transpose(0, 4, 1, 2, 3).copy())
    result = functional.conv3d(volume, kernel, torch.from_numpy(bias.astype(np.float64)), stride, padding)
    ones = torch.ones(1, 1, *weight.shape[1:4], dtype=torch.float64)
    active = occupied if submanifold else functional.conv3d(occupied, ones, None, stride, padding)
    active = active[0, 0] > 0.5
    return result[0], active  # [C, D, H, W], [D, H, W]


def one_layer_model(grid, weight, submanifold, stride, padding):
    """Index, rulebook and one convolution, with the rows and their sites as outputs."""
    body, kernel = fn.Body(), weight.shape[1:4]
    functions = [fn.index_function("Index", grid)]
    body.call("Index", ["cells"], ["sites", "order", "plane", "table"], "index", grid=grid)
    rows, out = body.op("Gather", "features", "order", axis=0), "sites"
    attributes = {"grid": grid, "kernel": kernel, "stride": stride, "padding": padding}
    if not submanifold:
        functions.append(fn.strided_cells_function("Cells", grid, kernel, stride, padding))
        functions.append(fn.index_function("OutIndex", fn.output_grid(grid, kernel, stride, padding)))
        body.call("Cells", ["sites"], ["reached"], "reached", **attributes)
        body.call("OutIndex", ["reached"], ["out_sites", "o", "p", "t"], "out_index", grid=grid)
        out = "out_sites"
    kept = fn.kept_taps(weight)
    centre = submanifold and fn.centre_tap(kernel) in kept
    paired = [tap for tap in kept if not (centre and tap == fn.centre_tap(kernel))]
    order = [fn.centre_tap(kernel)] * centre + paired
    names = fn.rulebook_pairs(paired)
    if paired:
        functions.append(fn.rulebook_function("Rulebook", grid, kernel, stride, padding, paired))
        body.call("Rulebook", [out, "plane", "table"], names, "rulebook", taps=paired, **attributes)
    functions.append(fn.convolution_function("Convolution", len(paired), centre=centre))
    packed = body.constant(fn.packed_taps(weight, order))
    body.call("Convolution", [rows, out, packed, "bias", *names], ["result"], "conv", taps=order)
    body.op("Identity", out, output="result_sites")
    tensor = helper.make_tensor_value_info
    inputs = [
        tensor("features", TensorProto.FLOAT, [None, weight.shape[-1]]),
        tensor("cells", TensorProto.INT64, [3, None]),
        tensor("bias", TensorProto.FLOAT, [len(weight)]),
    ]
    outputs = [
        tensor("result", TensorProto.FLOAT, [None, len(weight)]),
        tensor("result_sites", TensorProto.INT64, [3, None]),
    ]
    opsets = [helper.make_opsetid("", fn.OPSET), helper.make_opsetid(fn.DOMAIN, 1)]
    graph = helper.make_graph(body.nodes, "one", inputs, outputs)
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=fn.IR_VERSION)


def check_rows(grid, submanifold, kernel, stride, padding, count, seed, dead_share=0.0):
    rng = np.random.default_rng(seed)
    cells = random_sites(grid, count, rng)
    features = rng.normal(size=(len(cells), 3)).astype(np.float32)
    weight = rng.normal(size=(5, *kernel, 3)).astype(np.float32)
    weight[:, rng.random(kernel) < dead_share] = 0
    bias = rng.normal(size=5).astype(np.float32)
    model = one_layer_model(grid, weight, submanifold, stride, padding)
    rows, sites = run(model, {"features": features, "cells": np.ascontiguousarray(cells.T), "bias": bias})
    dense, active = dense_twin(features, cells, grid, weight, bias, stride, padding, submanifold)
    np.testing.assert_array_equal(sites.T, np.argwhere(active.numpy()))  # the same sites, in raster order
    expected = dense.numpy()[(slice(None), *sites)].T
    np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("submanifold", "kernel", "stride", "padding"), SHAPES)
def test_rows_equal_those_of_a_dense_convolution(grid, submanifold, kernel, stride, padding):
    check_rows(grid, submanifold, kernel, stride, padding, int(np.prod(grid)) // 3, seed=1)


@pytest.mark.parametrize("count", [0, 1, 60])
@pytest.mark.parametrize(("submanifold", "kernel", "stride", "padding"), SHAPES)
def test_no_cell_one_cell_and_a_full_grid(count, submanifold, kernel, stride, padding):
    check_rows((3, 5, 4), submanifold, kernel, stride, padding, count, seed=count)


@settings(max_examples=25)
@given(data=st.data())
def test_any_grid_any_cells_any_dead_taps(data):
    shape = data.draw(st.sampled_from([param.values for param in SHAPES]))
    grid = tuple(data.draw(st.integers(3, 9)) for _ in range(3))
    count = data.draw(st.integers(0, int(np.prod(grid))))
    check_rows(grid, *shape, count, data.draw(st.integers(0, 9999)), data.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])))


def small_backbone(rng):
    """Every kind of layer once: input, residual block, strided, residual block, strided flat, column."""

    def layer(name, cout, cin, kernel=CUBE, stride=ONE, padding=ONE, key="", adds=""):
        return SparseLayer(
            name=name,
            weight=rng.normal(size=(cout, *kernel, cin)).astype(np.float32) / 4,
            bias=rng.normal(size=cout).astype(np.float32),
            stride=stride,
            padding=padding,
            submanifold=stride == ONE,
            key=key,
            adds=adds,
        )

    return [
        layer("input", 4, 3, key="s1"),
        layer("a1", 4, 4, key="s1"),
        layer("a2", 4, 4, key="s1", adds="input"),
        layer("down", 6, 4, stride=(2, 2, 2), key="d2"),
        layer("b1", 6, 6, key="s2"),
        layer("b2", 6, 6, key="s2", adds="down"),
        layer("flat", 5, 6, stride=(2, 2, 2), padding=(0, 1, 1), key="d3"),
        layer("out", 7, 5, kernel=(3, 1, 1), stride=(2, 1, 1), padding=(0, 0, 0), key="out"),
    ]


def dense_backbone(layers, features, cells, grid):
    """The same network on dense volumes: inactive cells are set to zero after every layer."""
    results, counts = {}, []
    for layer in layers:
        shape = (layer.weight, layer.bias, layer.stride, layer.padding, layer.submanifold)
        value, active = dense_twin(features, cells, grid, *shape)
        grid, cells = tuple(active.shape), np.argwhere(active.numpy())
        if layer.adds:
            value = value + results[layer.adds]
        value = torch.relu(value) * active
        results[layer.name] = value
        features = value[:, active].numpy().T
        if layer.name in ("input", "down", "flat", "out"):
            counts.append(int(active.sum()))
    return value.reshape(1, -1, *grid[1:]).numpy(), counts


def feed_of(features, cells, capacity, rng):
    """Rows behind the count hold what must never be read."""
    count = len(cells)
    padded = np.full((capacity, features.shape[1]), np.nan, np.float32)
    coords = rng.integers(-9, 99, (capacity, 4)).astype(np.int32)
    padded[:count], coords[:count, 0], coords[:count, 1:] = features, 0, cells
    return {"features": padded, "coords": coords, "count": np.array([count], np.int32)}


GRID = (13, 12, 10)


@pytest.mark.parametrize("count", [1, 40, 300])
def test_the_whole_backbone_equals_a_dense_one(count):
    rng = np.random.default_rng(count)
    layers = small_backbone(rng)
    cells = random_sites(GRID, count, rng)
    features = rng.normal(size=(count, 3)).astype(np.float32)
    bev, status = run(backbone_model(layers, grid_zyx=GRID, max_voxels=320), feed_of(features, cells, 320, rng))
    expected, counts = dense_backbone(layers, features, cells, GRID)
    assert status.tolist() == counts
    assert np.abs(bev - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("count", [0, -3])
def test_a_frame_without_voxels_leaves_an_empty_map(count):
    rng = np.random.default_rng(0)
    model = backbone_model(small_backbone(rng), grid_zyx=GRID, max_voxels=8)
    feed = feed_of(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int64), 8, rng)
    bev, status = run(model, feed | {"count": np.array([count], np.int32)})
    assert bev.shape == (1, 7, 3, 3)
    assert not bev.any()
    assert not status.any()


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_in_any_order_give_the_same_bits(threads):
    rng = np.random.default_rng(5)
    model = backbone_model(small_backbone(rng), grid_zyx=GRID, max_voxels=400)
    cells = random_sites(GRID, 400, rng)
    features = rng.normal(size=(400, 3)).astype(np.float32)
    shuffle = rng.permutation(400)
    first = run(model, feed_of(features, cells, 400, rng))
    second = run(model, feed_of(features[shuffle], cells[shuffle], 400, rng), threads)
    assert first[0].any()
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


@pytest.mark.parametrize("dead", ["all", "centre", "all but the centre", "half"])
def test_dead_taps_change_no_number_and_no_site(dead):
    rng = np.random.default_rng(3)
    layers = small_backbone(rng)
    for layer in layers:
        taps = layer.weight.reshape(len(layer.weight), -1, layer.weight.shape[-1])  # a view
        middle = taps.shape[1] // 2
        if dead == "all":
            taps[:] = 0
        elif dead == "centre":
            taps[:, middle] = 0
        elif dead == "half":
            taps[:, ::2] = 0
        else:
            taps[:, np.arange(taps.shape[1]) != middle] = 0
    cells = random_sites(GRID, 150, rng)
    features = rng.normal(size=(150, 3)).astype(np.float32)
    model = backbone_model(layers, grid_zyx=GRID, max_voxels=150)
    bev, status = run(model, feed_of(features, cells, 150, rng))
    expected, counts = dense_backbone(layers, features, cells, GRID)
    assert status.tolist() == counts
    assert np.abs(bev - expected).max() <= 1e-5 * np.abs(expected).max()
