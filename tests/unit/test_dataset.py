"""Labelled folders: what simulate writes is what is read, interrupted or not; the rest is refused in a sentence."""

import json
from dataclasses import replace

import numpy as np
import pytest
from eval_sample import boxes, forward_camera

import dm3d_deploy.simulate as simulate_module
from calib.dataset import open_dataset, read_camera, read_labels
from calib.simulated_dataset import camera_of, labelled_frame, rays_through
from calib.simulator import CLASS_NAMES, SENSORS, simulate_frame
from dm3d_deploy.errors import Dm3dError, FrameError, InternalError, UsageError
from dm3d_deploy.evaluation.labels import FrameLabels
from dm3d_deploy.geometry.boxes import points_in_boxes, wrap_angle
from dm3d_deploy.simulate import simulate

LABEL = "Car 0.00 0 -1.57 100.00 100.00 180.00 160.00 1.50 2.00 4.00 0.00 1.00 10.00 -1.57\n"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("simulated")
    for sensor in SENSORS:
        simulate(root / sensor, sensor=sensor, frames=1, seed=41)
    return root


@pytest.mark.parametrize("sensor", SENSORS)
def test_a_simulated_frame_reads_back(written, sensor: str) -> None:
    folder = open_dataset(written / sensor)
    assert folder.names == ("000000",)
    assert (folder.info.sensor, folder.info.seed, folder.info.frames) == (sensor, 41, 1)
    read, frame = folder.read("000000"), simulate_frame(41, sensor=sensor)
    truth, expected = read.labels.truth, labelled_frame(frame).labels
    assert len(truth.boxes) > 10
    for name in ("centre", "size", "velocity"):
        np.testing.assert_allclose(getattr(truth.boxes, name), getattr(frame.boxes, name), atol=1e-3)
    np.testing.assert_allclose(wrap_angle(truth.boxes.yaw - frame.boxes.yaw), 0, atol=1e-3)
    assert truth.types == tuple(CLASS_NAMES[label] for label in frame.labels)
    np.testing.assert_array_equal(read.labels.num_points, frame.num_points)
    np.testing.assert_array_equal(truth.occlusion, expected.truth.occlusion)
    np.testing.assert_allclose(truth.truncation, expected.truth.truncation, atol=0.006)
    np.testing.assert_allclose(truth.image_px, expected.truth.image_px, atol=0.006)
    np.testing.assert_array_equal(read.cloud.points, frame.cloud.points)
    assert read.cloud.columns == SENSORS[sensor].columns
    np.testing.assert_allclose(read.labels.camera.from_lidar, camera_of(SENSORS[sensor]).from_lidar, atol=1e-9)
    assert read.labels.all_around


def test_the_camera_looks_where_the_car_drives(written) -> None:
    for sensor, model in SENSORS.items():
        assert camera_of(model).heading == pytest.approx(model.forward_rad)
        truth = open_dataset(written / sensor).read("000000").labels.truth
        course = np.cos(np.arctan2(*truth.boxes.centre[:, 1::-1].T) - model.forward_rad)
        shown = truth.image_px[:, 3] > 0
        assert shown.any()
        assert not shown.all()
        assert course[shown].min() > 0.5  # KITTI's camera sees 40 degrees to either side
        assert (course[truth.truncation < 0.01] > 0.7).all()


def test_velocities_and_counts_stand_beside_the_labels(written) -> None:
    root = written / "nuscenes32"
    data = json.loads((root / "objects" / "000000.json").read_text())
    lines = (root / "label_2" / "000000.txt").read_text().splitlines()
    assert len(data["num_points"]) == len(data["velocity_mps"]) == len(lines)
    assert all(len(line.split()) == 15 for line in lines)
    info = json.loads((root / "dataset.json").read_text())
    assert info["columns"] == ["x", "y", "z", "intensity", "timestamp"]
    assert info["classes"] == list(CLASS_NAMES)
    assert (root / "velodyne" / "000000.bin").stat().st_size == 20 * len(open_dataset(root).read("000000").cloud.points)


