"""Regions of interest: the proposals of the first stage, places in them, and the boxes that the second stage says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from jaxtyping import Float32, Float64

from dm3d_deploy.config import AnchorPostConfig, DetectorConfig, SecondStageConfig
from dm3d_deploy.errors import InternalError
from dm3d_deploy.geometry.anchors import BOX_CHANNELS, boxes_from_residuals
from dm3d_deploy.geometry.candidates import Located, checked, scores_from_logits, sizes_from_logarithms
from dm3d_deploy.geometry.nms import order_by_score
from dm3d_deploy.pointcloud import Boxes3D, Detections

CLS, REG = "rcnn_cls", "rcnn_reg"
COLUMNS = 10


def second_stage(config: DetectorConfig) -> SecondStageConfig:
    """The second stage of a detector that has one."""
    if config.second_stage is None:
        raise InternalError(f"{config.name} has no second stage")
    return config.second_stage


def first_stage(config: DetectorConfig) -> DetectorConfig:
    """The detector whose detections are the proposals of this one: every score counts, all classes suppress."""
    stage = second_stage(config)
    post = AnchorPostConfig(
        score_threshold=0.0,
        multi_class=False,
        nms_threshold=stage.nms_threshold,
        nms_pre=stage.nms_pre,
        nms_post=stage.nms_post,
    )
    return replace(config, second_stage=None, post=post)


def second_maps(config: DetectorConfig) -> tuple[str, str]:
    """The names of the second stage's outputs: they count as one task more than a cell has anchors."""
    head = first_stage(config).head
    task = getattr(head, "per_cell", None)
    if task is None:
        raise InternalError(f"{config.name} proposes without anchors")
    return f"{task}.{CLS}", f"{task}.{REG}"


def array_from_rois(rois: Located) -> Float64[np.ndarray, "rois 10"]:
    """Centre, size (m), yaw (rad), score, label and anchor, one row a RoI; numbers survive the way there and back."""
    found = rois.detections
    columns = (found.boxes.centre, found.boxes.size, found.boxes.yaw[:, None], found.scores[:, None])
    whole = (*columns, found.labels[:, None], rois.cells[:, None])
    table: np.ndarray = np.concatenate(whole, axis=1, dtype=np.float64)
    return table


def rois_from_array(table: Float64[np.ndarray, "rois 10"], config: DetectorConfig) -> Located:
    """The inverse of `array_from_rois`."""
    boxes = Boxes3D(
        centre=table[:, :3].astype(np.float32),
        size=table[:, 3:6].astype(np.float32),
        yaw=table[:, 6].astype(np.float32),
        velocity=np.zeros((len(table), 2), np.float32),
    )
    found = Detections(
        boxes=boxes,
        scores=table[:, 7].astype(np.float32),
        labels=table[:, 8].astype(np.int64),
        class_names=config.class_names,
    )
    headings = np.ones(len(table), np.float32)
    return Located(detections=found, cells=table[:, 9].astype(np.int64), headings=headings, by_class=False)


def grid_places(boxes: Boxes3D, size: int) -> Float32[np.ndarray, "places 3"]:
    """The middles of size^3 equal parts of each box, x slowest and z fastest (m): OpenPCDet's grid points of a RoI."""
    index = np.indices((size, size, size)).reshape(3, -1).T.astype(np.float32)
    local = (index + np.float32(0.5)) / np.float32(size) * boxes.size[:, None] - boxes.size[:, None] / np.float32(2)
    cosine, sine = np.cos(boxes.yaw)[:, None], np.sin(boxes.yaw)[:, None]
    turned = [local[..., 0] * cosine - local[..., 1] * sine, local[..., 0] * sine + local[..., 1] * cosine]
    places = np.stack([*turned, local[..., 2]], axis=2) + boxes.centre[:, None]
    flat: np.ndarray = places.reshape(-1, 3).astype(np.float32)
    return flat


def refined(maps: Mapping[str, np.ndarray], rois: Located, config: DetectorConfig) -> Located:
    """The boxes of the RoIs that score at least the threshold, scores falling, equal scores in the RoIs' order.

    Residuals are relative to the RoI in its own frame (OpenPCDet's generate_predicted_boxes); the class is the RoI's.
    """
    cls, reg = second_maps(config)
    logits = checked(cls, maps[cls], 1)[0].reshape(-1)
    residuals = checked(reg, maps[reg], BOX_CHANNELS)[0].reshape(BOX_CHANNELS, -1).T.astype(np.float64)
    if not len(logits) == len(residuals) == len(rois.cells):
        raise InternalError(f"{len(logits)} scores and {len(residuals)} boxes of {len(rois.cells)} RoIs")
    scores = scores_from_logits(logits)
    index = np.flatnonzero(scores >= np.float32(config.post.score_threshold))
    index = index[order_by_score(scores[index])]
    boxes = rois.detections.boxes
    yaw = boxes.yaw.astype(np.float64)[index]
    anchors = np.concatenate([np.zeros((len(index), 3)), boxes.size[index], np.zeros((len(index), 1))], axis=1)
    with np.errstate(divide="ignore"):  # a box without extent has the logarithm -inf, and stays without
        local = boxes_from_residuals(residuals[index], anchors.astype(np.float64))
    cosine, sine = np.cos(yaw), np.sin(yaw)
    turned = np.stack([local[:, 0] * cosine - local[:, 1] * sine, local[:, 0] * sine + local[:, 1] * cosine], axis=1)
    centre = np.concatenate([turned, local[:, 2:3]], axis=1) + boxes.centre[index]
    found = Detections(
        boxes=Boxes3D(
            centre=centre.astype(np.float32),
            size=sizes_from_logarithms(local[:, 3:6], REG),
            yaw=(local[:, 6] + yaw).astype(np.float32),
            velocity=np.zeros((len(index), 2), np.float32),
        ),
        scores=scores[index],
        labels=rois.detections.labels[index],
        class_names=config.class_names,
    )
    return Located(detections=found, cells=rois.cells[index], headings=rois.headings[index], by_class=False)
