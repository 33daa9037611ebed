"""The deployed pipeline: points -> voxels -> sparse backbone -> BEV and head -> boxes. It imports no torch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from dm3d_deploy.artifacts import Manifest, read_manifest
from dm3d_deploy.config import AnchorHeadConfig, DetectorConfig, load_config
from dm3d_deploy.errors import StaleArtifact, UsageError, nearest
from dm3d_deploy.geometry.anchors import anchor_maps
from dm3d_deploy.geometry.candidates import Located
from dm3d_deploy.geometry.decode import detections_from_maps
from dm3d_deploy.geometry.voxelize import voxelize
from dm3d_deploy.pointcloud import Detections, PointCloud, Voxels
from dm3d_deploy.stages import STAGE_NAMES
from engines.onnx_runtime import OnnxSession, open_session, run_backbone

VARIANTS = ("pruned", "dense")
GRAPHS = {
    "pruned": ("backbone3d", "bev_head", "second_stage"),
    "dense": ("dense_backbone3d", "dense_bev_head", "dense_second_stage"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployedDetector:
    """One variant of a run, its graphs opened after their digests were checked."""

    config: DetectorConfig
    manifest: Manifest
    variant: str
    backbone: OnnxSession
    head: OnnxSession

    def detect(self, points: PointCloud | Float32[np.ndarray, "points columns"]) -> Detections:
        """Detections of one point cloud; a bare array has the model's own columns.

        Raises FrameError for points that the model cannot take.
        """
        cloud = points if isinstance(points, PointCloud) else self.cloud_of(points)
        return self.detect_voxels(self.voxels_of(cloud))

    def detect_voxels(self, voxels: Voxels) -> Detections:
        """Detections of one frame from its voxels."""
        return self.decode(self.maps_from_bev(self.bev_from_voxels(voxels)))

    def outputs_at(
        self, voxels: Voxels, rois: Located | None
    ) -> tuple[np.ndarray, dict[str, np.ndarray], Located | None]:
        """The bird's-eye view and the raw head maps of one frame; without a second stage there are no RoIs."""
        bev = self.bev_from_voxels(voxels)
        return bev, self.maps_from_bev(bev), rois

    def cloud_of(self, points: Float32[np.ndarray, "points columns"]) -> PointCloud:
        """A point cloud from an array whose columns are the model's."""
        columns = self.config.voxels.columns
        if points.ndim != 2 or points.shape[1] != len(columns):
            raise UsageError(
                f"the array has shape {points.shape}; the model takes the columns {', '.join(columns)}.",
                fix="give an N x " + str(len(columns)) + " array, or a PointCloud from read_points",
            )
        return PointCloud(points=np.ascontiguousarray(points, dtype=np.float32), columns=columns)

    def voxels_of(self, cloud: PointCloud) -> Voxels:
        """First stage."""
        return voxelize(cloud, self.config)

    def bev_from_voxels(self, voxels: Voxels) -> np.ndarray:
        """Second stage: the sparse 3D backbone or the point network of pillars, [1, C, H, W]."""
        return run_backbone(self.backbone, voxels)[0]

    def maps_from_bev(self, bev: np.ndarray) -> dict[str, np.ndarray]:
        """Third stage: raw head maps "TASK.BRANCH" or, of an anchor head, "ANCHOR.BRANCH", Float32."""
        outputs = self.head.run({"bev": bev.astype(self.head.inputs["bev"][0], copy=False)})
        if isinstance(self.config.head, AnchorHeadConfig):
            whole = {name: array.astype(np.float32, copy=False) for name, array in outputs.items()}
            return anchor_maps(whole, self.config.head.per_cell)
        return {map_name(name): array.astype(np.float32, copy=False) for name, array in outputs.items()}

    def decode(self, maps: Mapping[str, np.ndarray]) -> Detections:
        """Fourth stage: decoding and rotated NMS."""
        return detections_from_maps(maps, self.config)

    def stages(self) -> dict[str, Callable[[Any], Any]]:
        """The four stages by name, each fed with what the one before gave."""
        return {
            "voxelise": self.voxels_of,
            "3D" if self.config.pillars is None else "pillars": self.bev_from_voxels,
            "BEV + head": self.maps_from_bev,
            "decode + NMS": self.decode,
        }


def map_name(output: str) -> str:
    """What the graph calls "hm_0" is "0.hm" everywhere else."""
    branch, task = output.rsplit("_", 1)
    return f"{task}.{branch}"


def load_run(path: str | os.PathLike[str], *, variant: str = "pruned", threads: int | None = None) -> DeployedDetector:
    """Open a finished run for detection on this machine (ONNX Runtime, CPU).

    Raises UsageError where there is no run, StaleArtifact where a file is not the one that was built.
    """
    root = Path(path)
    if variant not in VARIANTS:
        raise UsageError(f"a run has no variant '{variant}'.", fix=nearest(variant, VARIANTS))
    manifest = read_manifest(root)
    missing = [name for name in STAGE_NAMES[: STAGE_NAMES.index("export") + 1] if manifest.step(name) is None]
    if missing:
        raise StaleArtifact(
            f"{root} has not finished the stage '{missing[0]}': its graphs may be an earlier recipe's.",
            fix="run the build to its end",
        )
    config = load_config(manifest.artifact("model_config").checked(root))
    kinds = GRAPHS[variant] if config.second_stage is not None else GRAPHS[variant][:2]
    graphs = [manifest.artifact(kind) for kind in kinds]
    backbone, head, *second = (open_session(root / a.path, digest=a.digest, threads=threads) for a in graphs)
    if not second:
        return DeployedDetector(config=config, manifest=manifest, variant=variant, backbone=backbone, head=head)
    from dm3d_deploy.detect_two_stage import TwoStageDeployed

    return TwoStageDeployed(
        config=config, manifest=manifest, variant=variant, backbone=backbone, head=head, second=second[0]
    )


def refuted_outputs(root: Path, manifest: Manifest) -> list[str] | None:
    """What the run's parity gate found out of tolerance, "OUTPUT (SIDE)"; None where it was not asked.

    Raises StaleArtifact where its answer is not the one that the build left.
    """
    if manifest.step("verify") is None:
        return None
    rows = json.loads(manifest.artifact("verification").checked(root).read_text(encoding="utf-8"))["parity"]
    return [f"{row['output']} ({row['candidate']})" for row in rows if not row["passed"]]


def detect_timed(detector: DeployedDetector, cloud: PointCloud) -> tuple[Detections, Voxels, float]:
    """Detections with the voxels they came from and the milliseconds they took."""
    started = time.perf_counter()
    voxels = detector.voxels_of(cloud)
    detections = detector.detect_voxels(voxels)
    return detections, voxels, (time.perf_counter() - started) * 1e3
