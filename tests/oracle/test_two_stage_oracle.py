"""Voxel R-CNN and PV-RCNN against tensors of OpenPCDet's own modules, at the RoIs that it proposed."""

import ast
import dataclasses
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stored_gradients import gradient_errors
from test_zoo_oracle import filled, found_and_stored, whole_maps

from dm3d_deploy.config import load_config
from dm3d_deploy.geometry.decode import decoded
from dm3d_deploy.geometry.rois import first_stage, rois_from_array, second_maps
from dm3d_deploy.models.detector import build_detector, prunable_layers, sparse_pair_counts
from dm3d_deploy.models.outputs import Scene
from dm3d_deploy.models.sparse import cell_keys

pytestmark = pytest.mark.data

FORWARD_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 2e-2
# oracle file: our model, OpenPCDet's config, forward tensors that are compared
CASES = {
    "voxel_rcnn_car_kitti": ("voxel-rcnn", "kitti_models/voxel_rcnn_car.yaml", 16),
    "pv_rcnn_kitti": ("pv-rcnn", "kitti_models/pv_rcnn.yaml", 19),
}
STAGES = ("conv_input", "conv1", "conv2", "conv3", "conv4", "conv_out")
HEADS = ("shared_fc_layer", "cls_pred_layer", "reg_pred_layer", "cls_layers", "reg_layers")
HOOKED = {
    "b.spatial_features_2d": "backbone_2d",
    "pfe.vsa_point_feature_fusion": "pfe.vsa_point_feature_fusion",
    "b.point_features": "pfe.vsa_point_feature_fusion",
    "head.point_head.point_cls_preds": "point_head.cls_layers",
    **{f"backbone_3d.{stage}": f"backbone_3d.{stage}" for stage in STAGES},
    **{f"roi_head.{name}": f"roi_head.{name}" for name in HEADS},
    **{f"head.roi_head.{name}": f"roi_head.{name}" for name in HEADS[1:]},
}
DECODED = {"b.batch_cls_preds", "b.batch_box_preds", "b.rois"}


def in_rows_of_spconv(before, stage, conv):
    """A stage with its rows in the order in which spconv's CPU code first meets the cells, tap by tap.

    PV-RCNN takes the first neighbours by row: ours are in raster order, and the oracle's were not.
    """
    kernel, stride, padding = (np.array(x) for x in (conv.kernel, conv.stride, conv.padding))
    met = []
    for tap in itertools.product(*(range(size) for size in kernel)):
        shifted = before.coords.numpy()[:, 1:] + padding - tap
        cells = shifted // stride
        inside = (shifted % stride == 0).all(1) & (cells >= 0).all(1) & (cells < stage.shape_zyx).all(1)
        met.append(np.ravel_multi_index(cells[inside].T, stage.shape_zyx))
    keys, first = np.unique(np.concatenate(met), return_index=True)
    order = np.argsort(cell_keys(stage.coords, stage.shape_zyx).numpy())
    assert len(keys) == len(order)
    rows = torch.from_numpy(order[np.argsort(first)])
    return dataclasses.replace(stage, features=stage.features[rows], coords=stage.coords[rows])


def with_rows_of_spconv(backbone):
    plain = backbone.stages

    def stages(x):
        found = plain(x)
        for before, name in (("x_conv1", "conv2"), ("x_conv2", "conv3"), ("x_conv3", "conv4")):
            conv = backbone.get_submodule(f"{name}.0.0")
            found[f"x_{name}"] = in_rows_of_spconv(found[before], found[f"x_{name}"], conv)
        return found

    return stages


@pytest.fixture(scope="module", params=CASES)
def case(request, shared):
    """One forward and backward pass on one thread: every tensor that the oracle names."""
    name, path, _ = CASES[request.param]
    with np.load(shared / "oracle" / f"{request.param}.npz") as file:
        oracle = {key: file[key] for key in file.files}
    detector = filled(build_detector(load_config(shared / "data/openpcdet_cfgs" / path)), shared)
    detector.backbone_3d.stages = with_rows_of_spconv(detector.backbone_3d)
    features = torch.from_numpy(oracle["b.voxel_features"])
    coords = torch.from_numpy(oracle["input.voxel_coords"].astype(np.int64))
    points = oracle["input.points"][:, 1:].copy() if "input.points" in oracle else None
    boxes = oracle["b.rois@value"][np.argsort(oracle["b.rois@index"])].reshape(-1, 7)
    rois = rois_from_array(np.column_stack([boxes, np.zeros((len(boxes), 3))]), detector.config)
    seen = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    modules = dict(detector.named_modules())
    hooks = [
        modules[path].register_forward_hook(lambda _m, _i, out, key=key: seen.__setitem__(key, out))
        for key, path in HOOKED.items()
        if path in modules
    ]
    found = detector.outputs(features, coords, scenes=[Scene(points=points, rois=rois)])
    for hook in hooks:
        hook.remove()
    first = {name: value for name, value in found.maps.items() if name not in second_maps(detector.config)}
    seen |= {"b.spatial_features": found.bev, **whole_maps(first)}
    seen = {name: value for name, value in seen.items() if any(key.startswith(f"{name}@") for key in oracle)}
    for key in seen:
        if f"{key}@shape" in oracle:  # convolutions of extent one end in dimensions of one
            seen[key] = seen[key].reshape(tuple(oracle[f"{key}@shape"]))
    generator = torch.Generator().manual_seed(1)
    loss = 0
    for key in sorted(name for name in seen if name.startswith("head.")):
        signs = torch.randint(0, 2, seen[key].shape, generator=generator).float() * 2 - 1
        loss = loss + (seen[key] * signs).sum()
    loss.backward()
    torch.set_num_threads(threads)
    return SimpleNamespace(
        key=request.param, name=name, oracle=oracle, detector=detector, tensors=seen, coords=coords, rois=rois,
        grads={key: p.grad.numpy() for key, p in detector.named_parameters() if p.grad is not None},
        maps={key: value.detach().numpy() for key, value in found.maps.items()},
    )  # fmt: skip


