"""VoxelNeXt against tensors of OpenPCDet's own modules: features, head, boxes, gradients, names, multiplications."""

import ast
import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stored_gradients import gradient_errors

from dm3d_deploy.config import load_config
from dm3d_deploy.geometry.decode import decoded
from dm3d_deploy.models.detector import build_detector, dense_positions, prunable_layers, sparse_pair_counts

pytestmark = pytest.mark.data

FORWARD_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 2e-2
SCOPES = (*("conv_input", "conv1", "conv2", "conv3", "conv4", "conv5", "conv6"), "conv_out", "shared_conv")
HEAD = "head.dense_head."


def in_their_order(detector, coords):
    """Our rows of the flat sparse map in the order of OpenPCDet's: by the first tap that reaches a cell."""
    x = detector._sparse(torch.empty(len(coords), 0), coords, 1)
    kernel_map = {name: made for name, _, _, made in detector.backbone_3d.kernel_maps(x)}["conv_out.0"]
    reached = torch.cat(list(kernel_map.out_rows)).numpy()
    rows, first = np.unique(reached, return_index=True)
    cells = kernel_map.out_coords.numpy()[rows[np.argsort(first)]]
    return torch.from_numpy(cells[:, 2] * kernel_map.out_shape_zyx[2] + cells[:, 3])


@pytest.fixture(scope="module")
def case(shared):
    """One forward and backward pass on one thread."""
    spec = importlib.util.spec_from_file_location("seeded_weights", shared / "oracle" / "seeded_weights.py")
    seeded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(seeded)
    with np.load(shared / "oracle" / "voxelnext_nuscenes.npz") as file:
        oracle = {key: file[key] for key in file.files}
    path = shared / "data/openpcdet_cfgs/nuscenes_models/cbgs_voxel0075_voxelnext.yaml"
    detector = build_detector(load_config(path))
    with torch.no_grad():
        for name, value in detector.state_dict().items():
            value.copy_(torch.from_numpy(np.asarray(seeded.seeded_array(0, name, tuple(value.shape)))))
    features = torch.from_numpy(oracle["b.voxel_features"])
    coords = torch.from_numpy(oracle["input.voxel_coords"].astype(np.int64))
    seen, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)
    hooks = [
        detector.backbone_3d.get_submodule(scope).register_forward_hook(
            lambda _m, _i, out, scope=scope: seen.__setitem__(f"backbone_3d.{scope}", out)
        )
        for scope in SCOPES
    ]
    maps = detector(features, coords)
    for hook in hooks:
        hook.remove()
    cells = in_their_order(detector, coords)
    heads = {f"{HEAD}{name}": value[0].flatten(1).T[cells] for name, value in maps.items()}
    generator = torch.Generator().manual_seed(1)
    loss = 0
    for key in sorted(heads):
        signs = torch.randint(0, 2, heads[key].shape, generator=generator).float() * 2 - 1
        loss = loss + (heads[key] * signs).sum()
    loss.backward()
    torch.set_num_threads(threads)
    grads = {name: p.grad.numpy() for name, p in detector.named_parameters() if p.grad is not None}
    return SimpleNamespace(
        oracle=oracle, detector=detector, coords=coords, sparse=seen, heads=heads, grads=grads,
        maps={name: value.detach().numpy() for name, value in maps.items()},
    )  # fmt: skip


def moments(whole):
    return [whole.std(dtype=np.float64), np.abs(whole).max(), np.linalg.norm(whole.astype(np.float64))]


