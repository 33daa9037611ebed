"""Detectors with a second stage, PV-RCNN and Voxel R-CNN: proposals of an anchor head, then a RoI head over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dm3d_deploy.config import DetectorConfig
from dm3d_deploy.errors import InternalError
from dm3d_deploy.geometry.candidates import Located
from dm3d_deploy.geometry.decode import decoded
from dm3d_deploy.geometry.pooling import KEYPOINTS, RAW, joined_geometry, pooled_geometry
from dm3d_deploy.geometry.rois import first_stage, second_maps, second_stage
from dm3d_deploy.models.backbone3d import bev_from_sparse
from dm3d_deploy.models.detector import Detector
from dm3d_deploy.models.outputs import Outputs, Scene
from dm3d_deploy.models.second_stage import PointHead, PVRCNNHead, VoxelRCNNHead, VoxelSetAbstraction
from dm3d_deploy.models.sparse import SparseTensor


class TwoStageDetector(Detector):
    """A detector whose RoI head reads stages of the sparse backbone, and with keypoints the points themselves."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__(config)
        stage = second_stage(config)
        if stage.keypoints is not None:
            self.pfe = VoxelSetAbstraction(stage.keypoints)
            self.point_head = PointHead(stage.keypoints)
        self.roi_head = VoxelRCNNHead(stage) if stage.keypoints is None else PVRCNNHead(stage)

    def outputs(
        self,
        features: Float[Tensor, "rows columns"],
        coords: Int64[Tensor, "rows 4"],
        batch_size: int = 1,
        scenes: Sequence[Scene] = (),
    ) -> Outputs:
        """Both stages; without RoIs in `scenes`, those that the first stage proposes, and no gradient through them."""
        if len(scenes) != batch_size:
            raise InternalError(f"{len(scenes)} scenes for a batch of {batch_size}: two stages need one a frame")
        stages = self.backbone_3d.stages(self._sparse(features, coords, batch_size))
        bev = bev_from_sparse(stages["out"])
        maps = self.bev_to_heads(bev)
        rois = tuple(
            scene.rois if scene.rois is not None else self._proposed(maps, index) for index, scene in enumerate(scenes)
        )
        geometry, sources = self._gathered(stages, bev, scenes, rois)
        if second_stage(self.config).keypoints is not None:
            before, fused = self.pfe(sources, geometry)
            sources[KEYPOINTS] = fused * self.point_head(before)
        cls, reg = self.roi_head(sources, geometry)
        names = second_maps(self.config)
        maps |= {name: value.t()[None, :, None] for name, value in zip(names, (cls, reg), strict=True)}
        return Outputs(bev=bev, maps=maps, rois=rois)

    def _proposed(self, maps: Mapping[str, Tensor], index: int) -> Located:
        own = {name: value[index : index + 1].detach().cpu().numpy() for name, value in maps.items()}
        return decoded(own, first_stage(self.config)).kept

    def _gathered(
        self, stages: Mapping[str, SparseTensor], bev: Tensor, scenes: Sequence[Scene], rois: Sequence[Located]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The geometry of all frames, and the rows that it names."""
        stage, frames, counts = second_stage(self.config), [], []
        read = {name: stages[name] for name in stage.stages_read}
        for index, (scene, found) in enumerate(zip(scenes, rois, strict=True)):
            cells = {name: x.coords[x.coords[:, 0] == index, 1:].cpu().numpy() for name, x in read.items()}
            frames.append(pooled_geometry(self.config, found.detections.boxes, cells, scene.points))
            points = 0 if scene.points is None else len(scene.points)
            keypoints = 0 if stage.keypoints is None else stage.keypoints.count
            own = {RAW: points, KEYPOINTS: keypoints, "bev": bev.shape[2] * bev.shape[3]}
            counts.append({**own, **{name: len(rows) for name, rows in cells.items()}})
        arrays = joined_geometry(frames, counts)
        geometry = {name: torch.from_numpy(array).to(bev.device) for name, array in arrays.items()}
        sources = {name: x.features for name, x in read.items()}
        if stage.keypoints is not None:
            columns = [scene.points[:, 3:] for scene in scenes if scene.points is not None]
            sources[RAW] = torch.from_numpy(np.concatenate(columns)).to(bev.device)
            sources["bev"] = bev.permute(0, 2, 3, 1).flatten(0, 2)
        return geometry, sources


def second_stage_rows(config: DetectorConfig, sites: Mapping[str, int], layers: Sequence[str]) -> dict[str, int]:
    """Multiplied rows of each linear layer of the second stage, by its name, for a full set of RoIs.

    Neighbours that stand for missing ones count: OpenPCDet multiplies them, as it does RoIs that were not proposed.
    """
    stage = second_stage(config)
    places = stage.nms_post * stage.grid**3
    rows: dict[str, int] = {}
    if stage.keypoints is not None:
        count = stage.keypoints.count
        rows |= {"pfe.vsa_point_feature_fusion.": count, "point_head.": count}
        stages = [source.name for source in stage.keypoints.sources if source.name != RAW]
        for source in stage.keypoints.sources:
            scope = "pfe.SA_rawpoints" if source.name == RAW else f"pfe.SA_layers.{stages.index(source.name)}"
            rows |= {f"{scope}.mlps.{k}.": count * one.samples for k, one in enumerate(source.groupings)}
        (fused,) = stage.sources
        rows |= {f"roi_head.roi_grid_pool_layer.mlps.{k}.": places * g.samples for k, g in enumerate(fused.groupings)}
    else:
        for index, source in enumerate(stage.sources):
            scope = f"roi_head.roi_grid_pool_layers.{index}"
            for k, one in enumerate(source.groupings):
                rows |= {f"{scope}.mlps_in.{k}.": sites[source.name], f"{scope}.mlps_out.{k}.": places}
                rows[f"{scope}.mlps_pos.{k}."] = places * one.samples
    return {
        layer: next((count for scope, count in rows.items() if layer.startswith(scope)), stage.nms_post)
        for layer in layers
    }
