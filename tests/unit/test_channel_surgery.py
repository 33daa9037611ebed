"""Channels and blocks that are removed for good: the smaller detector is the masked one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from models_sample import small_config, small_scene
from zoo_sample import small_cloud_points, variant

from dm3d_deploy.config import load_config
from dm3d_deploy.errors import CheckpointError, InternalError
from dm3d_deploy.geometry.voxelize import voxelize
from dm3d_deploy.models.checkpoints import read_tensors, save_weights
from dm3d_deploy.models.detector import build_detector, prunable_layers, sparse_pair_counts, tensors_from_voxels
from dm3d_deploy.models.seeded import seed_weights
from dm3d_deploy.models.surgery import detector_of_weights, smaller_detector
from dm3d_deploy.pointcloud import PointCloud
from dm3d_deploy.pruning.channels import channel_mask
from dm3d_deploy.pruning.groups import channel_groups, kept_sides
from dm3d_deploy.steps.layers import layers_of
from engines.onnx_runtime import open_session
from exporters.backbone3d import export_backbone3d
from exporters.bev_head import export_bev_head


def seeded(config):
    detector = build_detector(config)
    seed_weights(detector, 0)
    return detector


def layers_and_groups(detector, coords):
    counts = sparse_pair_counts(detector, coords)
    layers = layers_of(detector, [counts])
    return layers, channel_groups(layers)


def random_keep(groups, seed):
    rng = np.random.default_rng(seed)
    keep = {}
    for group in groups:
        if rng.random() < 0.7:
            kept = rng.random(group.channels) < rng.uniform(0.2, 1)
            kept[rng.integers(group.channels)] = True
            keep[group.name] = kept
    return keep


def masked(detector, layers, groups, keep, dropped=()):
    """The detector whose weights of channels that go are zero, and whose dropped blocks add nothing."""
    copied = build_detector(detector.config)
    copied.load_state_dict(detector.state_dict())
    found = {layer.name: layer for layer in prunable_layers(copied)}
    with torch.no_grad():
        for layer in layers:
            found[layer.name].weight.mul_(torch.from_numpy(channel_mask(layer, groups, keep)))
        for block in dropped:
            copied.get_submodule(block).bn2.weight.zero_()
            copied.get_submodule(block).bn2.bias.zero_()
    return copied


def small(detector, layers, groups, keep, dropped=()):
    sides = {layer.name: kept_sides(layer, groups, keep) for layer in layers}
    return smaller_detector(detector, sides, dropped)


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-5 * max(1.0, float(value.abs().max())), name


def test_stages_that_are_added_up_stay_whole_and_pointwise_layers_lose_channels():
    config = variant("voxelnext")
    detector = seeded(config)
    cloud = PointCloud(points=small_cloud_points(5), columns=config.voxels.columns)
    features, coords = tensors_from_voxels(voxelize(cloud, config))
    layers, groups = layers_and_groups(detector, coords)
    written = {slot.layer for group in groups for slot in group.written}
    ends = [f"backbone_3d.{stage}.{end}" for stage in ("conv4", "conv5", "conv6") for end in ("0.0", "1.conv2")]
    assert not written & set(ends)
    assert {"backbone_3d.conv_out.0", "backbone_3d.conv6.1.conv1", "dense_head.heads_list.5.hm.0.0"} <= written
    keep = random_keep(groups, 0)
    smaller = small(detector, layers, groups, keep)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in detector.parameters())
    with torch.no_grad():
        assert_equal(smaller(features, coords), masked(detector, layers, groups, keep)(features, coords))


@pytest.mark.parametrize("seed", range(8))
def test_the_smaller_detector_is_the_masked_one(seed):
    detector = seeded(small_config())
    features, coords = small_scene(seed=seed)
    layers, groups = layers_and_groups(detector, coords)
    keep = random_keep(groups, seed)
    blocks = [name for name, module in detector.named_modules() if hasattr(module, "bn2")]
    dropped = [block for i, block in enumerate(blocks) if (seed + i) % 3 == 0]
    less = small(detector, layers, groups, keep, dropped)
    with torch.no_grad():
        assert_equal(less(features, coords), masked(detector, layers, groups, keep, dropped)(features, coords))
    kept = sum(parameter.numel() for parameter in less.parameters())
    assert kept < sum(parameter.numel() for parameter in detector.parameters())


def test_the_slim_model_too():
    detector = build_detector(load_config("centerpoint-slim"))
    seed_weights(detector, 0)
    rng = np.random.default_rng(0)
    cells = rng.choice(41 * 200 * 200, size=400, replace=False)
    z, y, x = np.unravel_index(np.sort(cells), (41, 200, 200))
    coords = torch.from_numpy(np.stack([np.zeros_like(z), z, y, x], axis=1).astype(np.int64))
    features = torch.from_numpy(rng.uniform(-3, 3, (400, 5)).astype(np.float32))
    layers, groups = layers_and_groups(detector, coords)
    keep = random_keep(groups, 3)
    with torch.no_grad():
        found = small(detector, layers, groups, keep)(features, coords)
        assert_equal(found, masked(detector, layers, groups, keep)(features, coords))


def test_it_is_saved_loaded_and_exported(tmp_path):
    detector = seeded(small_config())
    features, coords = small_scene()
    layers, groups = layers_and_groups(detector, coords)
    block = "backbone_3d.conv3.1"
    less = small(detector, layers, groups, random_keep(groups, 1), (block,))
    save_weights(less, tmp_path / "less.safetensors")
    loaded = detector_of_weights(detector.config, read_tensors(tmp_path / "less.safetensors"))
    with torch.no_grad():
        expected = less(features, coords)
        assert_equal(loaded(features, coords), expected)
        bev = loaded.backbone_to_bev(features, coords)
    head = export_bev_head(loaded, tmp_path / "head.onnx", precision="fp32")
    whole = export_bev_head(detector, tmp_path / "whole.onnx", precision="fp32")
    assert head.artifact.bytes < whole.artifact.bytes
    outputs = open_session(tmp_path / "head.onnx", digest=head.artifact.digest, threads=1).run({"bev": bev.numpy()})
    found = {key: torch.from_numpy(outputs["{1}_{0}".format(*key.split("."))]) for key in expected}
    assert_equal(found, expected)
    graph = export_backbone3d(loaded, tmp_path / "3d.onnx", max_voxels=2000)
    padded = np.zeros((2000, 4), np.float32)
    padded[: len(features)] = features.numpy()
    cells = np.zeros((2000, 4), np.int32)
    cells[: len(coords)] = coords.numpy()
    count = np.array([len(coords)], np.int32)
    session = open_session(tmp_path / "3d.onnx", digest=graph.artifact.digest, threads=1)
    made = session.run({"features": padded, "coords": cells, "count": count})["bev"]
    assert np.abs(made - bev.numpy()).max() <= 1e-4 * float(bev.abs().max())


def test_weights_of_another_model_are_refused():
    detector = seeded(small_config())
    state = dict(detector.state_dict())
    del state["dense_head.shared_conv.0.weight"]
    with pytest.raises(CheckpointError, match=r"make no smaller small.*shared_conv\.0\.weight") as caught:
        detector_of_weights(detector.config, state)
    assert caught.value.fix == "give the weights and the YAML of one run"


def test_groups_follow_the_network():
    detector = seeded(small_config())
    layers, groups = layers_and_groups(detector, small_scene()[1])
    by_name = {group.name: group for group in groups}
    stage = by_name["backbone_3d.conv2.0.0"]
    assert [slot.layer for slot in stage.written] == [
        f"backbone_3d.conv2.{end}" for end in ("0.0", "1.conv2", "2.conv2")
    ]
    assert [slot.layer for slot in stage.read] == [
        f"backbone_3d.{end}" for end in ("conv2.1.conv1", "conv2.2.conv1", "conv3.0.0")
    ]
    (flat,) = by_name["backbone_3d.conv_out.0"].read
    assert (flat.layer, flat.repeat) == ("backbone_2d.blocks.0.1", 2)
    (second,) = by_name["backbone_2d.deblocks.1.0"].read
    assert (second.layer, second.offset) == ("dense_head.shared_conv.0", 8)
    assert len(by_name["dense_head.shared_conv.0"].read) == 10
    assert by_name["backbone_3d.conv2.1.conv1"].block == "backbone_3d.conv2.1"
    finals = {layer.name for layer in layers if layer.final}
    assert not finals & {slot.layer for group in groups for slot in group.written}


def test_layers_that_do_not_fit_together_are_refused():
    layers, _ = layers_and_groups(seeded(small_config()), small_scene()[1])
    index = next(i for i, layer in enumerate(layers) if layer.name == "backbone_3d.conv3.0.0")
    wrong = replace(layers[index], shape=(8, 3, 3, 3, 7))
    with pytest.raises(InternalError, match=r"backbone_3d\.conv3\.0\.0 reads 7 channels, its sources write 6"):
        channel_groups([*layers[:index], wrong, *layers[index + 1 :]])
