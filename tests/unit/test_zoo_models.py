"""The anchor-head and pillar models in small: points, graphs, gradients and decoding against slow twins."""

import dataclasses

import numpy as np
import pytest
import torch
from zoo_sample import VARIANTS, small_cloud_points, variant

from calib.gradients import sketch_gradients
from calib.held_out import model_labels
from calib.simulator.objects import CLASS_NAMES
from dm3d_deploy.artifacts import digest_of_file
from dm3d_deploy.config import load_config
from dm3d_deploy.errors import EngineError, FrameError, UsageError
from dm3d_deploy.geometry.anchors import anchor_maps, anchor_places, cell_anchors
from dm3d_deploy.geometry.center_boxes import EMPTY_LOGIT
from dm3d_deploy.geometry.decode import decoded
from dm3d_deploy.geometry.voxelize import voxelize
from dm3d_deploy.models.detector import build_detector, prunable_layers, sparse_pair_counts, tensors_from_voxels
from dm3d_deploy.models.seeded import seed_weights
from dm3d_deploy.models.sparse import SparseTensor
from dm3d_deploy.models.voxelnext import PointConv2d
from dm3d_deploy.pointcloud import PointCloud
from dm3d_deploy.pruning.contracts import Layer
from dm3d_deploy.pruning.normalisation import output_distortion, output_scale, top_cells
from dm3d_deploy.pruning.patterns import native_from_taps, taps_from_native
from dm3d_deploy.training.loop import check_trainable
from engines.onnx_runtime import open_session, run_backbone
from exporters.backbone3d import export_backbone3d
from exporters.bev_head import export_bev_head
from exporters.graph_checks import check_graph
from exporters.pillars import export_pillars

PILLARS = ("pointpillars", "centerpoint-pillar")
ANCHORS = ("pointpillars", "second")


def cloud_of(config, **settings):
    columns = config.voxels.columns
    return PointCloud(points=small_cloud_points(len(columns), **settings), columns=columns, source="a test")


def built(name):
    detector = build_detector(variant(name))
    seed_weights(detector, 3)
    return detector


def padded_twin(detector, cloud):
    """PillarVFE and DynPillarVFE pillar by pillar with padded rows, as OpenPCDet's code reads."""
    config = detector.config
    pillars, voxels = config.pillars, config.voxels
    low, size = np.array(voxels.point_range_m[:3]), np.array(voxels.voxel_size_m)
    groups = {}
    for point in sorted(cloud.points.tolist()):
        cell = np.floor((np.float32(point[:2]) - np.float32(low[:2])) / np.float32(size[:2])).astype(int)
        inside_z = pillars.dynamic or low[2] <= point[2] < voxels.point_range_m[5]
        if (cell >= 0).all() and cell[0] < voxels.grid_zyx[2] and cell[1] < voxels.grid_zyx[1] and inside_z:
            groups.setdefault((cell[1], cell[0]), []).append(point)
    bev = np.zeros((pillars.filters[-1], *voxels.grid_zyx[1:]), dtype=np.float64)
    for (row, column), points in groups.items():
        kept = np.array(points if pillars.dynamic else points[: voxels.max_points_per_voxel])
        centre = low + size * (np.array([column, row, 0]) + 0.5)
        rows = np.concatenate([kept, kept[:, :3] - kept[:, :3].mean(axis=0), kept[:, :3] - centre], axis=1)
        if not pillars.dynamic:
            rows = np.concatenate([rows, np.zeros((voxels.max_points_per_voxel - len(rows), rows.shape[1]))])
        for index, layer in enumerate(detector.vfe.pfn_layers):
            norm = layer.norm
            scale = norm.weight.detach().numpy() / np.sqrt(norm.running_var.numpy() + norm.eps)
            rows = rows @ layer.linear.weight.detach().numpy().T.astype(np.float64)
            rows = np.maximum((rows - norm.running_mean.numpy()) * scale + norm.bias.detach().numpy(), 0)
            if index + 1 < len(detector.vfe.pfn_layers):
                rows = np.concatenate([rows, np.broadcast_to(rows.max(axis=0), rows.shape)], axis=1)
        bev[:, row, column] = rows.max(axis=0)
    return bev, len(groups)


