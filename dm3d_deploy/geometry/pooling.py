"""Which rows the second stage reads: keypoints, their neighbours, and those of the places in every RoI.

All of it is indices and offsets, by name, so that torch and ONNX Runtime compute features from one geometry:
"keypoints.SOURCE.K.rows" and ".offsets" of the K-th grouping around the keypoints, "rois.SOURCE.K.rows" and ".offsets"
around the places of the RoIs, "keypoints.bev.rows" and ".weights" of the bird's-eye view, its cells row by row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float32, Int64

from dm3d_deploy.config import DetectorConfig, KeypointConfig, PoolSource
from dm3d_deploy.errors import InternalError
from dm3d_deploy.geometry.neighbours import Neighbours, ball_neighbours, voxel_neighbours
from dm3d_deploy.geometry.rois import grid_places, second_stage
from dm3d_deploy.geometry.sampling import farthest_points
from dm3d_deploy.pointcloud import Boxes3D

RAW, KEYPOINTS = "raw_points", "keypoints"
PADDING_Z = {"x_conv2": 1, "x_conv3": 1, "x_conv4": 0}  # of the strided convolution that begins the stage
FARTHEST_CELL = 1e9  # places farther away than this lie in no grid; an int64 holds it

Arrays = dict[str, np.ndarray]


def stage_shape(config: DetectorConfig, stage: str) -> tuple[int, int, int]:
    """The sparse grid of "x_conv1" to "x_conv4"."""
    depth, height, width = config.voxels.grid_zyx
    depth += 1
    for name, padding in PADDING_Z.items():
        if stage < name:
            break
        depth, height, width = (depth + 2 * padding - 3) // 2 + 1, (height - 1) // 2 + 1, (width - 1) // 2 + 1
    return depth, height, width


def site_centres(
    cells: Int64[np.ndarray, "sites 3"], stride: int, config: DetectorConfig
) -> Float32[np.ndarray, "sites 3"]:
    """The middles x, y, z (m) of cells (z, y, x) that are `stride` voxels wide, in float32."""
    size = np.array(config.voxels.voxel_size_m, np.float32) * np.float32(stride)
    low = np.array(config.voxels.point_range_m[:3], np.float32)
    centres: np.ndarray = (cells[:, ::-1].astype(np.float32) + np.float32(0.5)) * size + low
    return centres


def pooled_geometry(
    config: DetectorConfig,
    boxes: Boxes3D,
    sites: Mapping[str, Int64[np.ndarray, "sites 3"]],
    points: Float32[np.ndarray, "points columns"] | None,
) -> Arrays:
    """Everything that the second stage reads of one frame; `sites` are the cells (z, y, x) of the stages it pools.

    Raises FrameError where keypoints are needed and there is no point.
    """
    stage = second_stage(config)
    arrays: Arrays = {}
    places = grid_places(boxes, stage.grid)
    if stage.keypoints is None:
        for source in stage.sources:
            arrays |= _voxel_pool(config, source, sites[source.name], places)
        return arrays
    if points is None:
        raise InternalError(f"{config.name} reads the frame's points, and there are none")
    xyz = np.ascontiguousarray(points[:, :3])
    keypoints = xyz[farthest_points(xyz, stage.keypoints.count)]
    if stage.keypoints.bev_channels:
        arrays |= _bev_cells(config, stage.keypoints, keypoints)
    for source in stage.keypoints.sources:
        searched = xyz if source.name == RAW else site_centres(sites[source.name], source.stride, config)
        arrays |= _named("keypoints", source, ball_neighbours(searched, keypoints, source.groupings))
    for source in stage.sources:
        arrays |= _named("rois", source, ball_neighbours(keypoints, places, source.groupings))
    return arrays


def _named(around: str, source: PoolSource, found: list[Neighbours]) -> Arrays:
    arrays: Arrays = {}
    for index, neighbours in enumerate(found):
        name = f"{around}.{source.name}.{index}"
        arrays |= {f"{name}.rows": neighbours.rows, f"{name}.offsets": neighbours.offsets}
    return arrays


def _voxel_pool(
    config: DetectorConfig, source: PoolSource, cells: Int64[np.ndarray, "sites 3"], places: np.ndarray
) -> Arrays:
    low = np.array(config.voxels.point_range_m[:3], np.float32)
    size = np.array(config.voxels.voxel_size_m, np.float32)
    voxel = (places - low) // size // np.float32(source.stride)
    place_cells = np.clip(voxel, -FARTHEST_CELL, FARTHEST_CELL).astype(np.int64)[:, ::-1]
    centres, shape = site_centres(cells, source.stride, config), stage_shape(config, source.name)
    found = [voxel_neighbours(cells, shape, centres, places, place_cells, one) for one in source.groupings]
    return _named("rois", source, found)


def _bev_cells(config: DetectorConfig, stage: KeypointConfig, keypoints: np.ndarray) -> Arrays:
    """The four cells around each keypoint and their bilinear weights, as OpenPCDet's bilinear_interpolate_torch."""
    _, height, width = config.voxels.grid_zyx
    height, width = height // stage.bev_stride, width // stage.bev_stride
    low, size = np.array(config.voxels.point_range_m[:2], np.float32), config.voxels.voxel_size_m
    x, y = ((keypoints[:, i] - low[i]) / np.float32(size[i]) / np.float32(stage.bev_stride) for i in range(2))
    left, top = (np.floor(axis).astype(np.int64) for axis in (x, y))
    x0, x1 = np.clip(left, 0, width - 1), np.clip(left + 1, 0, width - 1)
    y0, y1 = np.clip(top, 0, height - 1), np.clip(top + 1, 0, height - 1)
    rows = np.stack([y0 * width + x0, y1 * width + x0, y0 * width + x1, y1 * width + x1], axis=1)
    weights = np.stack([(x1 - x) * (y1 - y), (x1 - x) * (y - y0), (x - x0) * (y1 - y), (x - x0) * (y - y0)], axis=1)
    return {"keypoints.bev.rows": rows, "keypoints.bev.weights": weights.astype(np.float32)}


def joined_geometry(frames: Sequence[Arrays], counts: Sequence[Mapping[str, int]]) -> Arrays:
    """The geometry of several frames whose features stand one after the other; `counts`: rows of each frame by source.

    The row behind the last one stays that of the whole.
    """
    if len(frames) == 1:
        return frames[0]
    whole = {}
    for name in frames[0]:
        parts = [frame[name] for frame in frames]
        if name.endswith(".rows"):
            source = name.split(".")[1]
            total, before, shifted = sum(count[source] for count in counts), 0, []
            for part, count in zip(parts, counts, strict=True):
                shifted.append(np.where(part == count[source], total, part + before))
                before += count[source]
            parts = shifted
        whole[name] = np.concatenate(parts)
    return whole
