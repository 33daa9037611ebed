"""What the planner reads, states and refuses of stages that are added up in the bird's-eye view."""

from dataclasses import replace

import numpy as np
import pytest
from sparse3d_sample import backbone_of, clustered_cells, merging_layers, plain_frame

from dm3d_deploy.errors import EngineError
from engines.sparse3d.cost import cost_of
from engines.sparse3d.onnx_reader import read_backbone
from engines.sparse3d.packing import tiled_weights
from engines.sparse3d.sites import frame_statistics
from exporters.backbone3d import backbone_model

GRID = (11, 21, 19)
LAYERS = merging_layers(np.random.default_rng(0))


def test_the_reader_sees_what_is_merged(tmp_path):
    backbone = backbone_of(LAYERS, GRID, 128, tmp_path)
    assert [stage.name for stage in backbone.stages] == ["input", "b", "c", "d", "merged", "out"]
    assert (backbone.stage("merged").grid, backbone.stage("merged").merges) == ((1, 11, 10), ("b", "c", "d"))
    assert backbone.merged == ("conv4.0", "conv5.0", "conv6.0")
    first, last = backbone.layers[-2:]
    assert (first.source, first.stage_in, first.stage_out) == ("merged", "merged", "out")
    assert (last.source, last.submanifold) == ("conv_out.0", True)
    assert backbone.tells_active
    assert backbone.bev_shape == (1, 65, 11, 10)


def _swapped(node):
    node.input[4:6] = [node.input[5], node.input[4]]


def _one_less(node):
    del node.input[-1]


def _no_layer(node):
    node.input[4] = "conv4.0.sum"


@pytest.mark.parametrize("change", [_swapped, _one_less, _no_layer])
def test_sums_of_other_layers_than_end_the_stages_are_refused(tmp_path, change):
    model = backbone_model(LAYERS, grid_zyx=GRID, max_voxels=32)
    body = next(function for function in model.functions if function.name == "SparseBackbone3d")
    change(next(node for node in body.node if node.op_type == "MergedFeatures"))
    (tmp_path / "changed.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match=r"it merges \[.*\] of the stages \['b', 'c', 'd'\], not 3 that halve"):
        read_backbone(tmp_path / "changed.onnx")


def test_stages_of_other_channels_or_strides_are_refused(tmp_path):
    wide = replace(LAYERS[3], weight=np.zeros((32, 3, 3, 3, 24), np.float32), bias=np.zeros(32, np.float32))
    flat = replace(LAYERS[3], stride=(2, 1, 1))
    for other in (wide, flat):
        with pytest.raises(EngineError, match="not 3 that halve"):
            backbone_of([*LAYERS[:3], other, *LAYERS[4:]], GRID, 32, tmp_path)


def test_a_sum_costs_its_rows_read_and_written(tmp_path):
    backbone = backbone_of(LAYERS, GRID, 128, tmp_path)
    coords = np.pad(clustered_cells(np.random.default_rng(1), GRID, 60), ((0, 0), (1, 0)))
    statistics = frame_statistics(backbone, coords, conv_rows=64)
    rooms = {stage.name: 512 for stage in backbone.stages}
    with_sum, without = (
        cost_of(
            each, {layer.name: tiled_weights(layer) for layer in backbone.layers}, [statistics],
            frame=plain_frame(GRID, 128), capacities=rooms, element_bytes=2, conv_rows=64,
        )
        for each in (backbone, replace(backbone, merged=()))
    )  # fmt: skip
    rows = sum(statistics.counts[stage] for stage in ("b", "c", "d", "merged"))
    assert with_sum["convolution_bytes"] - without["convolution_bytes"] == rows * 32 * 2
