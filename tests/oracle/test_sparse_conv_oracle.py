"""Sparse convolution against dense conv3d on a small grid: values, active cells, gradients, in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dm3d_deploy.models.sparse import SparseConv3d, SparseTensor, SubMConv3d

GRID = (9, 12, 10)
BATCH = 2
STRIDED = {
    "down": ((3, 3, 3), (2, 2, 2), (1, 1, 1)),
    "conv4": ((3, 3, 3), (2, 2, 2), (0, 1, 1)),
    "conv_out": ((3, 1, 1), (2, 1, 1), (0, 0, 0)),
    "even": ((2, 2, 2), (2, 2, 2), (0, 0, 0)),
    "mixed": ((3, 1, 5), (1, 2, 3), (2, 0, 1)),
}


def scene(density, channels, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((BATCH, *GRID)) < density
    coords = np.argwhere(mask)
    rng.shuffle(coords)
    features = rng.standard_normal((len(coords), channels))
    return torch.tensor(coords, dtype=torch.int64).reshape(-1, 4), torch.tensor(features, dtype=torch.float64)


def dense_of(coords, features, grid):
    volume = torch.zeros(BATCH, features.shape[1], *grid, dtype=features.dtype)
    for (b, z, y, x), row in zip(coords.tolist(), features, strict=True):
        volume[b, :, z, y, x] = row
    return volume


def dense_answer(coords, features, weight, bias, stride, padding, *, submanifold):
    """Active output cells in raster order, and the dense convolution there."""
    volume = dense_of(coords, features, GRID)
    dense = torch.nn.functional.conv3d(volume, weight.permute(0, 4, 1, 2, 3), stride=stride, padding=padding)
    if submanifold:
        cells = coords
    else:
        occupied = dense_of(coords, torch.ones(len(coords), 1, dtype=torch.float64), GRID)
        reach = torch.ones(1, 1, *weight.shape[1:4], dtype=torch.float64)
        touched = torch.nn.functional.conv3d(occupied, reach, stride=stride, padding=padding)[:, 0]
        cells = (touched > 0).nonzero()
    b, z, y, x = cells.unbind(1)
    values = dense[b, :, z, y, x]
    return cells, values if bias is None else values + bias


def check(conv, coords, features, stride, padding, *, submanifold):
    torch.manual_seed(1)
    conv = conv.double()
    for parameter in conv.parameters():
        torch.nn.init.normal_(parameter)
    sparse_in = features.clone().requires_grad_()
    out = conv(SparseTensor(sparse_in, coords, GRID, BATCH))
    dense_in = features.clone().requires_grad_()
    weight = conv.weight.detach().clone().requires_grad_()
    cells, expected = dense_answer(coords, dense_in, weight, conv.bias, stride, padding, submanifold=submanifold)
    assert torch.equal(out.coords, cells)
    torch.testing.assert_close(out.features, expected, rtol=1e-12, atol=1e-12)
    pull = torch.randn_like(expected)
    out.features.backward(pull)
    found = [sparse_in.grad, conv.weight.grad] + ([] if conv.bias is None else [conv.bias.grad])
    wanted = [dense_in, weight] + ([] if conv.bias is None else [conv.bias])
    for mine, theirs in zip(found, torch.autograd.grad(expected, wanted, pull, materialize_grads=True), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("name", STRIDED)
def test_strided_convolution_is_dense_convolution_at_touched_cells(name, density):
    kernel, stride, padding = STRIDED[name]
    coords, features = scene(density, 5, seed=3)
    conv = SparseConv3d(5, 7, kernel, stride=stride, padding=padding, indice_key="k")
    check(conv, coords, features, stride, padding, submanifold=False)


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1), (1, 3, 5), (1, 1, 1)])
def test_submanifold_convolution_is_dense_convolution_at_its_own_cells(kernel, density):
    coords, features = scene(density, 4, seed=4)
    conv = SubMConv3d(4, 6, kernel, indice_key="k", bias=True)
    check(conv, coords, features, 1, tuple(size // 2 for size in kernel), submanifold=True)


@settings(max_examples=30)
@given(density=st.floats(0.01, 0.9), seed=st.integers(0, 2**31), name=st.sampled_from(sorted(STRIDED)))
def test_any_scene_agrees_with_dense_convolution(density, seed, name):
    kernel, stride, padding = STRIDED[name]
    coords, features = scene(density, 2, seed)
    strided = SparseConv3d(2, 3, kernel, stride=stride, padding=padding, indice_key="k", bias=True)
    check(strided, coords, features, stride, padding, submanifold=False)
    check(SubMConv3d(2, 3, (3, 3, 3), indice_key="s"), coords, features, 1, 1, submanifold=True)


def test_pruned_taps_change_no_output_and_still_receive_gradients():
    coords, features = scene(0.3, 4, seed=5)
    conv = SubMConv3d(4, 4, (3, 3, 3), indice_key="k").double()
    torch.nn.init.normal_(conv.weight)
    with torch.no_grad():
        conv.weight[:, 0] = 0.0
        conv.weight[:, 1, 1, 1] = 0.0
    weight = conv.weight.detach().clone().requires_grad_()
    _, expected = dense_answer(coords, features, weight, None, 1, 1, submanifold=True)
    out = conv(SparseTensor(features, coords, GRID, BATCH)).features
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    out.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(conv.weight.grad, weight.grad, rtol=1e-11, atol=1e-11)
    assert bool((conv.weight.grad[:, 0] != 0).any())


def test_numeric_gradient_agrees():
    coords, features = scene(0.05, 2, seed=6)
    conv = SparseConv3d(2, 2, (3, 3, 3), stride=(2, 2, 2), padding=(1, 1, 1), indice_key="k", bias=True).double()
    torch.nn.init.normal_(conv.weight)

    def run(values):
        return conv(SparseTensor(values, coords, GRID, BATCH)).features

    assert torch.autograd.gradcheck(run, (features.requires_grad_(),))