def test_what_was_interrupted_goes_on(tmp_path, monkeypatch) -> None:
    calls, told = [], []

    def stopping(seed, **kwargs):
        calls.append(seed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return simulate_frame(seed, **kwargs)

    monkeypatch.setattr(simulate_module, "simulate_frame", stopping)
    with pytest.raises(KeyboardInterrupt):
        simulate(tmp_path / "set", sensor="once40", frames=3, seed=7)
    assert calls == [7, 8, 9]
    assert not list((tmp_path / "set").rglob("*.partial"))
    with pytest.raises(FrameError, match="holds 2 of its 3 simulated frames"):
        open_dataset(tmp_path / "set")
    assert open_dataset(tmp_path / "set", ["000001"]).names == ("000001",)
    (tmp_path / "set" / "label_2" / "000000.txt").unlink()  # a frame is there when its labels are
    simulate(tmp_path / "set", sensor="once40", frames=3, seed=7, advanced=lambda *step: told.append(step))
    assert calls == [7, 8, 9, 7, 9]
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert open_dataset(tmp_path / "set").names == ("000000", "000001", "000002")
    simulate(tmp_path / "set", sensor="once40", frames=4, seed=7)
    assert calls[5:] == [10]
    simulate(tmp_path / "set", sensor="once40", frames=2, seed=7)
    assert len(calls) == 6
    assert len(open_dataset(tmp_path / "set").names) == 4


def test_simulate_says_what_it_wrote_and_what_to_do_next(cli, tmp_path) -> None:
    line = ("simulate", tmp_path / "my set", "--sensor", "once40", "--frames", "1", "--seed", "7")
    code, out, _ = cli(*line)
    assert (code, out) == (
        0,
        f"{tmp_path}/my set: 1 labelled frame of once40, seed 7; next: dm3d-deploy evaluate RUN --data "
        f"'{tmp_path}/my set', or train --data '{tmp_path}/my set' --epochs 10\n",
    )
    code, out, _ = cli(*line[:5], "2", *line[6:])
    assert (code, "my set: 2 labelled frames of once40, seeds 7 to 8; next: " in out) == (0, True)
    assert cli(*line, "--quiet") == (0, "", "")
    code, out, err = cli(*line, "--json")
    assert (code, json.loads(out)["frames"], err) == (0, 1, "")


def test_simulate_refuses(tmp_path, written) -> None:
    with pytest.raises(UsageError, match="0 frames cannot be simulated"):
        simulate(tmp_path, frames=0)
    with pytest.raises(UsageError, match="-1 is no seed"):
        simulate(tmp_path, seed=-1)
    with pytest.raises(UsageError, match=r"no simulated sensor 'hdl46'.*hdl64"):
        simulate(tmp_path, sensor="hdl46")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="holds frames of once40 from seed 41, not of once40 from seed 42"):
        simulate(written / "once40", sensor="once40", seed=42)
    with pytest.raises(UsageError, match="of hdl64 from seed 41, not of once40"):
        simulate(written / "hdl64", sensor="once40", seed=41)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    with pytest.raises(
        UsageError, match=r"photos holds cat\.jpg and no dataset\.json: it is no data set that simulate"
    ):
        simulate(tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    (tmp_path / "empty").mkdir()
    assert simulate(tmp_path / "empty", sensor="once40", frames=1).frames == 1
    with pytest.raises(Dm3dError, match=r"could not be written: a parent is a file.* Fix: choose another folder$"):
        simulate(tmp_path / "photos" / "cat.jpg" / "out", frames=1)


def test_rays_through_boxes_are_those_of_a_walk_along_every_ray() -> None:
    sensor = replace(SENSORS["hdl64"], azimuth_steps=60)
    box = boxes(
        [
            (9, 3, -0.8, 4.2, 1.8, 1.6, 0.6),
            (-12, 4, 0.5, 8, 2.5, 3, -2.0),
            (-5, -0.2, -1, 2.7, 1.6, 1.8, 0.2),
            (0.5, 0, -1, 6, 4, 1, 0.3),
        ]
    )
    steps = np.arange(0, 20, 0.004)
    counts = np.zeros(len(box), dtype=np.int64)
    origins = np.repeat(sensor.lift_m, sensor.azimuth_steps)
    for direction, lift in zip(sensor.directions.T, origins, strict=True):
        counts += points_in_boxes(steps[:, None] * direction + (0, 0, lift), box).any(axis=1)
    assert (counts > 10).all()
    np.testing.assert_allclose(rays_through(sensor, box), counts, atol=1, rtol=0.003)  # a walk steps over corners


def test_occlusion_follows_the_share_of_rays_that_came_back() -> None:
    frame = simulate_frame(3, sensor="hdl64")
    labels = labelled_frame(frame).labels
    share = frame.num_points / np.maximum(rays_through(SENSORS["hdl64"], frame.boxes), 1)
    assert (labels.truth.occlusion[frame.num_points < 5] == 3).all()
    seen = frame.num_points >= 5
    assert set(labels.truth.occlusion[seen]) == {0, 1, 2}
    assert share[seen & (labels.truth.occlusion == 0)].min() >= 0.4
    assert share[seen & (labels.truth.occlusion == 2)].max() < 0.15
    with pytest.raises(InternalError, match="1 counts of points"):
        FrameLabels(truth=labels.truth, num_points=np.ones(1, np.int64), camera=labels.camera, all_around=True)


@pytest.fixture
def kitti(tmp_path, written):
    """Two frames as people would have labelled them."""
    source = written / "hdl64"
    for part in ("velodyne", "label_2", "calib"):
        (tmp_path / "training" / part).mkdir(parents=True)
    for name in ("000000", "000007"):
        base = tmp_path / "training"
        (base / "velodyne" / f"{name}.bin").write_bytes((source / "velodyne" / "000000.bin").read_bytes())
        (base / "calib" / f"{name}.txt").write_bytes((source / "calib" / "000000.txt").read_bytes())
        (base / "label_2" / f"{name}.txt").write_text(LABEL)
    return tmp_path


def test_a_folder_that_people_labelled(kitti) -> None:
    area = "DontCare -1 -1 -10 1.00 2.00 3.00 4.00 -1 -1 -1 -1000 -1000 -1000 -10\n"
    (kitti / "training" / "label_2" / "000007.txt").write_text(area + "\n" + LABEL)
    folder = open_dataset(kitti)
    assert folder.names == ("000000", "000007")
    assert folder.info is None
    frame = folder.read("000007")
    labels = frame.labels
    assert frame.cloud.columns == ("x", "y", "z", "intensity")
    assert not labels.all_around
    assert labels.truth.types == ("Car",)
    np.testing.assert_allclose(labels.truth.boxes.centre, [[10, 0, -0.25]], atol=1e-6)
    np.testing.assert_allclose(labels.truth.boxes.size, [[4, 2, 1.5]])
    assert labels.truth.boxes.yaw[0] == pytest.approx(1.57 - np.pi / 2, abs=1e-6)
    np.testing.assert_array_equal(labels.truth.dont_care_px, [[1, 2, 3, 4]])
    inside = points_in_boxes(frame.cloud.points[:, :3], labels.truth.boxes).sum()
    assert labels.num_points.tolist() == [inside]
    assert open_dataset(kitti / "training").names == folder.names
    assert open_dataset(kitti, ["000007"]).names == ("000007",)


LABELS, POINTS, CALIB = "label_2/000000.txt", "velodyne/000000.bin", "calib/000000.txt"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("label_2/000007.txt", None, "1 of 2 frames of .* have no labels, first label_2/000007.txt"),
        (CALIB, None, "1 of 2 frames of .* have no calibration, first calib/000000.txt"),
        ("velodyne/000008.png", b"\x89PNG", "000008.png is no point cloud"),
        (POINTS, b"\x89PNG" + bytes(12), "000000.bin is a PNG image, not points"),
        (POINTS, b"\xff\xd8\xff\xe0" + bytes(12), "000000.bin is a JPEG image"),
        (LABELS, "Dinosaur" + LABEL[3:], "line 1 has the class 'Dinosaur', which nothing here knows"),
        (LABELS, "\n" + LABEL[:-7] + "\n", "line 2 has 14 words; a label has 15"),
        (LABELS, LABEL.replace("10.00", "ten"), "line 1: could not convert string to float: 'ten'"),
        (LABELS, LABEL.replace("10.00", "nan"), "line 1 holds a value that is not finite"),
        (LABELS, LABEL.replace("4.00", "0.00", 1), "line 1 has a size that is not positive"),
        (LABELS, b"\xff\xfe\x00", "cannot be read as text"),
        (CALIB, "P2: 1 2 3\n", "has no line P2 of 12 numbers"),
        ("dataset.json", "{", "dataset.json is no JSON"),
        ("dataset.json", '{"a": 1}', "does not have the keys classes, columns"),
    ],
)
def test_each_fault_is_told_in_one_sentence(kitti, file: str, content, words: str) -> None:
    path = kitti / "training" / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((FrameError, UsageError), match=words):
        open_dataset(kitti).read("000000")


