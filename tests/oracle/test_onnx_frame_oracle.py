"""The exported graphs on a whole frame, against tensors that OpenPCDet's own modules computed."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch

from dm3d_deploy.config import load_config
from dm3d_deploy.models.detector import build_detector
from dm3d_deploy.pointcloud import Voxels
from engines.onnx_runtime import open_session, run_backbone
from exporters.backbone3d import export_backbone3d
from exporters.bev_head import export_bev_head

pytestmark = pytest.mark.data

STAGES = ("conv_input", "conv2", "conv3", "conv4", "conv_out")
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def oracle(shared):
    with np.load(shared / "oracle" / "centerpoint_voxel01_nuscenes.npz") as file:
        return {name: file[name] for name in file.files if not name.startswith("grad.")}


@pytest.fixture(scope="module")
def detector(shared):
    built = build_detector(
        load_config(shared / "data/openpcdet_cfgs/nuscenes_models/cbgs_voxel01_res3d_centerpoint.yaml")
    )
    spec = importlib.util.spec_from_file_location("seeded_weights", shared / "oracle" / "seeded_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.no_grad():
        for name, value in built.state_dict().items():
            value.copy_(torch.from_numpy(np.asarray(module.seeded_array(0, name, tuple(value.shape)))))
    return built


@pytest.fixture(scope="module")
def bev_and_status(oracle, detector, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "backbone3d.onnx"
    graph = export_backbone3d(detector, path, max_voxels=60_000)
    shuffle = np.random.default_rng(0).permutation(60_000)
    voxels = Voxels(
        features=oracle["b.voxel_features"][shuffle],
        coords=oracle["input.voxel_coords"][shuffle].astype(np.int32),
        num_points=oracle["input.voxel_num_points"][shuffle].astype(np.int32),
        found=60_000,
        cutoff_m=math.inf,
    )
    return run_backbone(open_session(path, digest=graph.artifact.digest, threads=1), voxels)


def test_the_bev_map_is_that_of_openpcdet(oracle, bev_and_status):
    bev, status = bev_and_status
    assert status.tolist() == [int(oracle[f"backbone_3d.{stage}@count"]) for stage in STAGES]
    assert list(bev.shape) == oracle["b.spatial_features@shape"].tolist()
    expected, largest = oracle["b.spatial_features@value"], oracle["b.spatial_features@moments"][2]
    found = bev.ravel()[oracle["b.spatial_features@index"]]
    assert np.abs(found - expected).max() <= TOLERANCE * largest
    moments = [bev.mean(dtype=np.float64), bev.std(dtype=np.float64), np.abs(bev).max(), np.linalg.norm(bev)]
    np.testing.assert_allclose(moments, oracle["b.spatial_features@moments"], rtol=1e-5)


@pytest.mark.parametrize(
    ("precision", "kind", "tolerance"), [("fp32", np.float32, TOLERANCE), ("fp16", np.float16, 5e-3)]
)
def test_head_maps_are_those_of_openpcdet(oracle, detector, bev_and_status, tmp_path, precision, kind, tolerance):
    path = tmp_path / "bev_head.onnx"
    graph = export_bev_head(detector, path, precision=precision)
    session = open_session(path, digest=graph.artifact.digest, threads=1)
    outputs = session.run({"bev": bev_and_status[0].astype(kind)})
    assert len(outputs) == 36
    for name, value in outputs.items():
        branch, task = name.rsplit("_", 1)
        key = f"head.dense_head.{task}.{branch}"
        assert list(value.shape) == oracle[f"{key}@shape"].tolist()
        difference = np.abs(value.ravel()[oracle[f"{key}@index"]] - oracle[f"{key}@value"]).max()
        assert difference <= tolerance * oracle[f"{key}@moments"][2], name
