"""Candidates of a detector with the places they were read from, and the checks that every head's maps pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int64

from dm3d_deploy.config import AnchorPostConfig, PostConfig
from dm3d_deploy.errors import EngineError, InternalError
from dm3d_deploy.geometry.boxes import select_boxes
from dm3d_deploy.geometry.nms import rotated_nms
from dm3d_deploy.pointcloud import Boxes3D, Detections

LARGEST_LOGIT = 700.0  # exp of a float64 stays finite up to 709
LARGEST_LOGARITHM = 88.0  # exp of a float32 stays finite up to 88.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """Detections, each with the cell of the BEV map that it was read from: row * columns + column.

    Of an anchor head the cell is the anchor: (row * columns + column) * anchors of a cell + anchor. Cell and class name
    a candidate: two executions of one detector that mean the same box agree in both; with `by_class` False the cell
    alone does, and the class is the best of that cell. `headings` are the lengths of the vectors (cos, sin) that the
    yaws were read from: near 1 from a trained head, near 0 where the network says nothing about the heading; of an
    anchor head, how far the logits of the two best directions lie apart, or twice the yaw's distance from where it is
    folded (rad), if that is less.
    """

    detections: Detections
    cells: Int64[np.ndarray, " boxes"]
    headings: Float32[np.ndarray, " boxes"]
    by_class: bool = True

    def __post_init__(self) -> None:
        if not len(self.cells) == len(self.headings) == len(self.detections):
            found = f"{len(self.cells)} cells and {len(self.headings)} headings"
            raise InternalError(f"{found} do not fit {len(self.detections)} detections")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """What decoding found in each task (group of classes) before suppression, and what stayed of all tasks.

    `cut_scores` holds for each task the lowest score of its `max_objects` cells (`nms_pre` anchors); None where fewer
    than that exceeded the score threshold, so that nothing was cut off.
    """

    before_nms: tuple[Located, ...]
    cut_scores: tuple[float | None, ...]
    kept: Located


def select_located(located: Located, index: Int64[np.ndarray, " chosen"]) -> Located:
    """The detections at `index`, in that order."""
    whole = located.detections
    chosen = Detections(
        boxes=select_boxes(whole.boxes, index),
        scores=whole.scores[index],
        labels=whole.labels[index],
        class_names=whole.class_names,
    )
    return Located(
        detections=chosen,
        cells=located.cells[index],
        headings=located.headings[index],
        by_class=located.by_class,
    )


def join_located(parts: Sequence[Located]) -> Located:
    """The detections of all parts (at least one), part after part."""
    found = [part.detections for part in parts]
    boxes = Boxes3D(
        centre=np.concatenate([part.boxes.centre for part in found]),
        size=np.concatenate([part.boxes.size for part in found]),
        yaw=np.concatenate([part.boxes.yaw for part in found]),
        velocity=np.concatenate([part.boxes.velocity for part in found]),
    )
    scores, labels = np.concatenate([p.scores for p in found]), np.concatenate([p.labels for p in found])
    whole = Detections(boxes=boxes, scores=scores, labels=labels, class_names=found[0].class_names)
    return Located(
        detections=whole,
        cells=np.concatenate([part.cells for part in parts]),
        headings=np.concatenate([part.headings for part in parts]),
        by_class=parts[0].by_class,
    )


def suppressed(candidates: Located, post: PostConfig | AnchorPostConfig) -> Located:
    """What rotated NMS keeps of a group of candidates."""
    found = candidates.detections
    return select_located(
        candidates, rotated_nms(found.boxes, found.scores, post.nms_threshold, post.nms_pre, post.nms_post)
    )


def scores_from_logits(logits: Float[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """Sigmoids, computed in float64 and rounded once."""
    score: np.ndarray = (1 / (1 + np.exp(-np.maximum(logits.astype(np.float64), -LARGEST_LOGIT)))).astype(np.float32)
    return score


def sizes_from_logarithms(logarithms: np.ndarray, name: str) -> np.ndarray:
    """Sizes (m) of an output's logarithms; EngineError for one that float32 cannot hold."""
    if logarithms.size and logarithms.max() > LARGEST_LOGARITHM:
        raise EngineError(
            f"the output '{name}' decodes to a box of exp({logarithms.max():.6g}) m, which float32 cannot hold.",
            fix="verify this engine against the model: a trained head stays below exp(4) m",
        )
    size: np.ndarray = np.exp(logarithms).astype(np.float32)
    return size


def checked(name: str, value: np.ndarray, channels: int) -> np.ndarray:
    """The map itself; EngineError for another shape than [1, channels, rows, columns] and for what is not finite."""
    if value.ndim != 4 or value.shape[:2] != (1, channels):
        raise EngineError(
            f"the output '{name}' has the shape {list(value.shape)}; [1, {channels}, rows, columns] was expected.",
            fix="use graph and configuration of the same model, with a batch of one",
        )
    wrong = value.size - int(np.count_nonzero(np.isfinite(value)))
    if wrong:
        raise EngineError(
            f"the output '{name}' holds {wrong} values of {value.size} that are not finite.",
            fix="run the graph in float32, or verify this engine against the model",
        )
    return value