def test_every_forward_tensor_agrees(case):
    stored = {key.split("@")[0] for key in case.oracle if "@moments" in key and not key.startswith("grad.")} - DECODED
    assert len(stored) == CASES[case.key][2]
    worst = {}
    for name in sorted(stored):
        _, found, expected = found_and_stored(case, name)
        worst[name] = np.abs(found - expected).max() / np.abs(expected).max()
    print(case.name, len(stored), max(worst.items(), key=lambda item: item[1]))
    assert max(worst.values()) <= FORWARD_TOLERANCE, worst


def test_gradients_agree(case):
    errors = gradient_errors(case.oracle, case.grads)
    print(case.name, len(errors), max(errors.items(), key=lambda item: item[1]))
    assert set(errors) == {f"{layer.name}.weight" for layer in prunable_layers(case.detector) if layer.weight.ndim > 3}
    assert max(errors.values()) <= GRADIENT_TOLERANCE, errors


def test_state_dict_is_that_of_openpcdet(case, shared):
    lines = (shared / "oracle" / f"keys_{case.key}.txt").read_text().splitlines()
    expected = [(name, ast.literal_eval(shape), kind) for name, shape, kind in (line.split("\t") for line in lines)]
    for detector in (case.detector, build_detector(load_config(case.name))):
        found = [
            (name, tuple(value.shape), str(value.dtype).removeprefix("torch."))
            for name, value in detector.state_dict().items()
        ]
        assert sorted(found) == sorted(expected)


def test_proposals_are_those_of_openpcdet(case):
    found = decoded(case.maps, first_stage(case.detector.config)).kept.detections.boxes
    ours, theirs = np.column_stack([found.centre, found.size, found.yaw]), case.rois.detections.boxes
    theirs = np.column_stack([theirs.centre, theirs.size, theirs.yaw])
    off = np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1)
    print(case.name, f"{len(ours)} proposals in the same order, largest difference {off.max():.2g}")
    assert off.max() <= 1e-3


def test_detections_are_those_of_openpcdet(case):
    kept = decoded(case.maps, case.detector.config, case.rois).kept.detections
    theirs, scores = case.oracle["final.pred_boxes"], case.oracle["final.pred_scores"]
    distance = np.linalg.norm(kept.boxes.centre[None] - theirs[:, None, :3], axis=2)
    ours = distance.argmin(axis=1)
    same = distance[np.arange(len(ours)), ours] <= 1e-3 * np.maximum(np.abs(theirs[:, :3]).max(axis=1), 10)
    same &= np.abs(kept.scores[ours] - scores) <= 1e-4
    same &= (np.abs(kept.boxes.size[ours] - theirs[:, 3:6]) <= 1e-3 * np.maximum(theirs[:, 3:6], 1)).all(axis=1)
    print(case.name, f"{np.count_nonzero(same)} of {len(theirs)} boxes, {len(kept)} of ours")
    assert len(kept) == len(theirs)
    assert np.count_nonzero(same) >= 0.95 * len(theirs)


def test_multiplications_of_the_second_stage_are_those_of_a_hand_count(case):
    pairs = sparse_pair_counts(case.detector, case.coords)
    weights = {layer.name: layer.weight.numel() for layer in prunable_layers(case.detector) if layer.kind == "linear"}
    found = sum(int(pairs[name].sum()) * count for name, count in weights.items())
    places = 100 * 6**3
    heads = 100 * (2 * (256 * 256 + 256 * 256) + 256 * 256 + 256 * (1 + 7))
    if case.name == "voxel-rcnn":
        channels = {"conv2": 32, "conv3": 64, "conv4": 64}
        within = sum(int(case.oracle[f"backbone_3d.{stage}@count"]) * c * 32 for stage, c in channels.items())
        expected = within + 3 * places * (16 * 3 * 32 + 32 * 32) + 100 * 6**3 * 96 * 256 + heads
    else:
        groups = [(16, 4, 16)] * 2 + [(16, 19, 16)] * 2
        groups += [(16, 35, 32), (32, 35, 32)] + [(16, 67, 64), (32, 67, 64)] * 2
        keypoints = 2048 * sum(samples * (first * width + width * width) for samples, first, width in groups)
        keypoints += 2048 * (640 * 128 + 640 * 256 + 256 * 256 + 256)
        expected = keypoints + 2 * places * 16 * (131 * 64 + 64 * 64) + 100 * 6**3 * 128 * 256 + heads
    print(case.name, found)
    assert found == expected
    assert math.isclose(found / 1e9, {"voxel-rcnn": 0.935, "pv-rcnn": 11.922}[case.name], abs_tol=5e-4)
