"""The 3D backbone as ONNX: one node, one contract, and torch's numbers."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from dm3d_deploy.artifacts import digest_of_file
from dm3d_deploy.config import load_config
from dm3d_deploy.errors import ExportError
from dm3d_deploy.models.detector import build_detector
from dm3d_deploy.models.seeded import seed_weights
from dm3d_deploy.pointcloud import Voxels
from engines.onnx_runtime import open_session, run_backbone
from exporters.backbone3d import SparseLayer, export_backbone3d, sparse_layers
from exporters.graph_checks import check_graph


@pytest.fixture(scope="module")
def detector(request):
    built = build_detector(load_config(request.path.parents[1] / "fixtures" / "centerpoint-tiny.yaml"))
    seed_weights(built, 0)
    return built


@pytest.fixture(scope="module")
def exported(detector, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "backbone3d.onnx"
    return path, export_backbone3d(detector, path, max_voxels=500)


@pytest.fixture(scope="module")
def session(exported):
    return open_session(exported[0], digest=exported[1].artifact.digest, threads=1)


def frame(detector, count, seed=0):
    grid = detector.backbone_3d.shape_zyx
    rng = np.random.default_rng(seed)
    # Dense enough that neighbours meet.
    low = np.array(grid) // 3
    flat = rng.permutation(math.prod(low))[:count]
    cells = np.stack(np.unravel_index(np.sort(flat), low), axis=1)
    coords = np.concatenate([np.zeros((count, 1), np.int64), cells], axis=1)
    return rng.normal(size=(count, 5)).astype(np.float32), coords


def voxels_of(features, coords):
    ones = np.ones(len(coords), np.int32)
    return Voxels(
        features=features, coords=coords.astype(np.int32), num_points=ones, found=len(coords), cutoff_m=math.inf
    )


def test_the_main_graph_is_one_node_with_static_shapes(exported):
    path, graph = exported
    model = check_graph(path)
    assert [node.op_type for node in model.graph.node] == ["SparseBackbone3d"]
    assert not model.graph.initializer
    assert dict(graph.inputs) == {
        "features": ("float32", (500, 5)),
        "coords": ("int32", (500, 4)),
        "count": ("int32", (1,)),
    }
    assert dict(graph.outputs) == {"bev": ("float32", (1, 32, 16, 16)), "status": ("int32", (5,))}
    assert graph.opset == 18
    assert graph.artifact.digest == digest_of_file(path)
    assert (graph.artifact.path, graph.artifact.kind) == ("backbone3d.onnx", "backbone3d")


def test_every_call_names_its_plugin(exported):
    model = onnx.load(exported[0])
    calls = [n for f in model.functions for n in f.node if n.domain == "dm3d"] + list(model.graph.node)
    assert len(calls) > 20
    for node in calls:
        attributes = {a.name: a.s for a in node.attribute if a.type == onnx.AttributeProto.STRING}
        assert attributes == {"plugin_namespace": b"dm3d", "plugin_version": b"1"}


def test_one_rulebook_per_stage_and_per_strided_layer(exported):
    names = [function.name for function in onnx.load(exported[0]).functions]
    assert len(names) == len(set(names))
    rulebooks = [name for name in names if "Rulebook" in name]
    assert rulebooks == [
        "SubMRulebook_stage1",
        "StridedRulebook_stage2_down",
        "SubMRulebook_stage2",
        "StridedRulebook_stage3_down",
        "SubMRulebook_stage3",
        "StridedRulebook_stage4_down",
        "SubMRulebook_stage4",
        "StridedRulebook_out",
    ]
    assert [name for name in names if "Conv3d" in name] == ["SubMConv3d_26", "SparseConv3d_27", "SparseConv3d_3"]


def test_equal_detectors_give_equal_bytes(detector, exported, tmp_path):
    again = export_backbone3d(detector, tmp_path / "again.onnx", max_voxels=500)
    assert again.artifact.digest == exported[1].artifact.digest
    assert export_backbone3d(detector, tmp_path / "other.onnx", max_voxels=501).artifact.digest != again.artifact.digest


@pytest.mark.parametrize("count", [0, 1, 17, 500])
def test_it_computes_what_torch_computes(detector, session, count):
    features, coords = frame(detector, count, seed=count)
    bev, status = run_backbone(session, voxels_of(features, coords))
    with torch.no_grad():
        expected = detector.backbone_to_bev(torch.from_numpy(features), torch.from_numpy(coords)).numpy()
    assert status[0] == count
    assert (np.abs(bev) > 0).any() == (count > 0)
    assert np.abs(bev - expected).max() <= 1e-5 * np.abs(expected).max()


def test_dead_taps_leave_the_file(detector, tmp_path):
    pruned = build_detector(detector.config)
    pruned.load_state_dict(detector.state_dict())
    with torch.no_grad():
        pruned.backbone_3d.conv4[1].conv1.weight[:, 0] = 0  # 9 of 27 taps, the centre stays
        pruned.backbone_3d.conv_out[0].weight[:, 1] = 0  # 1 of 3
    path = tmp_path / "pruned.onnx"
    graph = export_backbone3d(pruned, path, max_voxels=500)
    body = next(f for f in onnx.load(path).functions if f.name == "SparseBackbone3d")
    constants = {n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in body.node if n.op_type == "Constant"}
    assert constants["conv4.1.conv1.weight"].shape == (18, 16, 16)
    assert constants["conv_out.0.weight"].shape == (2, 16, 16)
    calls = {n.name: n for n in body.node}
    taps = {
        n.name: list(n.attribute[i].ints) for n in calls.values() for i, a in enumerate(n.attribute) if a.name == "taps"
    }
    assert taps["conv4.1.conv1"] == [13, 9, 10, 11, 12, *range(14, 27)]
    assert taps["conv_out.0"] == taps["out.rulebook"] == [0, 2]
    features, coords = frame(detector, 400)
    bev, _ = run_backbone(open_session(path, digest=graph.artifact.digest, threads=1), voxels_of(features, coords))
    with torch.no_grad():
        expected = pruned.backbone_to_bev(torch.from_numpy(features), torch.from_numpy(coords)).numpy()
    assert np.abs(bev - expected).max() <= 1e-5 * np.abs(expected).max()


def test_layers_are_named_as_the_modules_are(detector):
    layers = sparse_layers(detector)
    names = [name for name, _ in detector.backbone_3d.convolutions()]
    assert [layer.name for layer in layers] == names
    adds = {layer.name: layer.adds for layer in layers if layer.adds}
    assert adds == {
        "conv1.0.conv2": "conv_input.0",
        "conv2.1.conv2": "conv2.0.0",
        "conv3.1.conv2": "conv3.0.0",
        "conv4.1.conv2": "conv4.0.0",
    }


def test_refusals_say_why(detector, tmp_path):
    with pytest.raises(ExportError, match="max_voxels is 0"):
        export_backbone3d(detector, tmp_path / "x.onnx", max_voxels=0)
    broken = build_detector(detector.config)
    with torch.no_grad():
        broken.backbone_3d.conv2[0][0].weight[0] = math.nan
    with pytest.raises(ExportError, match=r"1 layers hold weights that are not finite, first conv2\.0\.0"):
        export_backbone3d(broken, tmp_path / "x.onnx", max_voxels=10)
    broken.backbone_3d.conv3 = torch.nn.Linear(2, 2)
    with pytest.raises(ExportError, match="conv3 is a Linear: the exporter knows ConvNormReLU and SparseBasicBlock"):
        sparse_layers(broken)
    assert not list(tmp_path.iterdir())


def test_a_layer_that_the_index_cannot_serve_is_refused():
    weight, bias = np.ones((1, 3, 3, 3, 1), np.float32), np.zeros(1, np.float32)
    with pytest.raises(ExportError, match=r"far: kernel \(3, 3, 3\) with padding \(2, 1, 1\) cannot be written"):
        SparseLayer(
            name="far", weight=weight, bias=bias, stride=(1, 1, 1), padding=(2, 1, 1), submanifold=False, key="k"
        )
