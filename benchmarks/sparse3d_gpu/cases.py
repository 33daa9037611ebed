"""Detectors, frames and plans that the checks and the measurements share."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from dm3d_deploy.config import load_config
from dm3d_deploy.geometry.voxelize import voxelize
from dm3d_deploy.models.backbone3d import ConvNormReLU, SparseBasicBlock
from dm3d_deploy.models.detector import Detector, build_detector
from dm3d_deploy.models.seeded import seed_weights
from dm3d_deploy.models.sparse import SparseConvolution, SparseTensor, cell_keys
from dm3d_deploy.pointcloud import PointCloud, Voxels
from dm3d_deploy.pruning.patterns import tile_size
from engines.sparse3d.entry import Frame, frame_from_config
from engines.sparse3d.onnx_reader import ENTRY, Backbone, read_backbone
from engines.sparse3d.plan import Plan
from engines.sparse3d.planner import plan_backbone
from engines.sparse3d.shapes import DEVICE, KernelShapes
from engines.sparse3d.sites import FrameStatistics, capacities_from, frame_statistics
from exporters.backbone3d import export_backbone3d

Precision = Literal["fp16", "fp32"]
Feed = dict[str, np.ndarray]
TOLERANCE: Mapping[Precision, float] = {"fp32": 1e-5, "fp16": 2e-3}
MARGIN = 1.2


def detector_with(model: str | Path, kept: float) -> Detector:
    """A detector with seeded weights; a share of every layer's tiles is kept, drawn at random."""
    detector = build_detector(load_config(model))
    seed_weights(detector, 0)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for module in detector.backbone_3d.modules():
            if isinstance(module, SparseConvolution):
                cout, *kernel, cin = module.weight.shape
                rows, columns = tile_size(cin, cout)
                keep = rng.random((-(-cout // columns), *kernel, -(-cin // rows))) < kept
                wide = np.repeat(np.repeat(keep, columns, axis=0)[:cout], rows, axis=-1)[..., :cin]
                module.weight *= torch.from_numpy(wide)
    return detector.eval()


def nearest(cloud: PointCloud, most: int) -> PointCloud:
    """The `most` points nearest to the sensor, in their order: a small frame that has neighbours."""
    ranges = np.hypot(cloud.column("x"), cloud.column("y"))
    return replace(cloud, points=cloud.points[np.sort(np.argsort(ranges, kind="stable")[:most])])


@dataclass(frozen=True, kw_only=True)
class Case:
    """One detector and one frame; `kept` is the share of tiles."""

    model: str | Path
    kept: float
    cloud: PointCloud

    @cached_property
    def detector(self) -> Detector:
        return detector_with(self.model, self.kept)

    @cached_property
    def backbone(self) -> Backbone:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "backbone3d.onnx"
            export_backbone3d(self.detector, path, max_voxels=self.detector.config.voxels.max_voxels)
            return read_backbone(path)

    def voxels(self, *, points: bool) -> Voxels:
        """The frame's cells; a plan from points averages all points of a cell."""
        config = self.detector.config.voxels
        return voxelize(self.cloud, replace(config, max_points_per_voxel=len(self.cloud.points)) if points else config)

    @cached_property
    def statistics(self) -> FrameStatistics:
        cells = self.voxels(points=False).coords
        return frame_statistics(self.backbone, cells, conv_rows=DEVICE.conv_rows, points=len(self.cloud.points))

    def frame(self, *, points: bool) -> Frame:
        """What the plan starts at: the model's cap on voxels, or this frame's points."""
        config = self.detector.config.voxels
        return frame_from_config(config, rows=len(self.cloud.points) if points else config.max_voxels, points=points)

    def plan(
        self,
        precision: Precision,
        *,
        points: bool = False,
        keep: Callable[[Backbone, Frame, int], list[str]] | None = None,
        room: int | None = None,
        shapes: KernelShapes = DEVICE,
    ) -> Plan:
        """The neutral plan for this frame; `room` is the rows of the first stage.

        With `keep` its arrays stay, and each stage gives its last layer's rows out as for a second stage.
        """
        most = self.detector.config.voxels.max_voxels
        capacities = capacities_from([self.statistics], margin=MARGIN, max_voxels=most)
        capacities[ENTRY] = room or capacities[ENTRY]
        frame = self.frame(points=points)
        given = {layer.stage_out: layer.name for layer in self.backbone.layers}
        return plan_backbone(
            replace(self.backbone, given=given) if keep else self.backbone,
            frame=frame, capacities=capacities, precision=precision, shapes=shapes,
            keep=keep(self.backbone, frame, capacities[ENTRY]) if keep else (),
            calibration=[self.statistics], count_tiles=keep is not None,
        )  # fmt: skip

    def feed(self, *, points: bool) -> Feed:
        """The plan's inputs, and nonsense behind the last row."""
        if points:
            return point_feed(self.cloud, self.detector.config.voxels.columns)
        return voxel_feed(self.voxels(points=False), self.detector.config.voxels.max_voxels)


def voxel_feed(voxels: Voxels, rows: int) -> Feed:
    """Features, coords and count; what lies behind the count must never be read."""
    count = len(voxels.coords)
    features = np.full((rows, voxels.features.shape[1]), np.nan, np.float32)
    coords = np.full((rows, 4), 2**30, np.int32)
    features[:count], coords[:count] = voxels.features, voxels.coords
    return {"features": features, "coords": coords, "count": np.array([count], np.int32)}


def point_feed(cloud: PointCloud, columns: tuple[str, ...]) -> Feed:
    """Points and count; a column that the cloud lacks is zero."""
    nothing = np.zeros(len(cloud.points), np.float32)
    values = np.stack([cloud.column(name) if name in cloud.columns else nothing for name in columns], axis=1)
    return {"points": values.astype(np.float32), "count": np.array([len(values)], np.int32)}


def shuffled(feed: Feed, seed: int) -> Feed:
    """The same frame with its rows in another order."""
    count = int(feed["count"][0])
    order = np.random.default_rng(seed).permutation(count)
    mixed = {name: array.copy() for name, array in feed.items()}
    for name, array in mixed.items():
        if name != "count":
            array[:count] = feed[name][order]
    return mixed


def stages_in_torch(detector: Detector, voxels: Voxels, device: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By the name of the layer that ends each module: sorted keys of its sites, and its features there, in fp32."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    hooks = []

    def recorder(name: str) -> Callable[..., None]:
        def record(module: object, given: object, output: SparseTensor) -> None:
            keys, order = torch.sort(cell_keys(output.coords, output.shape_zyx))
            found[name] = (keys.cpu().numpy(), output.features[order].cpu().numpy())

        return record

    for name, module in detector.backbone_3d.named_modules():
        if isinstance(module, (ConvNormReLU, SparseBasicBlock)):
            end = "0" if isinstance(module, ConvNormReLU) else "conv2"
            hooks.append(module.register_forward_hook(recorder(f"{name}.{end}")))
    features, coords = torch.from_numpy(voxels.features), torch.from_numpy(voxels.coords.astype(np.int64))
    with torch.no_grad():
        backbone = detector.backbone_3d.to(device)
        backbone(SparseTensor(features.to(device), coords.to(device), backbone.shape_zyx, 1))
    detector.backbone_3d.to("cpu")
    for hook in hooks:
        hook.remove()
    return found
