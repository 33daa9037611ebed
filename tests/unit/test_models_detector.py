"""The detector's interface: shapes, batches, layers, counts, seeded weights, folded norms."""

import dataclasses
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from models_sample import BRANCHES, small_config, small_scene
from torch import nn

from dm3d_deploy.errors import InternalError, MissingDependency, UsageError
from dm3d_deploy.models import spconv_backend
from dm3d_deploy.models.backbone3d import bev_from_sparse
from dm3d_deploy.models.detector import (
    build_detector,
    dense_positions,
    prunable_layers,
    sparse_pair_counts,
    tensors_from_voxels,
)
from dm3d_deploy.models.fold import fold_batch_norms, folded
from dm3d_deploy.models.seeded import seed_weights, seeded_values
from dm3d_deploy.models.sparse import SparseConv3d, SparseTensor, SubMConv3d
from dm3d_deploy.pointcloud import Voxels


@pytest.fixture
def detector():
    detector = build_detector(small_config())
    seed_weights(detector)
    return detector


def test_outputs_have_the_head_s_names_and_shapes(detector):
    with torch.no_grad():
        features, coords = small_scene(batch_size=2)
        bev = detector.backbone_to_bev(features, coords, batch_size=2)
        heads = detector.bev_to_heads(bev)
    assert bev.shape == (2, 24, 8, 6)
    widths = dict(BRANCHES)
    expected = {f"{task}.{name}": (2, width, 8, 6) for task in (0, 1) for name, width in widths.items()}
    expected |= {"0.hm": (2, 1, 8, 6), "1.hm": (2, 2, 8, 6)}
    assert {name: tuple(value.shape) for name, value in heads.items()} == expected
    assert not detector.training


def test_frames_of_a_batch_do_not_mix(detector):
    features, coords = small_scene(batch_size=2)
    with torch.no_grad():
        both = detector(features, coords, batch_size=2)
        for frame in (0, 1):
            rows = coords[:, 0] == frame
            alone = detector(features[rows], coords[rows] * torch.tensor([0, 1, 1, 1]))
            for name, value in alone.items():
                torch.testing.assert_close(both[name][frame : frame + 1], value, rtol=1e-4, atol=1e-5)


def test_the_order_of_voxels_does_not_matter(detector):
    features, coords = small_scene()
    shuffled = torch.randperm(len(coords), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        first = detector.backbone_to_bev(features, coords)
        second = detector.backbone_to_bev(features[shuffled], coords[shuffled])
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_an_empty_frame_is_a_frame(detector):
    with torch.no_grad():
        heads = detector(torch.empty(0, 4), torch.empty(0, 4, dtype=torch.int64))
    assert all(bool(torch.isfinite(value).all()) for value in heads.values())
    assert set(sparse_pair_counts(detector, torch.empty(0, 4, dtype=torch.int64))) == {
        layer.name for layer in prunable_layers(detector) if layer.kind == "sparse"
    }


def test_height_is_folded_into_channels_channel_major():
    coords = torch.tensor([[1, 1, 2, 3]])
    bev = bev_from_sparse(SparseTensor(torch.tensor([[5.0, 7.0]]), coords, (3, 4, 5), 2))
    assert bev.shape == (2, 6, 4, 5)
    assert bev.nonzero().tolist() == [[1, 1, 2, 3], [1, 4, 2, 3]]
    assert bev[1, 4, 2, 3] == 7.0


@pytest.mark.parametrize("cell", [(1, 0, 0, 0), (0, 41, 0, 0), (0, 0, -1, 0), (0, 0, 0, 48)])
def test_a_voxel_outside_is_refused(detector, cell):
    with pytest.raises(InternalError, match=r"a voxel lies outside the grid \(41, 64, 48\) or the batch of 1"):
        detector(torch.zeros(1, 4), torch.tensor([cell]))


def test_coordinates_of_another_type_are_refused(detector):
    with pytest.raises(InternalError, match="not int64"):
        detector(torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.int32))


def test_a_stage_that_cannot_add_its_input_is_refused():
    config = small_config()
    backbone = dataclasses.replace(config.backbone_3d, channels=(4, 5, 6, 8, 10, 12))
    with pytest.raises(UsageError, match=r"conv_input of small has 4 channels and conv1 has 5.*CHANNELS equal"):
        build_detector(dataclasses.replace(config, backbone_3d=backbone))


