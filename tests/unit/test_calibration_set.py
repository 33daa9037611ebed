"""Frames take one role each, whatever the source; turned copies are what a turned sensor would see."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.calibration_set import ROLES, deal, load_frame, plan_frames, split_counts, turned
from dm3d_deploy.errors import FrameError, UsageError
from dm3d_deploy.pointcloud import PointCloud

WANTED = {"calibration": 8, "selection": 2, "held_out": 4}


def folder_of(tmp_path: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    for index in range(count):
        points = np.column_stack([rng.uniform(-20, 20, (50, 3)), rng.uniform(0, 1, 50)]).astype(np.float32)
        points.tofile(tmp_path / f"{index:03d}.bin")
    return tmp_path


def plan(source: str, dataset: str = "NuScenesDataset", seed: int = 0):
    return plan_frames(source, dataset=dataset, seed=seed, **WANTED)


def test_simulated_roles_take_different_seeds():
    found = plan("simulated")
    seeds = [frame.seed for frame in found.frames]
    assert [len(found.of(role)) for role in ROLES] == [8, 2, 4]
    assert len(set(seeds)) == 14
    assert not {frame.seed for frame in plan("simulated", seed=1).frames} & set(seeds)
    assert "simulated" in found.notes[0]


def test_one_file_calibrates_in_copies_and_reports_on_simulated_scenes(tmp_path):
    found = plan(str(folder_of(tmp_path, 1) / "000.bin"))
    copies = found.of("calibration")
    assert len({(copy.turn_deg, copy.mirrored) for copy in copies}) == 8
    assert all(frame.path is None for role in ("selection", "held_out") for frame in found.of(role))
    assert "one real frame" in found.notes[0]
    assert copies[1].label == "000.bin turned 45 deg mirrored"


@pytest.mark.parametrize("count", [2, 3, 5, 9, 14, 40])
def test_no_file_of_a_folder_has_two_roles(tmp_path, count):
    found = plan(str(folder_of(tmp_path, count)))
    paths = [frame.path for frame in found.frames]
    assert len(set(paths)) == len(paths)
    assert found.of("held_out")
    assert found.of("calibration")
    assert (len(found.of("selection")) < 2) == any("accept or refuse" in note for note in found.notes)


@given(
    available=st.integers(2, 400),
    calibration=st.integers(1, 40),
    selection=st.integers(0, 6),
    held_out=st.integers(1, 9),
)
def test_shares_never_exceed_what_is_there(available, calibration, selection, held_out):
    counts = split_counts(available, calibration=calibration, selection=selection, held_out=held_out)
    assert sum(counts) <= available
    assert 1 <= counts[0] <= calibration
    assert 0 <= counts[1] <= selection
    assert 1 <= counts[2] <= held_out


def test_roles_are_dealt_over_the_whole_drive():
    roles = deal((8, 2, 4))
    assert roles.count("held_out") == 4
    places = [index for index, role in enumerate(roles) if role == "held_out"]
    assert places[0] < 5
    assert places[-1] > 8


def test_unknown_data_set_is_refused():
    with pytest.raises(UsageError, match="no simulated sensor stands for the data set 'Moon'"):
        plan("simulated", dataset="Moon")


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(FrameError):
        plan(str(tmp_path))


def test_turning_moves_points_and_keeps_the_rest():
    cloud = PointCloud(points=np.array([[1, 0, 2, 7], [0, 1, 3, 8]], np.float32), columns=("x", "y", "z", "intensity"))
    left = turned(cloud, 90, False)
    np.testing.assert_allclose(left.points, [[0, 1, 2, 7], [-1, 0, 3, 8]], atol=1e-6)
    np.testing.assert_allclose(turned(cloud, 0, True).points, [[1, 0, 2, 7], [0, -1, 3, 8]], atol=1e-6)
    assert turned(cloud, 0, False) is cloud


def test_a_simulated_reference_is_the_same_scene_each_time():
    reference = plan("simulated", dataset="KittiDataset").frames[0]
    np.testing.assert_array_equal(load_frame(reference).points, load_frame(reference).points)