@pytest.mark.parametrize("name", PILLARS)
def test_pillars_are_those_of_a_padded_pillar_by_pillar_twin(name, tmp_path):
    detector = built(name)
    cloud = cloud_of(detector.config)
    voxels = voxelize(cloud, detector.config)
    expected, pillars = padded_twin(detector, cloud)
    assert (voxels.cells, voxels.found, voxels.dropped) == (pillars, pillars, 0)
    with torch.inference_mode():
        bev = detector.backbone_to_bev(*tensors_from_voxels(voxels)).numpy()
    np.testing.assert_allclose(bev[0], expected, atol=1e-4 * np.abs(expected).max())
    order = np.random.default_rng(1).permutation(len(cloud.points))
    again = voxelize(dataclasses.replace(cloud, points=cloud.points[order]), detector.config)
    assert np.array_equal(again.features, voxels.features)
    assert np.array_equal(again.coords, voxels.coords)

    export_pillars(detector, tmp_path / "pillars.onnx")
    check_graph(tmp_path / "pillars.onnx")
    session = open_session(tmp_path / "pillars.onnx", digest=digest_of_file(tmp_path / "pillars.onnx"), threads=1)
    found, status = run_backbone(session, voxels)
    assert status.tolist() == [pillars]
    np.testing.assert_allclose(found, bev, atol=1e-5 * np.abs(bev).max())


def test_padded_places_count_in_training_as_in_openpcdet():
    detector = built("pointpillars")
    features, coords = tensors_from_voxels(voxelize(cloud_of(detector.config), detector.config))
    layer = detector.vfe.pfn_layers[0]
    with torch.no_grad():
        hidden = features.double() @ layer.linear.weight.double().T
        places = 4 * len(torch.unique(coords, dim=0))
        mean = hidden.sum(dim=0) / places
        variance = ((hidden**2).sum(dim=0) - places * mean**2) / (places - 1)
        layer.norm.momentum = 1.0
        layer.norm.train()
        detector.backbone_to_bev(features, coords)
    np.testing.assert_allclose(layer.norm.running_mean, mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(layer.norm.running_var, variance, rtol=1e-3)
    rows = sparse_pair_counts(detector, coords)["vfe.pfn_layers.0.linear"]
    assert rows.tolist() == [places]


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "voxelnext"])  # see test_voxelnext_line
def test_graphs_compute_what_torch_computes(name, tmp_path):
    detector = built(name)
    config = detector.config
    voxels = voxelize(cloud_of(config), config)
    features, coords = tensors_from_voxels(voxels)
    with torch.inference_mode():
        bev = detector.backbone_to_bev(features, coords)
        maps = {key: value.numpy() for key, value in detector.bev_to_heads(bev).items()}
    if detector.over_pillars:
        export_pillars(detector, tmp_path / "to_bev.onnx")
    else:
        export_backbone3d(detector, tmp_path / "to_bev.onnx", max_voxels=config.voxels.max_voxels)
    export_bev_head(detector, tmp_path / "head.onnx", precision="fp32")
    sessions = [
        open_session(tmp_path / file, digest=digest_of_file(tmp_path / file), threads=1)
        for file in ("to_bev.onnx", "head.onnx")
    ]
    found, _ = run_backbone(sessions[0], voxels)
    np.testing.assert_allclose(found, bev.numpy(), atol=1e-4 * float(bev.abs().max()))
    outputs = sessions[1].run({"bev": found})
    if "cls" in outputs:
        outputs = anchor_maps(outputs, config.head.per_cell)
    else:
        outputs = {".".join(key.rsplit("_", 1)[::-1]): value for key, value in outputs.items()}
    assert outputs.keys() == maps.keys()
    for key, value in maps.items():
        np.testing.assert_allclose(outputs[key], value, atol=1e-3 * max(np.abs(value).max(), 1e-3), err_msg=key)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_reach_every_layer(name):
    detector = built(name)
    features, coords = tensors_from_voxels(voxelize(cloud_of(detector.config), detector.config))
    with torch.inference_mode():
        maps = {key: value.numpy() for key, value in detector(features, coords).items()}
    scale = output_scale([maps], 100_000)
    assert output_distortion(maps, maps, scale, top_cells(maps, 100_000)) == 0
    names = [layer.name for layer in prunable_layers(detector) if not layer.final]
    settings = {"layers": names, "scale": scale.as_json(), "sketches": 2, "seed": 0, "lambda_box": 1, "lambda_score": 1}
    rows = sketch_gradients(detector, features, coords, 0, settings)
    assert all(np.isfinite(row).all() and np.abs(row).max() > 0 for row in rows.values()), name
    assert {name: rows[name].shape[0] for name in names} == dict.fromkeys(names, 2)


