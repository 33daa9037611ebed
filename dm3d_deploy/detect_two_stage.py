"""The deployed pipeline of a detector with two stages: what lies between its three graphs is numpy. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float32

from dm3d_deploy.detect import DeployedDetector
from dm3d_deploy.geometry.candidates import Located
from dm3d_deploy.geometry.decode import decoded, detections_from_maps
from dm3d_deploy.geometry.pooling import RAW, pooled_geometry
from dm3d_deploy.geometry.rois import CLS, REG, first_stage, second_maps, second_stage
from dm3d_deploy.pointcloud import Detections, Voxels
from engines.onnx_runtime import OnnxSession, run_backbone_stages

Arrays = dict[str, np.ndarray]
GEOMETRY = "proposals + pooling geometry (numpy)"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Frame:
    """What the stages hand on: the backbone's outputs, the head's maps, the RoIs, and the second stage's inputs."""

    backbone: Arrays
    points: Float32[np.ndarray, "points columns"] | None
    maps: Arrays
    rois: Located | None = None
    inputs: Arrays | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoStageDeployed(DeployedDetector):
    """One variant of a run with `second`, the graph of its RoI head."""

    second: OnnxSession

    def detect_voxels(self, voxels: Voxels) -> Detections:
        """Detections of one frame from its voxels, and from its points if keypoints are drawn from them."""
        value: Any = voxels
        for stage in list(self.stages().values())[1:]:
            value = stage(value)
        found: Detections = value
        return found

    def outputs_at(self, voxels: Voxels, rois: Located | None) -> tuple[np.ndarray, Arrays, Located | None]:
        """The bird's-eye view, the maps of both stages, and the RoIs: the given ones, else the proposed."""
        frame = self._with_maps(self._with_backbone(voxels))
        frame = self._with_maps_of_rois(self._with_inputs(replace(frame, rois=rois) if rois is not None else frame))
        return frame.backbone["bev"], frame.maps, frame.rois

    def stages(self) -> dict[str, Callable[[Any], Any]]:
        """The stages by name, each fed with what the one before gave."""
        return {
            "voxelise": self.voxels_of,
            "3D": self._with_backbone,
            "BEV + head": self._with_maps,
            GEOMETRY: self._with_inputs,
            "RoI head": self._with_maps_of_rois,
            "decode + NMS": lambda frame: detections_from_maps(frame.maps, self.config, frame.rois),
        }

    def _with_backbone(self, voxels: Voxels) -> Frame:
        return Frame(backbone=run_backbone_stages(self.backbone, voxels), points=voxels.points, maps={})

    def _with_maps(self, frame: Frame) -> Frame:
        return replace(frame, maps=self.maps_from_bev(frame.backbone["bev"]))

    def _with_inputs(self, frame: Frame) -> Frame:
        """Proposals, if no RoIs are there, and which rows the second stage reads."""
        rois = frame.rois if frame.rois is not None else decoded(frame.maps, first_stage(self.config)).kept
        stage = second_stage(self.config)
        sites = {name: frame.backbone[f"sites.{name}"].T for name in stage.stages_read}
        inputs = pooled_geometry(self.config, rois.detections.boxes, sites, frame.points)
        inputs |= {f"features.{name}": frame.backbone[f"features.{name}"] for name in stage.stages_read}
        if frame.points is not None:
            inputs |= {RAW: np.ascontiguousarray(frame.points[:, 3:]), "bev": frame.backbone["bev"]}
        wanted = {name: inputs[name] for name in self.second.inputs}
        return replace(frame, rois=rois, inputs=wanted)

    def _with_maps_of_rois(self, frame: Frame) -> Frame:
        found = self.second.run(frame.inputs or {})
        names = zip(second_maps(self.config), (CLS, REG), strict=True)
        return replace(frame, maps={**frame.maps, **{name: found[ours].T[None, :, None] for name, ours in names}})