def test_every_forward_tensor_agrees(case):
    oracle, worst = case.oracle, {}
    for name, out in case.sparse.items():
        whole, cells = out.features.detach().numpy(), out.coords
        assert len(whole) == oracle[f"{name}@count"]
        if oracle[f"{name}@coords"].shape[1] == 3:
            cells = cells[:, [0, 2, 3]]
        row_of = {tuple(cell): row for row, cell in enumerate(cells.tolist())}
        rows, expected = [row_of[tuple(cell)] for cell in oracle[f"{name}@coords"].tolist()], oracle[f"{name}@rows"]
        worst[name] = np.abs(whole[rows] - expected).max() / np.abs(expected).max()
        np.testing.assert_allclose(moments(whole), oracle[f"{name}@moments"][1:], rtol=1e-4, err_msg=name)
    for name, tensor in case.heads.items():
        whole, expected = tensor.detach().numpy(), oracle[f"{name}@value"]
        assert whole.shape == tuple(oracle[f"{name}@shape"])
        found = np.ascontiguousarray(whole).ravel()[oracle[f"{name}@index"]]
        worst[name] = np.abs(found - expected).max() / np.abs(expected).max()
        np.testing.assert_allclose(moments(whole), oracle[f"{name}@moments"][1:], rtol=1e-4, err_msg=name)
    stored = {key.split("@")[0] for key in oracle if "@moments" in key and not key.startswith("grad.")}
    assert set(worst) == stored
    print(len(worst), max(worst.items(), key=lambda item: item[1]))
    assert max(worst.values()) <= FORWARD_TOLERANCE, worst


def test_gradients_agree(case):
    errors = gradient_errors(case.oracle, case.grads)
    print(len(errors), max(errors.items(), key=lambda item: item[1]))
    assert set(errors) == {f"{layer.name}.weight" for layer in prunable_layers(case.detector)}
    assert max(errors.values()) <= GRADIENT_TOLERANCE


def test_state_dict_is_that_of_openpcdet(case, shared):
    lines = (shared / "oracle" / "keys_voxelnext_nuscenes.txt").read_text().splitlines()
    expected = [(name, ast.literal_eval(shape), kind) for name, shape, kind in (line.split("\t") for line in lines)]
    for detector in (case.detector, build_detector(load_config("voxelnext"))):
        found = [
            (name, tuple(value.shape), str(value.dtype).removeprefix("torch."))
            for name, value in detector.state_dict().items()
        ]
        assert sorted(found) == sorted(expected)


def test_boxes_below_saturation_are_those_of_openpcdet(case):
    """Seeded logits reach 70: where sigmoids are one in float32, their ties go by rows that have another order."""
    kept = decoded(case.maps, case.detector.config).kept.detections
    theirs, scores, labels = (case.oracle[f"final.pred_{name}"] for name in ("boxes", "scores", "labels"))
    assert len(kept) == len(theirs)
    np.testing.assert_allclose(np.sort(kept.scores), np.sort(scores), atol=1e-5)
    distance = np.linalg.norm(kept.boxes.centre[None] - theirs[:, None, :3], axis=2)
    distance += 1e3 * (kept.labels[None] + 1 != labels[:, None])
    near = (distance.min(axis=1) <= 0.01)[scores < 1]
    print(f"{np.count_nonzero(near)} of {len(near)} boxes below saturation")
    assert np.count_nonzero(near) >= 0.95 * len(near) > 200


def test_macs_are_pairs_times_channels(case):
    pairs = sparse_pair_counts(case.detector, case.coords)
    assert dense_positions(case.detector) == {}
    totals = {"3d": 0, "head": 0}
    for layer in prunable_layers(case.detector):
        totals[layer.part] += int(pairs[layer.name].sum()) * layer.weight.numel() // len(pairs[layer.name])
    sites = 18_276
    assert totals["head"] == sites * (36 * 128 * 128 + 128 * (10 + 6 * 10))
    flat = sum(int(pairs[f"backbone_3d.{name}.0"].sum()) * 128 * 128 for name in ("conv_out", "shared_conv"))
    print(totals, flat)
    assert pairs["backbone_3d.shared_conv.0"][4] == sites
    assert round(100 * totals["3d"] / sum(totals.values())) == 85  # method.md: 85 % sparse backbone