def test_folders_that_are_no_data_set(tmp_path, kitti) -> None:
    with pytest.raises(UsageError, match="is no labelled data set: there is no folder velodyne"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="has no frame '000001'"):
        open_dataset(kitti, ["000001"])
    (tmp_path / "empty" / "velodyne").mkdir(parents=True)
    with pytest.raises(FrameError, match="holds no frame"):
        open_dataset(tmp_path / "empty")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("schema", 9, "has the schema 9; this version reads 1"),
        ("frames", "many", "cannot be understood: invalid literal"),
        ("columns", 5, "cannot be understood"),
    ],
)
def test_a_strange_dataset_json(tmp_path, written, key: str, value: object, words: str) -> None:
    data = json.loads((written / "once40" / "dataset.json").read_text())
    (tmp_path / "velodyne").mkdir()
    (tmp_path / "dataset.json").write_text(json.dumps({**data, key: value}))
    with pytest.raises(UsageError, match=words):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"seed": 1, "num_points": [1], "velocity_mps": [[0, 0]]}, "describes 1 objects and 1 velocities"),
        ({"seed": 1, "num_points": ["x"], "velocity_mps": []}, "cannot be understood"),
        ({"seed": 1}, "does not have the keys num_points, seed, velocity_mps"),
    ],
)
def test_strange_objects(tmp_path, written, data, words: str) -> None:
    folder = open_dataset(written / "once40")
    (tmp_path / "objects").mkdir()
    (tmp_path / "objects" / "000000.json").write_text(json.dumps(data))
    for part in ("label_2", "calib"):
        (tmp_path / part).symlink_to(folder.root / part)
    moved = type(folder)(root=tmp_path, paths=folder.paths, info=folder.info)
    with pytest.raises(UsageError, match=words):
        moved.read("000000")


def test_a_camera_that_is_no_rotation(tmp_path, written) -> None:
    text = (written / "once40" / "calib" / "000000.txt").read_text()
    path = tmp_path / "calib.txt"
    path.write_text(text.replace("R0_rect: 1 0 0", "R0_rect: 2 0 0"))
    with pytest.raises(UsageError, match="are no rotation"):
        read_camera(path)
    path.write_text("car" + LABEL[3:] + "forklift" + LABEL[3:])
    assert read_labels(path, forward_camera(), ("Car", "Forklift")).types == ("car", "forklift")