def test_voxels_become_tensors():
    voxels = Voxels(
        features=np.ones((3, 4), np.float32),
        coords=np.arange(12, dtype=np.int32).reshape(3, 4),
        num_points=np.ones(3, np.int32),
        found=3,
        cutoff_m=float("inf"),
    )
    features, coords = tensors_from_voxels(voxels)
    assert features.dtype == torch.float32
    assert coords.dtype == torch.int64
    assert coords[2].tolist() == [8, 9, 10, 11]


def test_layers_are_listed_in_the_order_in_which_they_run(detector):
    layers = prunable_layers(detector)
    names = {id(layer.module): layer.name for layer in layers}
    ran = []
    for layer in layers:
        layer.module.register_forward_hook(lambda module, _i, _o: ran.append(names[id(module)]))
    with torch.no_grad():
        detector(*small_scene())
    assert ran == [layer.name for layer in layers]
    assert {part: sum(layer.part == part for layer in layers) for part in ("3d", "2d", "head")} == {
        "3d": 21,
        "2d": 7,
        "head": 1 + 2 * (4 * 2 + 3),
    }
    weights = {name for name, value in detector.named_parameters() if value.ndim > 1}
    assert weights == {f"{layer.name}.weight" for layer in layers}


def test_layers_know_their_norm_and_their_end(detector):
    layers = {layer.name: layer for layer in prunable_layers(detector)}
    for layer in layers.values():
        assert (layer.norm is None) == layer.final
        if layer.norm is not None:
            assert detector.get_submodule(layer.norm_name) is layer.norm
            assert layer.norm.num_features == layer.weight.shape[layer.output_dim]
    assert layers["backbone_3d.conv1.0.conv2"].norm_name == "backbone_3d.conv1.0.bn2"
    assert layers["backbone_2d.deblocks.1.0"].kind == "deconv2d"
    assert {name for name, layer in layers.items() if layer.final and ".1.hm" in name} == {
        "dense_head.heads_list.1.hm.2"
    }


def test_positions_are_counted_as_the_layers_run(detector):
    counted = {}

    def count(module, inputs, output, name):
        tensor = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
        counted[name] = tensor.shape[-2] * tensor.shape[-1]

    for layer in prunable_layers(detector):
        if layer.kind != "sparse":
            layer.module.register_forward_hook(lambda m, i, o, name=layer.name: count(m, i, o, name))
    with torch.no_grad():
        detector(*small_scene())
    assert dense_positions(detector) == counted


def test_pair_counts_are_those_of_the_forward_pass(detector):
    features, coords = small_scene()
    seen = {}
    for name, conv in detector.backbone_3d.convolutions():
        conv.register_forward_hook(
            lambda module, inputs, _o, name=name: seen.__setitem__(name, module.kernel_map(inputs[0]).pair_counts)
        )
    with torch.no_grad():
        detector(features, coords)
    counts = sparse_pair_counts(detector, coords)
    assert list(counts) == [f"backbone_3d.{name}" for name in seen]
    for name, pairs in seen.items():
        assert counts[f"backbone_3d.{name}"].dtype == np.int64
        assert np.array_equal(counts[f"backbone_3d.{name}"], pairs)


def test_folding_keeps_the_outputs_and_leaves_no_norm(detector):
    features, coords = small_scene()
    with torch.no_grad():
        detector.backbone_3d.conv2[1].conv1.weight[:, 0] = 0.0
        detector.backbone_2d.deblocks[1][0].weight[:3] = 0.0
        before = {name: value.clone() for name, value in detector.state_dict().items()}
        copied = fold_batch_norms(detector.train())
        detector.eval()
        expected, found = detector(features, coords), copied(features, coords)
    for name, value in expected.items():
        assert float((found[name] - value).abs().max() / value.abs().max()) <= 1e-5
    assert not copied.training
    assert not any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in copied.modules())
    originals = {layer.name: layer.weight for layer in prunable_layers(detector)}
    for layer in prunable_layers(copied):
        assert layer.norm is None
        assert layer.module.bias is not None
        assert torch.equal(layer.weight == 0, originals[layer.name] == 0)
    assert all(torch.equal(before[name], value) for name, value in detector.state_dict().items())
    assert [layer.final for layer in prunable_layers(copied)] == [layer.final for layer in prunable_layers(detector)]