def test_a_sparse_head_speaks_at_active_cells_alone_and_is_not_trained_here():
    detector = built("voxelnext")
    features, coords = tensors_from_voxels(voxelize(cloud_of(detector.config), detector.config))
    with torch.inference_mode():
        bev = detector.backbone_to_bev(features, coords)
        maps = {key: value.numpy() for key, value in detector.bev_to_heads(bev).items()}
    active = bev[0, -1].numpy() > 0
    assert 0 < np.count_nonzero(active) < active.size
    assert sparse_pair_counts(detector, coords)["dense_head.heads_list.0.hm.1"].tolist() == [np.count_nonzero(active)]
    for key, value in maps.items():
        assert (value[0, :, ~active] == (EMPTY_LOGIT if key.endswith("hm") else 0)).all()
    config = detector.config
    everything = dataclasses.replace(
        config, post=dataclasses.replace(config.post, score_threshold=0.0, max_objects=100_000)
    )
    for located in decoded(maps, everything).before_nms:
        assert active.ravel()[located.cells].all()
    with pytest.raises(UsageError, match="small-voxelnext has a sparse head, and no targets are made here"):
        check_trainable(config)


def test_a_pointwise_weight_is_a_matrix_of_inputs_by_outputs():
    """spconv 2 reads the memory of [Cout, 1, 1, Cin] as [Cin, Cout]: https://github.com/traveller59/spconv/issues/450"""
    conv = PointConv2d(3, 2)
    weight = torch.arange(6.0).reshape(2, 1, 1, 3)
    conv.load_state_dict({"weight": weight, "bias": torch.tensor([10.0, 20.0])})
    cells = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]])
    x = SparseTensor(torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]), cells, (1, 2, 2), 1)
    with torch.no_grad():
        assert conv(x).features.tolist() == [[10.0, 21.0], [14.0, 25.0]]
    layer = Layer(name="p", part="head", kind="sparse", shape=(2, 1, 1, 3), positions=np.array([5.0]))
    taps = taps_from_native(layer, weight.numpy())
    assert taps.tolist() == [[[0, 1], [2, 3], [4, 5]]]
    assert np.array_equal(native_from_taps(layer, taps), weight.numpy())


