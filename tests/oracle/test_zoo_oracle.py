"""SECOND, PointPillars and CenterPoint over dynamic pillars against tensors of OpenPCDet's own modules."""

import ast
import dataclasses
import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stored_gradients import gradient_errors

from dm3d_deploy.config import load_config
from dm3d_deploy.geometry.anchor_boxes import decoded_at
from dm3d_deploy.geometry.boxes import wrap_angle
from dm3d_deploy.geometry.decode import decoded
from dm3d_deploy.geometry.voxelize import decorated, pillar_points
from dm3d_deploy.models.backbone3d import bev_from_sparse
from dm3d_deploy.models.detector import build_detector, dense_positions, prunable_layers, sparse_pair_counts
from dm3d_deploy.pointcloud import PointCloud

pytestmark = pytest.mark.data

FORWARD_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 2e-2
STAGES = ("conv_input", "conv1", "conv2", "conv3", "conv4", "conv_out")
# oracle file: our model, OpenPCDet's config, forward tensors that are compared
CASES = {
    "second_kitti": ("second", "kitti_models/second.yaml", 11),
    "pointpillar_kitti": ("pointpillars", "kitti_models/pointpillar.yaml", 6),
    "centerpoint_dyn_pillar_nuscenes": ("centerpoint-pillar", "nuscenes_models/cbgs_dyn_pp_centerpoint.yaml", 40),
}
ANCHOR_BRANCHES = {"cls": "cls_preds", "box": "box_preds", "dir": "dir_cls_preds"}


