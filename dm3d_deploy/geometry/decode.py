"""From CenterHead's raw maps to detections, as OpenPCDet's CenterHead.generate_predicted_boxes does it, in numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from dm3d_deploy.config import DetectorConfig, PostConfig
from dm3d_deploy.errors import EngineError, InternalError
from dm3d_deploy.geometry.boxes import select_boxes
from dm3d_deploy.geometry.nms import order_by_score, rotated_nms
from dm3d_deploy.pointcloud import Boxes3D, Detections

LARGEST_LOGIT = 700.0  # exp of a float64 stays finite up to 709
LARGEST_LOGARITHM = 88.0  # exp of a float32 stays finite up to 88.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """Detections, each with the cell of the BEV map that it was read from: row * columns + column.

    Cell and class name a candidate: two executions of one detector that mean the same box agree in both. `headings` are
    the lengths of the vectors (cos, sin) that the yaws were read from: near 1 from a trained head, near 0 where the
    network says nothing about the heading.
    """

    detections: Detections
    cells: Int64[np.ndarray, " boxes"]
    headings: Float32[np.ndarray, " boxes"]

    def __post_init__(self) -> None:
        if not len(self.cells) == len(self.headings) == len(self.detections):
            found = f"{len(self.cells)} cells and {len(self.headings)} headings"
            raise InternalError(f"{found} do not fit {len(self.detections)} detections")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """What decoding found in each task before suppression, and what stayed of all tasks.

    `cut_scores` holds for each task the lowest score of its `max_objects` cells; None where fewer cells than that
    exceeded the score threshold, so that nothing was cut off.
    """

    before_nms: tuple[Located, ...]
    cut_scores: tuple[float | None, ...]
    kept: Located


def detections_from_maps(
    maps: Mapping[str, Float32[np.ndarray, "1 channels rows columns"]], config: DetectorConfig
) -> Detections:
    """Decode every task, suppress within each, and merge: scores fall; equal scores keep task order, then NMS order.

    Raises EngineError as `decoded` does.
    """
    return decoded(maps, config).kept.detections


def decoded(maps: Mapping[str, Float32[np.ndarray, "1 channels rows columns"]], config: DetectorConfig) -> Decoded:
    """The candidates of every task and what suppression keeps of them.

    `maps["0.hm"]` is the raw output of branch `hm` of task 0. Of the `max_objects` best cells over all classes those
    stay whose score exceeds the threshold and whose centre lies in the limit range: scores falling, equal scores by
    rising index in [C, H, W]. Raises EngineError for a map that is missing, misshapen or not finite, and for a size
    that overflows.
    """
    tasks = [_decode_task(_task_maps(maps, task, config), task, config) for task in range(len(config.head.branches))]
    before_nms = tuple(candidates for candidates, _ in tasks)
    kept = join_located([_suppressed(candidates, config.post) for candidates in before_nms])
    return Decoded(
        before_nms=before_nms,
        cut_scores=tuple(cut for _, cut in tasks),
        kept=select_located(kept, order_by_score(kept.detections.scores)),
    )


def select_located(located: Located, index: Int64[np.ndarray, " chosen"]) -> Located:
    """The detections at `index`, in that order."""
    whole = located.detections
    chosen = Detections(
        boxes=select_boxes(whole.boxes, index),
        scores=whole.scores[index],
        labels=whole.labels[index],
        class_names=whole.class_names,
    )
    return Located(detections=chosen, cells=located.cells[index], headings=located.headings[index])


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
    )


def _suppressed(candidates: Located, post: PostConfig) -> Located:
    found = candidates.detections
    return select_located(
        candidates, rotated_nms(found.boxes, found.scores, post.nms_threshold, post.nms_pre, post.nms_post)
    )


def _decode_task(maps: Mapping[str, np.ndarray], task: int, config: DetectorConfig) -> tuple[Located, float | None]:
    """The candidates of one task, and the lowest score of its `max_objects` cells if there were so many."""
    hm = maps["hm"][0]
    scores, cell, class_of_task = _best_cells(hm, config.post.max_objects, config.post.score_threshold)
    row, column = np.divmod(cell, hm.shape[2])
    value = {name: branch[0].reshape(branch.shape[1], -1)[:, cell].astype(np.float64) for name, branch in maps.items()}

    step_x, step_y, _ = (config.head.stride * step for step in config.voxels.voxel_size_m)
    x = (column + value["center"][0]) * step_x + config.voxels.point_range_m[0]
    y = (row + value["center"][1]) * step_y + config.voxels.point_range_m[1]
    centre = np.stack([x, y, value["center_z"][0]], axis=1).astype(np.float32)
    low, high = np.array(config.post.centre_limit_m[:3]), np.array(config.post.centre_limit_m[3:])
    inside = np.flatnonzero(((centre >= low) & (centre <= high)).all(axis=1))

    cos, sin = value["rot"]
    names = np.array([config.class_names.index(name) for name in config.head.classes_by_task[task]], dtype=np.int64)
    boxes = Boxes3D(
        centre=centre,
        size=_sizes(value["dim"].T, f"{task}.dim"),
        yaw=np.arctan2(sin, cos).astype(np.float32),
        velocity=value.get("vel", np.zeros((2, len(cell)))).T.astype(np.float32),
    )
    found = Detections(boxes=boxes, scores=scores, labels=names[class_of_task], class_names=config.class_names)
    cut = float(scores[-1]) if len(scores) == config.post.max_objects else None
    located = Located(detections=found, cells=cell, headings=np.hypot(cos, sin).astype(np.float32))
    return select_located(located, inside), cut


def _best_cells(hm: np.ndarray, count: int, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score, cell (flat in [H, W]) and class of the `count` best cells of [C, H, W] whose score exceeds `threshold`."""
    logits = hm.astype(np.float64).ravel()
    scores = (1 / (1 + np.exp(-np.maximum(logits, -LARGEST_LOGIT)))).astype(np.float32)
    flat = np.flatnonzero(scores > np.float32(threshold))
    if len(flat) > count:
        least = np.partition(scores[flat], -count)[-count]
        flat = flat[scores[flat] >= least]
    flat = flat[order_by_score(scores[flat])[:count]]
    return scores[flat], flat % hm[0].size, flat // hm[0].size


def _sizes(logarithms: np.ndarray, name: str) -> np.ndarray:
    if logarithms.size and logarithms.max() > LARGEST_LOGARITHM:
        raise EngineError(
            f"the output '{name}' decodes to a box of exp({logarithms.max():.6g}) m, which float32 cannot hold.",
            fix="verify this engine against the model: a trained head stays below exp(4) m",
        )
    size: np.ndarray = np.exp(logarithms).astype(np.float32)
    return size


def _task_maps(maps: Mapping[str, np.ndarray], task: int, config: DetectorConfig) -> dict[str, np.ndarray]:
    """The maps of one task by branch, every one checked."""
    found: dict[str, np.ndarray] = {}
    for branch in config.head.branches[task]:
        name = f"{task}.{branch.name}"
        if name not in maps:
            raise EngineError(
                f"the output '{name}' of the detection head is missing; there are {len(maps)} outputs.",
                fix="export the graph again from this model",
            )
        found[branch.name] = _checked(name, maps[name], branch.channels)
    if len({value.shape[2:] for value in found.values()}) != 1:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in found.items())
        raise EngineError(
            f"the outputs of task {task} lie on different grids: {shapes}.",
            fix="export the graph again from this model",
        )
    return found


def _checked(name: str, value: np.ndarray, channels: int) -> np.ndarray:
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