def maps_of(config, rng):
    rows, columns = (cells // config.head.stride for cells in config.voxels.grid_zyx[1:])
    per_cell, classes = config.head.per_cell, len(config.class_names)
    widths = {"cls": classes, "box": 7, "dir": 2}
    whole = {
        key: (0.3 * rng.normal(size=(1, width * per_cell, rows, columns))).astype(np.float32)
        for key, width in widths.items()
    }
    return anchor_maps(whole, per_cell)


@pytest.mark.parametrize("multi_class", [False, True])
def test_anchors_are_decoded_as_a_loop_over_them_does_it(multi_class):
    config = variant("second")
    config = dataclasses.replace(
        config, post=dataclasses.replace(config.post, multi_class=multi_class, score_threshold=0.5, nms_pre=60)
    )
    maps = maps_of(config, np.random.default_rng(0))
    x, y = anchor_places(config, config.head)
    cell = cell_anchors(config.head)
    candidates = []
    for row in range(y.shape[1]):
        for column in range(x.shape[1]):
            for anchor in range(config.head.per_cell):
                logits = maps[f"{anchor}.cls"][0, :, row, column].astype(float)
                scores = (1 / (1 + np.exp(-logits))).astype(np.float32)
                labels = range(3) if multi_class else [int(scores.argmax())]
                index = (row * x.shape[1] + column) * config.head.per_cell + anchor
                t = maps[f"{anchor}.box"][0, :, row, column].astype(float)
                z, length, width, height, turn = cell[anchor]
                diagonal = np.hypot(length, width)
                yaw = t[6] + turn - 0.78539
                yaw = yaw - np.floor(yaw / np.pi) * np.pi + 0.78539
                yaw += np.pi * (maps[f"{anchor}.dir"][0, 1, row, column] > maps[f"{anchor}.dir"][0, 0, row, column])
                box = (
                    t[0] * diagonal + x[anchor, column], t[1] * diagonal + y[anchor, row], t[2] * height + z,
                    *np.exp(t[3:6]) * (length, width, height), yaw,
                )  # fmt: skip
                candidates += [(k, -scores[k], index, box) for k in labels if scores[k] >= np.float32(0.5)]
    groups = [[c for c in candidates if c[0] == k] for k in range(3)] if multi_class else [candidates]
    result = decoded(maps, config)
    assert len(result.before_nms) == len(groups)
    for found, cut, group in zip(result.before_nms, result.cut_scores, groups, strict=True):
        wanted = sorted(group, key=lambda c: c[1:3])[:60]
        assert found.cells.tolist() == [c[2] for c in wanted]
        assert found.detections.labels.tolist() == [c[0] for c in wanted]
        assert cut == pytest.approx(-wanted[-1][1])
        boxes = found.detections.boxes
        rows = np.column_stack([boxes.centre, boxes.size, boxes.yaw])
        np.testing.assert_allclose(rows, np.array([c[3] for c in wanted]), rtol=1e-5, atol=1e-5)
        assert found.by_class == multi_class
    assert (np.diff(result.kept.detections.scores) <= 0).all()


def test_equal_scores_go_by_row_column_and_anchor():
    config = variant("second")
    config = dataclasses.replace(config, post=dataclasses.replace(config.post, nms_pre=10, score_threshold=0.0))
    maps = {key: np.zeros_like(value) for key, value in maps_of(config, np.random.default_rng(0)).items()}
    result = decoded(maps, config)
    assert result.before_nms[0].cells.tolist() == list(range(10))
    assert (result.before_nms[0].detections.labels == 0).all()
    assert result.cut_scores == (0.5,)


def test_maps_that_do_not_fit_are_refused():
    config = variant("second")
    maps = maps_of(config, np.random.default_rng(0))
    with pytest.raises(EngineError, match=r"the output '1.dir' of the detection head is missing; there are 17 outputs"):
        decoded({key: value for key, value in maps.items() if key != "1.dir"}, config)
    with pytest.raises(EngineError, match=r"the output '0.cls' has \[8, 16\] cells, and the anchors stand on"):
        decoded({key: value[:, :, ::2] for key, value in maps.items()}, config)
    with pytest.raises(EngineError, match=r"the output '0.cls' has the shape \[1, 2, 16, 16\]"):
        decoded({**maps, "0.cls": maps["0.cls"][:, :2]}, config)


def test_a_pillar_frame_beyond_its_range_is_refused():
    config = variant("pointpillars")
    cloud = cloud_of(config)
    with pytest.raises(FrameError, match="3000 points and none inside"):
        voxelize(dataclasses.replace(cloud, points=cloud.points + np.float32(100)), config)


def test_the_cap_on_pillars_drops_the_farthest():
    config = variant("pointpillars")
    config = dataclasses.replace(config, voxels=dataclasses.replace(config.voxels, max_voxels=50))
    voxels = voxelize(cloud_of(config), config)
    assert voxels.cells == 50
    assert voxels.dropped == voxels.found - 50 > 0
    centres = np.array([0.0, -6.4]) + 0.2 * (voxels.coords[:, [3, 2]] + 0.5)
    assert np.hypot(*centres.T).max() <= voxels.cutoff_m
    starts = np.flatnonzero(np.r_[True, (np.diff(voxels.coords, axis=0) != 0).any(axis=1)])
    assert np.array_equal(np.diff(np.r_[starts, len(voxels.coords)]), voxels.num_points[starts])


def test_simulated_objects_carry_the_words_of_the_models_data_set():
    kitti = dict(zip(CLASS_NAMES, model_labels(load_config("second")).tolist(), strict=True))
    assert {name: label for name, label in kitti.items() if label >= 0} == {"car": 0, "pedestrian": 1, "bicycle": 2}
    once = dict(zip(CLASS_NAMES, model_labels(load_config("second-once")).tolist(), strict=True))
    assert {name: label for name, label in once.items() if label >= 0} == {
        "car": 0, "bus": 1, "truck": 2, "pedestrian": 3, "bicycle": 4, "motorcycle": 4,
    }  # fmt: skip
