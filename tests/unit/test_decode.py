"""Decoding of hand-made maps: every number of a box where it belongs, every refusal with its reason."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dm3d_deploy.config import (
    Backbone2dConfig,
    Backbone3dConfig,
    Branch,
    CenterHeadConfig,
    DetectorConfig,
    PostConfig,
    VoxelConfig,
)
from dm3d_deploy.errors import EngineError, InternalError
from dm3d_deploy.geometry.decode import Located, decoded, detections_from_maps

ROWS, COLUMNS = 6, 8
REGRESSION = (("center", 2), ("center_z", 1), ("dim", 3), ("rot", 2), ("vel", 2))


def config_of(*, velocity: bool = True, **post: object) -> DetectorConfig:
    """Classes a, b, c; task 0 detects c, task 1 detects b and a: labels must go through the names."""
    tasks = (("c",), ("b", "a"))
    regression = [Branch(name=n, channels=c, convs=2) for n, c in REGRESSION if velocity or n != "vel"]
    head = CenterHeadConfig(
        classes_by_task=tasks,
        shared_channels=8,
        bias_before_norm=True,
        branches=tuple((*regression, Branch(name="hm", channels=len(t), convs=2)) for t in tasks),
        stride=4,
    )
    settings = PostConfig(
        score_threshold=0.1,
        centre_limit_m=(-100, -100, -10, 100, 100, 10),
        max_objects=20,
        nms_threshold=0.2,
        nms_pre=100,
        nms_post=5,
    )
    return DetectorConfig(
        name="hand-made",
        dataset="none",
        class_names=("a", "b", "c"),
        voxels=VoxelConfig(
            point_range_m=(-10.0, -20.0, -5.0, 6.0, -8.0, 3.0),
            voxel_size_m=(0.5, 0.25, 0.2),
            max_points_per_voxel=10,
            max_voxels=100,
            columns=("x", "y", "z"),
        ),
        backbone_3d=Backbone3dConfig(name="none", channels=(1, 1, 1, 1, 1, 1), blocks=1),
        bev_channels=8,
        backbone_2d=Backbone2dConfig(layer_nums=(), strides=(), filters=(), upsample_strides=(), upsample_filters=()),
        head=head,
        post=dataclasses.replace(settings, **post),  # type: ignore[arg-type]
        text="",
    )


def silent_maps(config: DetectorConfig) -> dict[str, np.ndarray]:
    maps = {
        f"{task}.{branch.name}": np.zeros((1, branch.channels, ROWS, COLUMNS), np.float32)
        for task, branches in enumerate(config.head.branches)
        for branch in branches
    }
    for task in range(len(config.head.branches)):
        maps[f"{task}.hm"] -= 30
    return maps


def speak(
    maps: dict[str, np.ndarray], task: int, row: int, column: int, *, logit: float, class_of_task: int = 0
) -> None:
    maps[f"{task}.hm"][0, class_of_task, row, column] = logit


def test_every_number_of_a_box_comes_from_its_own_channel() -> None:
    config = config_of()
    maps = silent_maps(config)
    speak(maps, 1, 3, 5, logit=1.0, class_of_task=1)
    cell = (0, slice(None), 3, 5)
    maps["1.center"][cell] = (0.25, 0.75)
    maps["1.center_z"][cell] = -1.5
    maps["1.dim"][cell] = np.log([4.0, 2.0, 1.5])
    maps["1.rot"][cell] = (math.cos(2.5) * 3, math.sin(2.5) * 3)
    maps["1.vel"][cell] = (7.0, -8.0)
    found = detections_from_maps(maps, config)
    assert len(found) == 1
    assert found.class_names[found.labels[0]] == "a"
    assert found.scores[0] == pytest.approx(1 / (1 + math.exp(-1.0)))
    assert found.boxes.centre[0] == pytest.approx([5.25 * 4 * 0.5 - 10, 3.75 * 4 * 0.25 - 20, -1.5])
    assert found.boxes.size[0] == pytest.approx([4.0, 2.0, 1.5])
    assert found.boxes.yaw[0] == pytest.approx(2.5)
    assert found.boxes.velocity[0] == pytest.approx([7.0, -8.0])


def test_a_head_without_velocity_gives_boxes_at_rest() -> None:
    config = config_of(velocity=False)
    maps = silent_maps(config)
    speak(maps, 0, 1, 1, logit=2.0)
    assert detections_from_maps(maps, config).boxes.velocity.tolist() == [[0.0, 0.0]]


def test_scores_at_the_threshold_are_dropped_and_above_are_kept() -> None:
    config = config_of(score_threshold=0.5)
    maps = silent_maps(config)
    speak(maps, 0, 0, 0, logit=0.0)
    speak(maps, 0, 5, 7, logit=1e-3)
    assert [len(task.cells) for task in decoded(maps, config).before_nms] == [1, 0]


def test_centres_outside_the_limit_range_are_dropped_and_those_on_it_kept() -> None:
    config = config_of(centre_limit_m=(-10, -20, -1, -2, -8, 1))
    maps = silent_maps(config)
    speak(maps, 0, 0, 0, logit=3.0)  # x = -10: on the limit
    speak(maps, 0, 0, 4, logit=3.0)  # x = -2: on the limit
    speak(maps, 0, 0, 5, logit=3.0)  # x = 0: outside
    speak(maps, 0, 2, 0, logit=3.0)
    maps["0.center_z"][0, 0, 2, 0] = 1.5  # above it
    assert decoded(maps, config).before_nms[0].detections.boxes.centre[:, 0].tolist() == [-10, -2]


def test_equal_scores_are_taken_by_the_lowest_flat_index() -> None:
    config = config_of(max_objects=3)
    maps = silent_maps(config)
    maps["1.hm"][:] = 40.0  # every sigmoid is 1 in float32, below as above
    maps["1.hm"][0, 0, 0, 1] = 50.0
    found = decoded(maps, config).before_nms[1].detections
    assert [found.class_names[i] for i in found.labels] == ["b", "b", "b"]
    assert found.boxes.centre[:, 0].tolist() == [-10, -8, -6]


@given(seed=st.integers(0, 10_000), count=st.sampled_from([1, 5, 40, 500]), levels=st.sampled_from([3, 10_000]))
def test_the_best_cells_are_those_of_a_full_sort(seed: int, count: int, levels: int) -> None:
    config = config_of(max_objects=count, score_threshold=0.3)
    maps = silent_maps(config)
    rng = np.random.default_rng(seed)
    maps["1.hm"] = (rng.integers(0, levels, (1, 2, ROWS, COLUMNS)) / levels * 4 - 2).astype(np.float32)
    flat = maps["1.hm"].ravel().tolist()
    ranked = sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:count]
    expected = [i for i in ranked if 1 / (1 + math.exp(-flat[i])) > 0.3]
    found = decoded(maps, config).before_nms[1].detections
    x = [i % COLUMNS * 2.0 - 10 for i in expected]
    y = [i % (ROWS * COLUMNS) // COLUMNS - 20.0 for i in expected]
    assert found.boxes.centre[:, :2].tolist() == [list(pair) for pair in zip(x, y, strict=True)]
    assert found.labels.tolist() == [1 - i // (ROWS * COLUMNS) for i in expected]


def test_tasks_do_not_suppress_each_other_and_scores_fall_over_all() -> None:
    config = config_of()
    maps = silent_maps(config)
    speak(maps, 0, 2, 2, logit=1.0)
    speak(maps, 1, 2, 2, logit=2.0)
    speak(maps, 1, 2, 2, logit=1.5, class_of_task=1)  # same place, same task, other class: suppressed
    speak(maps, 1, 5, 5, logit=1.0)
    found = detections_from_maps(maps, config)
    assert [found.class_names[i] for i in found.labels] == ["b", "c", "b"]  # equal scores: task 0 comes first
    assert np.all(np.diff(found.scores) <= 0)


def test_each_task_returns_at_most_nms_post_boxes() -> None:
    config = config_of(nms_post=2)
    maps = silent_maps(config)
    for task in (0, 1):
        for column in range(0, COLUMNS, 2):
            speak(maps, task, 0, column, logit=1.0 + column)
    assert len(detections_from_maps(maps, config)) == 4


def test_the_candidates_and_what_is_kept_carry_their_cells() -> None:
    config = config_of()
    maps = silent_maps(config)
    speak(maps, 0, 2, 2, logit=1.0)
    speak(maps, 1, 2, 2, logit=2.0)
    speak(maps, 1, 2, 2, logit=1.5, class_of_task=1)  # suppressed
    speak(maps, 1, 5, 7, logit=0.5)
    found = decoded(maps, config)
    assert [task.cells.tolist() for task in found.before_nms] == [[18], [18, 18, 47]]
    assert [found.kept.detections.class_names[i] for i in found.before_nms[1].detections.labels] == ["b", "a", "b"]
    assert found.kept.cells.tolist() == [18, 18, 47]
    assert found.kept.detections.scores.tolist() == detections_from_maps(maps, config).scores.tolist()
    assert found.cut_scores == (None, None)


def test_a_full_list_says_its_lowest_score_also_where_that_cell_is_outside_the_limits() -> None:
    config = config_of(max_objects=2, centre_limit_m=(-10, -20, -1, -2, -8, 1))
    maps = silent_maps(config)
    for column, logit in ((0, 3.0), (5, 2.0), (1, 1.0)):  # column 5 lies outside
        speak(maps, 0, 0, column, logit=logit)
    speak(maps, 1, 0, 0, logit=3.0)
    found = decoded(maps, config)
    assert found.before_nms[0].cells.tolist() == [0]
    assert found.cut_scores == (pytest.approx(1 / (1 + math.exp(-2.0))), None)


def test_cells_that_do_not_fit_the_detections_are_a_bug_of_ours() -> None:
    config = config_of()
    nothing = detections_from_maps(silent_maps(config), config)
    with pytest.raises(InternalError, match="1 cells and 0 headings do not fit 0 detections"):
        Located(detections=nothing, cells=np.zeros(1, np.int64), headings=np.zeros(0, np.float32))


def test_silence_gives_no_detections() -> None:
    config = config_of()
    found = detections_from_maps(silent_maps(config), config)
    assert len(found) == 0
    assert found.class_names == ("a", "b", "c")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["0.hm", "1.vel"])
def test_a_map_that_is_not_finite_is_named(name: str, value: float) -> None:
    config = config_of()
    maps = silent_maps(config)
    maps[name][0, 0, 1, 1] = value
    with pytest.raises(EngineError, match=rf"the output '{name}' holds 1 values of \d+ that are not finite"):
        detections_from_maps(maps, config)


def test_a_missing_map_is_named() -> None:
    config = config_of()
    maps = silent_maps(config)
    del maps["1.dim"]
    with pytest.raises(EngineError, match=r"the output '1.dim' .* is missing; there are 11 outputs"):
        detections_from_maps(maps, config)


@pytest.mark.parametrize("shape", [(2, 3, ROWS, COLUMNS), (1, 2, ROWS, COLUMNS), (3, ROWS, COLUMNS)])
def test_a_misshapen_map_is_named(shape: tuple[int, ...]) -> None:
    config = config_of()
    maps = silent_maps(config) | {"0.dim": np.zeros(shape, np.float32)}
    with pytest.raises(EngineError, match=r"the output '0.dim' has the shape .*; \[1, 3, rows, columns\] was expected"):
        detections_from_maps(maps, config)


def test_maps_of_different_grids_are_refused() -> None:
    config = config_of()
    maps = silent_maps(config) | {"0.dim": np.zeros((1, 3, ROWS, COLUMNS + 1), np.float32)}
    with pytest.raises(EngineError, match="task 0 lie on different grids"):
        detections_from_maps(maps, config)


def test_a_size_that_overflows_is_refused_only_where_a_box_is() -> None:
    config = config_of()
    maps = silent_maps(config)
    speak(maps, 0, 1, 1, logit=1.0)
    maps["0.dim"][0, 0, 0, 0] = 200.0
    assert len(detections_from_maps(maps, config)) == 1
    maps["0.dim"][0, 0, 1, 1] = 200.0
    with pytest.raises(EngineError, match=r"the output '0.dim' decodes to a box of exp\(200\) m"):
        detections_from_maps(maps, config)