def filled(detector, shared):
    spec = importlib.util.spec_from_file_location("seeded_weights", shared / "oracle" / "seeded_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.no_grad():
        for name, value in detector.state_dict().items():
            value.copy_(torch.from_numpy(np.asarray(module.seeded_array(0, name, tuple(value.shape)))))
    return detector


def inputs_of(oracle, config):
    """Rows and coordinates as the oracle's voxeliser made them, after its shuffle and cap."""
    if config.pillars is None:
        return oracle["b.voxel_features"], oracle["input.voxel_coords"].astype(np.int64)
    if config.pillars.dynamic:
        cloud = PointCloud(points=oracle["input.points"][:, 1:].copy(), columns=config.voxels.columns)
        voxels = pillar_points(cloud, config.voxels, config.pillars)
        return voxels.features, voxels.coords.astype(np.int64)
    coords, counts = oracle["input.voxel_coords"].astype(np.int64), oracle["input.voxel_num_points"].astype(np.int64)
    owner = np.repeat(np.arange(len(coords)), counts)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    points = oracle["input.voxels"][owner, place]
    means = np.stack([points[owner == row, :3].astype(np.float64).mean(axis=0) for row in range(len(coords))])
    features = decorated(points, owner, means, coords[:, [3, 2]], config.voxels, config.pillars)
    return features, coords[owner]


def whole_maps(heads):
    """A head's maps under the oracle's names: those of anchors put together again, channels last."""
    if "0.cls" not in heads:
        return {f"head.dense_head.{name}": value for name, value in heads.items()}
    anchors = range(len({name.split(".")[0] for name in heads}))
    return {
        f"head.dense_head.{theirs}": torch.cat([heads[f"{a}.{ours}"] for a in anchors], dim=1).permute(0, 2, 3, 1)
        for ours, theirs in ANCHOR_BRANCHES.items()
    }


def bev_of_stored_pillars(oracle, pillars):
    order = np.lexsort((pillars.coords[:, 2].numpy(), pillars.coords[:, 3].numpy()))
    rows = torch.from_numpy(oracle["b.voxel_features"])
    return bev_from_sparse(dataclasses.replace(pillars, features=rows, coords=pillars.coords[order]))


@pytest.fixture(scope="module", params=CASES)
def case(request, shared):
    """One forward and backward pass on one thread: every tensor that the oracle names."""
    name, path, _ = CASES[request.param]
    with np.load(shared / "oracle" / f"{request.param}.npz") as file:
        oracle = {key: file[key] for key in file.files}
    detector = filled(build_detector(load_config(shared / "data/openpcdet_cfgs" / path)), shared)
    features, coords = (torch.from_numpy(array) for array in inputs_of(oracle, detector.config))
    seen = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    named = {"b.spatial_features_2d": "backbone_2d", "dense_head.shared_conv": "dense_head.shared_conv"}
    named |= {f"backbone_3d.{stage}": f"backbone_3d.{stage}" for stage in STAGES} | {"b.pillar_features": "vfe"}
    modules = dict(detector.named_modules())
    hooks = [
        modules[path].register_forward_hook(lambda _m, _i, out, key=key: seen.__setitem__(key, out))
        for key, path in named.items()
        if path in modules
    ]
    bev = detector.backbone_to_bev(features, coords)
    seen["b.spatial_features"] = bev
    heads = detector.bev_to_heads(bev)
    seen |= whole_maps(heads)
    for hook in hooks:
        hook.remove()
    maps = {key: value.detach().numpy() for key, value in heads.items()}
    if "b.voxel_features" in oracle and detector.over_pillars:  # the same pillars to the bit, so that ReLUs open alike
        heads = detector.bev_to_heads(bev_of_stored_pillars(oracle, seen["b.pillar_features"]))
    wholes = whole_maps(heads)
    generator = torch.Generator().manual_seed(1)
    loss = 0
    for key in sorted(wholes):
        signs = torch.randint(0, 2, wholes[key].shape, generator=generator).float() * 2 - 1
        loss = loss + (wholes[key] * signs).sum()
    loss.backward()
    torch.set_num_threads(threads)
    grads = {key: p.grad.numpy() for key, p in detector.named_parameters() if p.grad is not None}
    return SimpleNamespace(
        key=request.param, name=name, oracle=oracle, detector=detector, tensors=seen, grads=grads, maps=maps,
        coords=coords,
    )  # fmt: skip


def found_and_stored(case, name):
    """All of our values, those at the stored places, and the stored ones."""
    tensor, oracle = case.tensors[name], case.oracle
    if name == "b.pillar_features":
        stored = in_stored_order(case, tensor)
        return stored, stored.ravel()[oracle[f"{name}@index"]], oracle[f"{name}@value"]
    if f"{name}@value" in oracle:
        whole = tensor.detach().numpy()
        assert whole.shape == tuple(oracle[f"{name}@shape"])
        return whole, whole.ravel()[oracle[f"{name}@index"]], oracle[f"{name}@value"]
    whole = tensor.features.detach().numpy()
    assert len(whole) == oracle[f"{name}@count"]
    row_of = {tuple(cell): row for row, cell in enumerate(tensor.coords.tolist())}
    rows = [row_of[tuple(cell)] for cell in oracle[f"{name}@coords"].tolist()]
    return whole, whole[rows], oracle[f"{name}@rows"]


def in_stored_order(case, pillars):
    """Pillar features in the oracle's order of rows: that of its voxels, or x before y for dynamic pillars."""
    values = pillars.features.detach().numpy()
    if "input.voxel_coords" in case.oracle:
        row_of = {tuple(cell): row for row, cell in enumerate(pillars.coords.tolist())}
        return values[[row_of[tuple(cell)] for cell in case.oracle["input.voxel_coords"].tolist()]]
    return values[np.lexsort((pillars.coords[:, 2].numpy(), pillars.coords[:, 3].numpy()))]


def test_every_forward_tensor_agrees(case):
    stored = {key.split("@")[0] for key in case.oracle if "@moments" in key and not key.startswith("grad.")}
    stored -= {"b.batch_cls_preds", "b.batch_box_preds"}  # decoded: compared below
    assert len(stored) == CASES[case.key][2]
    worst = {}
    for name in sorted(stored):
        whole, found, expected = found_and_stored(case, name)
        worst[name] = np.abs(found - expected).max() / np.abs(expected).max()
        whole = whole.astype(np.float64)
        moments = [whole.std(), np.abs(whole).max(), np.linalg.norm(whole)]
        np.testing.assert_allclose(moments, case.oracle[f"{name}@moments"][1:], rtol=1e-4, err_msg=name)
    print(case.name, len(stored), max(worst.items(), key=lambda item: item[1]))
    assert max(worst.values()) <= FORWARD_TOLERANCE, worst


def test_gradients_agree(case):
    errors = gradient_errors(case.oracle, case.grads)
    for name in errors:
        norm = case.oracle[f"grad.{name}@moments"][3]
        np.testing.assert_allclose(np.linalg.norm(case.grads[name].astype(np.float64)), norm, rtol=2e-2)
    print(case.name, len(errors), max(errors.values()))
    stored = {f"{layer.name}.weight" for layer in prunable_layers(case.detector) if layer.kind != "linear"}
    assert set(errors) == stored
    assert max(errors.values()) <= GRADIENT_TOLERANCE


def test_state_dict_is_that_of_openpcdet(case, shared):
    lines = (shared / "oracle" / f"keys_{case.key}.txt").read_text().splitlines()
    expected = [(name, ast.literal_eval(shape), kind) for name, shape, kind in (line.split("\t") for line in lines)]
    for detector in (case.detector, build_detector(load_config(case.name))):
        found = [
            (name, tuple(value.shape), str(value.dtype).removeprefix("torch."))
            for name, value in detector.state_dict().items()
        ]
        assert sorted(found) == sorted(expected)


def test_every_anchor_decodes_to_the_box_of_openpcdet(case):
    if case.name == "centerpoint-pillar":
        assert "b.batch_box_preds@value" not in case.oracle
        return
    config, oracle = case.detector.config, case.oracle
    assert oracle["b.batch_box_preds@shape"][1] == np.prod(case.maps["0.cls"].shape[2:]) * config.head.per_cell
    anchor, column = np.divmod(oracle["b.batch_box_preds@index"], 7)
    boxes, headings = decoded_at(case.maps, anchor, config, config.head)
    rows = np.column_stack([boxes.centre, boxes.size, boxes.yaw])
    found, expected = rows[np.arange(len(rows)), column], oracle["b.batch_box_preds@value"]
    yaw = column == 6
    size = np.maximum(np.abs(expected), 1)
    assert (np.abs(found - expected) / size)[~yaw].max() <= FORWARD_TOLERANCE
    turned = np.abs(wrap_angle(found[yaw] - expected[yaw].astype(np.float64)))
    assert turned[headings[yaw] > 1e-3].max() <= 1e-3
    scores = np.stack([case.maps[f"{a}.cls"][0] for a in range(config.head.per_cell)])
    whole = scores.reshape(*scores.shape[:2], -1).transpose(2, 0, 1).ravel()
    found, expected = whole[oracle["b.batch_cls_preds@index"]], oracle["b.batch_cls_preds@value"]
    assert np.abs(found - expected).max() / np.abs(expected).max() <= FORWARD_TOLERANCE


def test_detections_are_those_of_openpcdet(case):
    kept = decoded(case.maps, case.detector.config).kept.detections
    theirs, scores, labels = (case.oracle[f"final.pred_{name}"] for name in ("boxes", "scores", "labels"))
    distance = np.linalg.norm(kept.boxes.centre[None] - theirs[:, None, :3], axis=2)
    distance += 1e3 * (kept.labels[None] + 1 != labels[:, None])
    ours = distance.argmin(axis=1)
    near = np.take_along_axis(distance, ours[:, None], axis=1)[:, 0] <= 0.01
    same = near & (np.abs(kept.scores[ours] - scores) <= 1e-4)
    same &= (np.abs(kept.boxes.size[ours] - theirs[:, 3:6]) <= 1e-3 * np.maximum(theirs[:, 3:6], 1)).all(axis=1)
    print(case.name, f"{np.count_nonzero(same)} of {len(theirs)} boxes, {len(kept)} of ours")
    assert len(kept) == len(theirs)
    assert np.count_nonzero(same) >= 0.98 * len(theirs)


def macs_by_part(case):
    pairs, positions = sparse_pair_counts(case.detector, case.coords), dense_positions(case.detector)
    totals = {"3d": 0, "2d": 0, "head": 0}
    for layer in prunable_layers(case.detector):
        taps = pairs.get(layer.name)
        per_tap = layer.weight.numel() // (1 if taps is None else len(taps))
        totals[layer.part] += positions[layer.name] * per_tap if taps is None else int(taps.sum()) * per_tap
    return totals


def test_macs_are_those_of_the_method(case):
    totals = macs_by_part(case)
    print(case.name, totals)
    share = totals["2d"] / sum(totals.values())
    if case.name == "second":
        assert (round(totals["2d"] / 1e9, 2), round(sum(totals.values()) / 1e9, 2)) == (68.34, 80.56)
        assert round(100 * share, 1) == 84.8
    if case.name == "pointpillars":
        # by hand: 14,840 pillars of 32 places, 10 x 64 weights; maps of 248 x 216 cells, 384 x 72 weights in the head
        assert totals["3d"] == 14_840 * 32 * 640
        assert totals["head"] == 248 * 216 * 384 * 72
        halves = (248 * 216, 124 * 108, 62 * 54)
        blocks = (4 * 64 * 64 * 9, 128 * (64 + 5 * 128) * 9, 256 * (128 + 5 * 256) * 9)
        ups = (64 * 128, 128 * 128 * 4, 256 * 128 * 16)
        assert totals["2d"] == sum(cells * (b + u) for cells, b, u in zip(halves, blocks, ups, strict=True))
        assert round(100 * share) == 95
    if case.name == "centerpoint-pillar":
        points = len(case.coords)
        assert totals["3d"] == points * (11 * 32 + 64 * 64)
        # the first map is brought to half its size by a convolution of stride 2
        assert dense_positions(case.detector)["backbone_2d.deblocks.0.0"] == 128 * 128
