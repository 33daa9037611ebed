"""CenterPoint against tensors that OpenPCDet's own modules computed from the same weights and voxels."""

import ast
import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dm3d_deploy.config import load_config
from dm3d_deploy.models.detector import build_detector, dense_positions, prunable_layers, sparse_pair_counts

pytestmark = pytest.mark.data

FORWARD_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 2e-2
SAME_MASKS_TOLERANCE = 1e-4
STAGES = ("conv_input", "conv1", "conv2", "conv3", "conv4", "conv_out")
BRANCHES = ("center", "center_z", "dim", "rot", "vel", "hm")
DENSE = ("b.spatial_features", "b.spatial_features_2d", "dense_head.shared_conv")
HEADS = tuple(f"head.dense_head.{task}.{branch}" for task in range(6) for branch in BRANCHES)
SITES = {"conv_input": 60_000, "conv1": 60_000, "conv2": 66_727, "conv3": 33_770, "conv4": 13_163, "conv_out": 10_675}


@pytest.fixture(scope="module")
def oracle(shared):
    with np.load(shared / "oracle" / "centerpoint_voxel01_nuscenes.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def detector(shared):
    detector = build_detector(
        load_config(shared / "data/openpcdet_cfgs/nuscenes_models/cbgs_voxel01_res3d_centerpoint.yaml")
    )
    spec = importlib.util.spec_from_file_location("seeded_weights", shared / "oracle" / "seeded_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.no_grad():
        for name, value in detector.state_dict().items():
            value.copy_(torch.from_numpy(np.asarray(module.seeded_array(0, name, tuple(value.shape)))))
    return detector


@pytest.fixture(scope="module")
def coords(oracle):
    return torch.from_numpy(oracle["input.voxel_coords"].astype(np.int64))


@pytest.fixture(scope="module")
def ran(oracle, detector, coords):
    """One forward and backward pass on one thread; every tensor that the oracle names."""
    seen = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    hooks = [
        detector.backbone_3d.get_submodule(stage).register_forward_hook(
            lambda _m, _i, out, key=f"backbone_3d.{stage}": seen.__setitem__(key, out)
        )
        for stage in STAGES
    ]
    named = {"b.spatial_features_2d": "backbone_2d", "dense_head.shared_conv": "dense_head.shared_conv"}
    hooks += [
        detector.get_submodule(path).register_forward_hook(
            lambda _m, _i, out, key=key: seen.__setitem__(key, out.detach())
        )
        for key, path in named.items()
    ]
    bev = detector.backbone_to_bev(torch.from_numpy(oracle["b.voxel_features"]), coords)
    seen["b.spatial_features"] = bev.detach()
    heads = detector.bev_to_heads(bev)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (heads[name] * (torch.randint(0, 2, heads[name].shape, generator=generator).float() * 2 - 1)).sum()
        for name in sorted(heads)
    )
    loss.backward()
    for hook in hooks:
        hook.remove()
    torch.set_num_threads(threads)
    seen |= {f"head.dense_head.{name}": value.detach() for name, value in heads.items()}
    grads = {name: p.grad.numpy() for name, p in detector.named_parameters() if p.grad is not None}
    return SimpleNamespace(tensors=seen, grads=grads)


def moments(values):
    values = values.astype(np.float64)
    return np.array([values.mean(), values.std(), np.abs(values).max(), np.linalg.norm(values)])


def stored_values(ran, oracle, name):
    """The values at the stored places, and the stored ones."""
    if f"{name}@value" in oracle:
        tensor = ran.tensors[name]
        assert tuple(tensor.shape) == tuple(oracle[f"{name}@shape"])
        return tensor.flatten().numpy()[oracle[f"{name}@index"]], oracle[f"{name}@value"]
    out = ran.tensors[name]
    assert len(out.coords) == oracle[f"{name}@count"] == SITES[name.removeprefix("backbone_3d.")]
    row_of = {tuple(cell): row for row, cell in enumerate(out.coords.tolist())}
    rows = [row_of[tuple(cell)] for cell in oracle[f"{name}@coords"].tolist()]
    return out.features.detach().numpy()[rows], oracle[f"{name}@rows"]


def all_of(ran, name):
    tensor = ran.tensors[name]
    return (tensor.features.detach() if hasattr(tensor, "features") else tensor).numpy()


FORWARD = (*(f"backbone_3d.{stage}" for stage in STAGES), *DENSE, *HEADS)


@pytest.mark.parametrize("name", FORWARD)
def test_forward_tensor_agrees(ran, oracle, name):
    found, expected = stored_values(ran, oracle, name)
    assert np.abs(found - expected).max() / np.abs(expected).max() <= FORWARD_TOLERANCE
    np.testing.assert_allclose(moments(all_of(ran, name))[1:], oracle[f"{name}@moments"][1:], rtol=1e-4)


def test_every_stored_forward_tensor_is_compared(oracle):
    stored = {name.split("@")[0] for name in oracle if "@moments" in name and not name.startswith("grad.")}
    assert stored == set(FORWARD)


def gradient_errors(ran, oracle):
    errors = {}
    for key in oracle:
        if key.startswith("grad.") and key.endswith("@value"):
            name = key.removeprefix("grad.").removesuffix("@value")
            found = ran.grads[name].ravel()[oracle[f"grad.{name}@index"]]
            errors[name] = float(np.linalg.norm(found - oracle[key]) / np.linalg.norm(oracle[key]))
    return errors


def test_gradients_agree(ran, oracle, detector):
    errors = gradient_errors(ran, oracle)
    assert set(errors) == {f"{layer.name}.weight" for layer in prunable_layers(detector)}
    assert max(errors.values()) <= GRADIENT_TOLERANCE
    for name in errors:
        norm, largest = oracle[f"grad.{name}@moments"][[3, 2]]
        np.testing.assert_allclose(np.linalg.norm(ran.grads[name].astype(np.float64)), norm, rtol=GRADIENT_TOLERANCE)
        np.testing.assert_allclose(np.abs(ran.grads[name]).max(), largest, rtol=GRADIENT_TOLERANCE)


def test_gradients_behind_the_last_relu_agree_closely(ran, oracle, detector):
    errors = gradient_errors(ran, oracle)
    final = [f"{layer.name}.weight" for layer in prunable_layers(detector) if layer.final]
    assert len(final) == 36
    assert max(errors[name] for name in final) <= SAME_MASKS_TOLERANCE


def test_gradients_agree_closely_when_the_same_relus_are_open(ran, oracle):
    pairs = [stored_values(ran, oracle, name) for name in FORWARD]
    if not all(np.array_equal(found, expected) for found, expected in pairs):
        pytest.skip("this machine rounds differently from the oracle's, so a few ReLUs may be open that were shut")
    assert max(gradient_errors(ran, oracle).values()) <= SAME_MASKS_TOLERANCE


def test_state_dict_is_that_of_openpcdet(shared, detector):
    lines = (shared / "oracle" / "keys_centerpoint_voxel01_nuscenes.txt").read_text().splitlines()
    expected = [(name, ast.literal_eval(shape), kind) for name, shape, kind in (line.split("\t") for line in lines)]
    found = [
        (name, tuple(value.shape), str(value.dtype).removeprefix("torch."))
        for name, value in detector.state_dict().items()
    ]
    assert sorted(found) == sorted(expected)
    assert len(found) > 500


def test_pairs_macs_and_weights_are_those_of_the_method(detector, coords):
    pairs = sparse_pair_counts(detector, coords)
    positions = dense_positions(detector)
    layers = prunable_layers(detector)
    totals = {part: [0, 0, 0] for part in ("3d", "2d", "head")}
    for layer in layers:
        if layer.kind == "sparse":
            macs = int(pairs[layer.name].sum()) * layer.weight.shape[0] * layer.weight.shape[-1]
        else:
            macs = positions[layer.name] * layer.weight.numel()
        for i, value in enumerate((1, macs, layer.weight.numel())):
            totals[layer.part][i] += value
    assert totals["3d"] == [21, 27_156_684_640, 2_691_696]
    assert totals["2d"] == [14, 31_809_601_536, 4_571_136]
    assert totals["head"][1:] == [27_235_713_024, 1_662_336]
    assert [layer.name for layer in layers if layer.kind == "sparse"] == list(pairs)
    sums = {name: int(counts.sum()) for name, counts in pairs.items()}
    assert {sums[f"backbone_3d.{name}"] for name in ("conv_input.0", "conv1.0.conv1", "conv1.1.conv2")} == {359_710}
    assert sums["backbone_3d.conv2.0.0"] == 204_019
    assert sums["backbone_3d.conv2.2.conv2"] == 835_211
    assert sums["backbone_3d.conv3.0.0"] == 224_403
    assert sums["backbone_3d.conv3.1.conv1"] == 493_106
    assert sums["backbone_3d.conv4.0.0"] == 110_991
    assert sums["backbone_3d.conv4.2.conv1"] == 205_877
    assert sums["backbone_3d.conv_out.0"] == 17_936
    first = pairs["backbone_3d.conv_input.0"].reshape(3, 3, 3)
    assert first[1, 1, 1] == 60_000
    assert first[::2, ::2, ::2].min() == 5_028
