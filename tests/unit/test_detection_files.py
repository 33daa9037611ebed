"""Detections written and read back, and files that are refused with their reason."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dm3d_deploy.errors import UsageError
from dm3d_deploy.pointcloud import Boxes3D, Detections
from dm3d_deploy.reporting.detection_files import (
    detections_from_json,
    detections_to_json,
    read_detections,
    read_kitti_text,
    write_detections,
    write_kitti_text,
)

NAMES = ("car", "bus")
float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def detections_of(rows: np.ndarray, labels: list[int]) -> Detections:
    return Detections(
        boxes=Boxes3D(centre=rows[:, :3], size=rows[:, 3:6], yaw=rows[:, 6], velocity=rows[:, 7:9]),
        scores=rows[:, 9],
        labels=np.array(labels, dtype=np.int64),
        class_names=NAMES,
    )


def example(count: int = 3) -> Detections:
    rows = np.random.default_rng(0).normal(0, 5, (count, 10)).astype(np.float32)
    return detections_of(rows, [i % 2 for i in range(count)])


def assert_same(a: Detections, b: Detections, *, velocity: bool = True) -> None:
    pairs = [(a.boxes.centre, b.boxes.centre), (a.boxes.size, b.boxes.size), (a.boxes.yaw, b.boxes.yaw)]
    pairs += [(a.scores, b.scores), (a.labels, b.labels)]
    pairs += [(a.boxes.velocity, b.boxes.velocity)] if velocity else []
    for left, right in pairs:
        assert left.dtype == right.dtype
        assert np.array_equal(left, right)
    assert a.class_names == b.class_names


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(st.lists(float32, min_size=10, max_size=10), st.integers(0, 1)), max_size=4))
def test_every_float_comes_back_as_it_was(tmp_path: Path, rows: list[tuple[list[float], int]]) -> None:
    values = np.array([row for row, _ in rows], dtype=np.float32).reshape(-1, 10)
    written = detections_of(values, [label for _, label in rows])
    write_detections(tmp_path / "d.json", written, frame="000001")
    read, frame = read_detections(tmp_path / "d.json")
    assert frame == "000001"
    assert_same(written, read)
    write_kitti_text(tmp_path / "d.txt", written)
    assert_same(written, read_kitti_text(tmp_path / "d.txt", NAMES), velocity=False)


def test_velocities_that_no_head_estimates_are_null() -> None:
    row = np.array([[0.1, 2, 3, 4, 5, 6, 0.7, 0, 0, 0.3]], np.float32)
    data = detections_to_json(detections_of(row, [1]), frame="f", moving=False)
    assert data["boxes"][0]["velocity_mps"] is None
    assert_same(detections_from_json(data, source="s")[0], detections_of(row, [1]))


def test_numbers_are_written_short_and_named() -> None:
    row = np.array([[0.1, 2, 3, 4, 5, 6, 0.7, 8, 9, 0.3]], np.float32)
    data = detections_to_json(detections_of(row, [1]), frame="f")
    assert json.loads(json.dumps(data)) == {
        "schema": 1,
        "frame": "f",
        "class_names": ["car", "bus"],
        "boxes": [
            {
                "class": "bus",
                "score": 0.3,
                "centre_m": [0.1, 2.0, 3.0],
                "size_m": [4.0, 5.0, 6.0],
                "yaw_rad": 0.7,
                "velocity_mps": [8.0, 9.0],
            }
        ],
    }


def test_kitti_lines_hold_the_stated_columns(tmp_path: Path) -> None:
    row = np.array([[0.1, 2, 3, 4, 5, 6, 0.7, 8, 9, 0.3]], np.float32)
    write_kitti_text(tmp_path / "d.txt", detections_of(row, [1]))
    assert (tmp_path / "d.txt").read_text() == "bus 0.1 2.0 3.0 4.0 5.0 6.0 0.7 0.3\n"


def change(path: list[Any], value: Any) -> dict[str, Any]:
    data: Any = detections_to_json(example(), frame="f")
    place = data
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return data  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "x.json is a list where an object was expected"),
        (change(["schema"], 2), "has the schema 2; this version reads 1"),
        (change(["boxes"], None), "lacks boxes"),
        (change(["frames"], 1), "unknown key 'frames' .did you mean 'frame'"),
        (change(["frame"], 7), "a frame that is no text"),
        (change(["boxes"], {}), "boxes that are no list"),
        (change(["class_names"], ["car", "car"]), "not a list of distinct words"),
        (change(["boxes", 1], 5), "box 1 is a int where an object was expected"),
        (change(["boxes", 1, "class"], "cat"), "box 1 has the class 'cat' .did you mean 'car'"),
        (change(["boxes", 1, "score"], True), "box 1 has a score that is not a number"),
        (change(["boxes", 2, "centre_m"], [1, 2]), "box 2 has a centre_m that is not 3 numbers"),
        (change(["boxes", 2, "velocity_mps"], [1, "2"]), "box 2 has a velocity_mps that is not 2 numbers"),
        (change(["boxes", 0, "yaw_rad"], 1e300), "box 0 holds a number that float32 cannot hold"),
        (change(["boxes", 0, "speed"], 1.0), "box 0 has the unknown key 'speed'"),
    ],
)
def test_data_that_is_not_detections_is_refused(data: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        detections_from_json(data, source="x.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as detections"),
        ('{"schema": NaN}', "NaN is not a number of JSON"),
        ("[" * 100_000, "cannot"),
        ("9" * 400, "is a float where an object was expected"),
    ],
)
def test_files_that_are_not_strict_json_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_detections(tmp_path / "x.json")


def test_files_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read as detections"):
        read_detections(tmp_path / "x.json")
    with pytest.raises(UsageError, match="cannot be read as text"):
        read_kitti_text(tmp_path / "x.txt", NAMES)


def test_numbers_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    rows = np.full((1, 10), np.nan, np.float32)
    with pytest.raises(ValueError, match="JSON"):
        write_detections(tmp_path / "x.json", detections_of(rows, [0]), frame="f")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("car 1 2 3 4 5 6 7", "line 2 does not hold a class and 8 numbers"),
        ("car 1 2 3 4 5 6 7 x", "line 2 does not hold a class and 8 numbers"),
        ("bud 1 2 3 4 5 6 7 8", "line 2 has the class 'bud' .did you mean 'bus'"),
        ("car 1 2 3 4 5 6 inf 8", "box 1 holds a number that float32 cannot hold"),
    ],
)
def test_lines_that_do_not_fit_are_refused_with_their_number(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "x.txt").write_text(f"car 1 2 3 4 5 6 7 8\n{line}\n\n")
    with pytest.raises(UsageError, match=message):
        read_kitti_text(tmp_path / "x.txt", NAMES)


def test_class_names_with_spaces_do_not_fit_into_text(tmp_path: Path) -> None:
    one = example(1)
    spaced = Detections(boxes=one.boxes, scores=one.scores, labels=one.labels, class_names=("fire truck", "bus"))
    with pytest.raises(UsageError, match="the class name 'fire truck' holds a space"):
        write_kitti_text(tmp_path / "x.txt", spaced)
