"""Kernel maps: pairs, order, sharing, refusals."""

import pytest
import torch

from dm3d_deploy.errors import InternalError
from dm3d_deploy.models.sparse import (
    SparseConv3d,
    SparseTensor,
    SubMConv3d,
    output_shape,
    strided_map,
    submanifold_map,
)

GRID = (6, 8, 7)
COORDS = torch.tensor([[0, 5, 7, 6], [0, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 1], [0, 0, 1, 0]])


def test_a_submanifold_map_pairs_neighbours_of_one_frame_only():
    kernel_map = submanifold_map(COORDS, GRID, (3, 3, 3))
    pairs = {
        (tap, int(a), int(b))
        for tap in range(27)
        for a, b in zip(kernel_map.in_rows[tap], kernel_map.out_rows[tap], strict=True)
        if tap != 13
    }
    assert pairs == {(14, 2, 1), (12, 1, 2), (16, 4, 1), (10, 1, 4), (15, 4, 2), (11, 2, 4)}
    assert kernel_map.pair_counts.tolist()[13] == 5
    assert kernel_map.order[0] == 13
    assert kernel_map.order[1:] == tuple(tap for tap in range(27) if tap != 13)


def test_cells_at_the_end_of_a_row_do_not_wrap_to_the_next():
    for cells in ([[0, 0, 0, 6], [0, 0, 1, 0]], [[0, 0, 7, 6], [0, 1, 0, 0]], [[0, 5, 7, 6], [1, 0, 0, 0]]):
        assert submanifold_map(torch.tensor(cells), GRID, (3, 3, 3)).pair_counts.sum() == 2


def test_strided_outputs_come_in_raster_order_and_sum_up_to_all_inputs():
    kernel_map = strided_map(COORDS, GRID, (2, 2, 2), (2, 2, 2), (0, 0, 0))
    assert kernel_map.out_shape_zyx == (3, 4, 3)
    assert kernel_map.out_coords.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0]]  # x = 6 lies behind the last kernel
    assert kernel_map.pair_counts.sum() == 4
    assert kernel_map.centre is None


def test_within_a_tap_no_row_occurs_twice():
    coords = torch.nonzero(torch.ones(1, *GRID))
    for kernel_map in (
        submanifold_map(coords, GRID, (3, 3, 3)),
        strided_map(coords, GRID, (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    ):
        for rows in (*kernel_map.in_rows, *kernel_map.out_rows):
            assert len(rows.unique()) == len(rows)


def test_layers_of_one_key_share_their_map():
    x = SparseTensor(torch.ones(5, 2), COORDS, GRID, 2)
    first, second = (SubMConv3d(2, 2, (3, 3, 3), indice_key="stage") for _ in range(2))
    y = second(first(x))
    assert first.kernel_map(x) is second.kernel_map(y)
    assert set(x.maps) == {"stage"}


def test_nothing_but_inputs_is_saved_for_the_backward_pass():
    saved = []
    conv = SubMConv3d(2, 2, (3, 3, 3), indice_key="stage", bias=True)
    x = torch.ones(5, 2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        conv(SparseTensor(x, COORDS, GRID, 2))
    assert saved == [x.data_ptr(), conv.weight.data_ptr()]


def test_results_do_not_depend_on_the_run():
    torch.manual_seed(0)
    coords = torch.nonzero(torch.rand(1, 20, 30, 30) < 0.2)
    x = SparseTensor(torch.randn(len(coords), 8), coords, (20, 30, 30), 1)
    conv = SubMConv3d(8, 8, (3, 3, 3), indice_key="stage")
    torch.nn.init.normal_(conv.weight)
    assert torch.equal(conv(x).features, conv(x).features)


def test_two_rows_in_one_cell_are_refused():
    with pytest.raises(InternalError, match="two rows of a sparse tensor lie in the same cell"):
        submanifold_map(torch.zeros(2, 4, dtype=torch.int64), GRID, (3, 3, 3))


def test_an_even_submanifold_kernel_is_refused():
    with pytest.raises(InternalError, match="must be odd"):
        submanifold_map(COORDS, GRID, (3, 2, 3))


def test_a_grid_smaller_than_the_kernel_is_refused():
    with pytest.raises(InternalError, match="does not fit into the grid"):
        output_shape((2, 8, 8), (3, 3, 3), (2, 2, 2), (0, 1, 1))


def test_no_active_cell_gives_no_rows():
    x = SparseTensor(torch.empty(0, 2), torch.empty(0, 4, dtype=torch.int64), GRID, 1)
    y = SubMConv3d(2, 3, (3, 3, 3), indice_key="a")(x)
    z = SparseConv3d(3, 4, (3, 3, 3), stride=(2, 2, 2), padding=(1, 1, 1), indice_key="b")(y)
    assert z.features.shape == (0, 4)
    assert z.shape_zyx == (3, 4, 4)


def test_a_layer_prints_its_numbers():
    assert "2, 3, kernel=(3, 3, 3), indice_key='a'" in repr(SubMConv3d(2, 3, (3, 3, 3), indice_key="a"))
