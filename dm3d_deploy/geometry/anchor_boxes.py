"""Candidates of an anchor head, as OpenPCDet's AnchorHeadTemplate and Detector3DTemplate.post_processing read them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dm3d_deploy.config import AnchorHeadConfig, AnchorPostConfig, DetectorConfig
from dm3d_deploy.errors import EngineError
from dm3d_deploy.geometry.anchors import (
    BOX_CHANNELS,
    anchor_places,
    boxes_from_residuals,
    cell_anchors,
    directed,
    from_fold,
)
from dm3d_deploy.geometry.candidates import Located, checked, scores_from_logits, sizes_from_logarithms
from dm3d_deploy.geometry.nms import order_by_score
from dm3d_deploy.pointcloud import Boxes3D, Detections

NO_TURN = np.float32(1.0)


def group_candidates(
    maps: Mapping[str, np.ndarray], config: DetectorConfig, head: AnchorHeadConfig, post: AnchorPostConfig
) -> list[tuple[Located, float | None]]:
    """Of each NMS group the `nms_pre` best anchors at or above the score threshold, and the lowest score if cut there.

    Class-agnostic NMS takes each anchor with its best class (equal scores: the lower class); class by class, each
    anchor stands once in every group. Scores fall; equal scores by rising anchor: row, column, anchor of the cell.
    """
    size = (config.voxels.grid_zyx[1] // head.stride, config.voxels.grid_zyx[2] // head.stride)
    logits = _rows(maps, "cls", len(config.class_names), head, size)
    scores = scores_from_logits(logits)
    if post.multi_class:
        return [_best(maps, scores[:, k], np.full(len(scores), k), config, head, post) for k in range(scores.shape[1])]
    labels = scores.argmax(axis=1)
    return [_best(maps, scores.max(axis=1), labels, config, head, post)]


def _rows(
    maps: Mapping[str, np.ndarray], branch: str, channels: int, head: AnchorHeadConfig, size: tuple[int, int]
) -> np.ndarray:
    """One branch of every anchor as [cells * anchors, channels]."""
    parts = []
    for anchor in range(head.per_cell):
        name = f"{anchor}.{branch}"
        if name not in maps:
            raise EngineError(
                f"the output '{name}' of the detection head is missing; there are {len(maps)} outputs.",
                fix="export the graph again from this model",
            )
        value = checked(name, maps[name], channels)
        if value.shape[2:] != size:
            raise EngineError(
                f"the output '{name}' has {list(value.shape[2:])} cells, and the anchors stand on {list(size)}.",
                fix="use graph and configuration of the same model",
            )
        parts.append(value[0].reshape(channels, -1))
    return np.stack(parts).transpose(2, 0, 1).reshape(-1, channels)


def _best(
    maps: Mapping[str, np.ndarray],
    scores: np.ndarray,
    labels: np.ndarray,
    config: DetectorConfig,
    head: AnchorHeadConfig,
    post: AnchorPostConfig,
) -> tuple[Located, float | None]:
    index = np.flatnonzero(scores >= np.float32(post.score_threshold))
    cut = None
    if len(index) >= post.nms_pre:
        cut = float(np.partition(scores[index], -post.nms_pre)[-post.nms_pre])
        index = index[scores[index] >= cut]
    index = index[order_by_score(scores[index])[: post.nms_pre]]
    boxes, headings = decoded_at(maps, index, config, head)
    found = Detections(
        boxes=boxes, scores=scores[index], labels=labels[index].astype(np.int64), class_names=config.class_names
    )
    return Located(detections=found, cells=index, headings=headings, by_class=post.multi_class), cut


def decoded_at(
    maps: Mapping[str, np.ndarray], index: np.ndarray, config: DetectorConfig, head: AnchorHeadConfig
) -> tuple[Boxes3D, np.ndarray]:
    """Boxes and headings of the anchors at `index`."""
    rows, columns = (cells // head.stride for cells in config.voxels.grid_zyx[1:])
    size = (rows, columns)
    cell, anchor = np.divmod(index, head.per_cell)
    row, column = np.divmod(cell, columns)
    x, y = anchor_places(config, head)
    anchors = np.concatenate(
        [np.stack([x[anchor, column], y[anchor, row]], axis=1), cell_anchors(head)[anchor]], axis=1
    )
    residuals = _rows(maps, "box", BOX_CHANNELS, head, size)[index].astype(np.float64)
    values = boxes_from_residuals(residuals, anchors)
    yaw, headings = values[:, 6], np.full(len(index), NO_TURN)
    if head.direction is not None:
        logits = _rows(maps, "dir", head.direction.bins, head, size)[index]
        best = np.sort(logits, axis=1)
        headings = np.minimum(best[:, -1] - best[:, -2], 2 * from_fold(yaw, head.direction))
        yaw = directed(yaw, logits.argmax(axis=1), head.direction)
    boxes = Boxes3D(
        centre=values[:, :3].astype(np.float32),
        size=sizes_from_logarithms(values[:, 3:6], "box"),
        yaw=yaw.astype(np.float32),
        velocity=np.zeros((len(index), 2), dtype=np.float32),
    )
    return boxes, headings.astype(np.float32)