def test_a_norm_without_statistics_cannot_be_folded():
    norm = nn.BatchNorm2d(2, track_running_stats=False)
    with pytest.raises(InternalError, match="without running statistics"):
        folded(torch.ones(2, 1, 1, 1), None, norm)


def test_seeded_weights_depend_on_seed_name_and_shape_alone(detector):
    again = build_detector(small_config())
    seed_weights(again, 0)
    other = build_detector(small_config())
    seed_weights(other, 1)
    name = "backbone_3d.conv1.0.conv1.weight"
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in detector.state_dict().items())
    assert not torch.equal(other.state_dict()[name], again.state_dict()[name])
    # Recorded values: another machine or numpy must give the same bits.
    recorded = ["-0x1.dcef13e5ffd34p-4", "0x1.511327152af62p-2", "-0x1.418f73d3d63e9p-2"]
    assert [value.hex() for value in seeded_values(0, name, (4, 3, 3, 3, 4)).ravel()[:3].tolist()] == recorded


def test_seeded_activations_neither_vanish_nor_explode(detector):
    features, coords = small_scene()
    with torch.no_grad():
        bev = detector.backbone_to_bev(features, coords)
        heads = detector.bev_to_heads(bev)
    assert 0.01 < float(bev.square().mean().sqrt()) < 10
    assert all(0.005 < float(value.std()) < 5 for value in heads.values())
    assert float(heads["1.hm"].sigmoid().median()) < 0.1


def test_spconv_is_asked_for_by_its_extra(detector, monkeypatch):
    monkeypatch.setitem(sys.modules, "spconv", None)
    monkeypatch.delitem(sys.modules, "spconv.pytorch", raising=False)
    with pytest.raises(MissingDependency, match=r"'spconv' is not installed.*dm3d-deploy\[cuda\]"):
        spconv_backend.backbone_to_bev(detector, *small_scene())


class NativeTensor:
    """The part of spconv's SparseConvTensor that is used, over our own convolution."""

    def __init__(self, features, indices, spatial_shape, batch_size, maps=None):
        assert indices.dtype == torch.int32
        assert indices.is_contiguous()
        self.features, self.indices = features, indices
        self.spatial_shape, self.batch_size = spatial_shape, batch_size
        self.maps = {} if maps is None else maps

    def replace_feature(self, features):
        return NativeTensor(features, self.indices, self.spatial_shape, self.batch_size, self.maps)


def stand_in():
    """A module with spconv's interface; strided layers return their rows in reverse."""

    def native(kind):
        class Native(nn.Module):
            def __init__(self, cin, cout, kernel, *, padding, indice_key, bias, stride=(1, 1, 1)):
                super().__init__()
                more = {"stride": tuple(stride), "padding": tuple(padding)} if kind is SparseConv3d else {}
                self.conv = kind(cin, cout, tuple(kernel), indice_key=indice_key, bias=bias, **more)
                self.weight, self.bias = None, None

            def forward(self, x):
                conv = self.conv
                conv.weight, conv.bias = self.weight, self.bias
                ours = SparseTensor(x.features, x.indices.long(), tuple(x.spatial_shape), x.batch_size, x.maps)
                y = conv(ours)
                flip = kind is SparseConv3d
                rows, cells = (y.features.flip(0), y.coords.flip(0)) if flip else (y.features, y.coords)
                return NativeTensor(rows, cells.int().contiguous(), list(y.shape_zyx), x.batch_size, x.maps)

        return Native

    module = ModuleType("spconv.pytorch")
    module.SparseConvTensor = NativeTensor
    module.SubMConv3d, module.SparseConv3d = native(SubMConv3d), native(SparseConv3d)
    return module


def test_the_backbone_over_spconv_s_interface_is_the_backbone(detector):
    features, coords = small_scene(batch_size=2)
    found = spconv_backend.run_backbone(stand_in(), detector, features, coords, 2)
    torch.testing.assert_close(found, detector.backbone_to_bev(features, coords, 2), rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in detector.backbone_3d.parameters())


def test_spconv_is_refused_off_cuda(detector, monkeypatch):
    monkeypatch.setitem(sys.modules, "spconv", ModuleType("spconv"))
    monkeypatch.setitem(sys.modules, "spconv.pytorch", stand_in())
    with pytest.raises(UsageError, match=r"spconv was asked for on cpu.*use detector.backbone_to_bev"):
        spconv_backend.backbone_to_bev(detector, *small_scene())
