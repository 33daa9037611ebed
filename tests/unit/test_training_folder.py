"""Folders to train on: what is checked before, what a batch is made of, what pasting does to a frame."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from calib.folder_crops import FolderCrops
from calib.object_paste import ObjectBank
from calib.training_folder import open_labelled, open_unlabelled
from dm3d_deploy.config import load_config
from dm3d_deploy.errors import FrameError, UsageError
from dm3d_deploy.evaluation.camera import image_boxes
from dm3d_deploy.geometry.boxes import iou_bev_matrix, points_in_boxes, select_boxes
from dm3d_deploy.simulate import simulate
from dm3d_deploy.training.losses import center_losses
from dm3d_deploy.training.targets import center_targets

TINY = load_config(Path(__file__).resolve().parents[1] / "fixtures" / "centerpoint-tiny.yaml")
FRAMES = 4


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder") / "simulated"
    simulate(root, sensor="hdl64", frames=FRAMES, seed=7)
    return root


@pytest.fixture
def by_people(simulated, tmp_path):
    """The same frames as if people had labelled what the camera saw: no counts, no velocities."""
    root = shutil.copytree(simulated, tmp_path / "people")
    shutil.rmtree(root / "objects")
    (root / "dataset.json").unlink()
    return root


def same(a, b):
    return torch.equal(a.features, b.features) and all(
        torch.equal(x.heat, y.heat) and torch.equal(x.values, y.values)
        for x, y in zip(a.targets, b.targets, strict=True)
    )


def test_a_step_is_its_batch_and_an_epoch_shows_every_frame_once(simulated) -> None:
    folder = open_labelled(simulated, TINY)
    names = tuple(folder.paths)
    assert len(names) == FRAMES
    teams = [FolderCrops(folder, names, seed=3, rank=rank, processes=2, crops=1) for rank in range(2)]
    assert teams[0].steps_of(1) == FRAMES // 2
    assert teams[0].steps_of(3) == 3 * FRAMES // 2
    shown = []
    for crops in teams:
        read = crops._frame
        crops._frame = lambda name, read=read: (shown.append(name), read(name))[1]
    for step in range(2):
        a, b = (crops(step) for crops in teams)
        assert not torch.equal(a.features[:5], b.features[:5])
    assert sorted(shown) == sorted(names)
    fresh = FolderCrops(folder, names, seed=3, rank=1, processes=2, crops=1)
    assert same(fresh(1), teams[1](1))
    assert not same(FolderCrops(folder, names, seed=4, rank=1, processes=2, crops=1)(1), fresh(1))
    with pytest.raises(UsageError, match="a batch of 0 crops is empty"):
        FolderCrops(folder, names, seed=0, crops=0)


def test_pasted_objects_stand_free_and_bring_their_points(simulated) -> None:
    folder = open_labelled(simulated, TINY)
    names = tuple(folder.paths)
    bank, frame = ObjectBank(folder, names), folder.read(names[0])
    old = frame.labelled
    new = bank.paste(names[0], frame, np.random.default_rng(1))
    count = len(new.boxes) - len(old.boxes)
    assert count >= 3
    pasted = select_boxes(new.boxes, np.arange(len(old.boxes), len(new.boxes)))
    assert iou_bev_matrix(pasted, frame.boxes).max() == 0
    among = iou_bev_matrix(pasted, pasted)
    assert among[~np.eye(count, dtype=bool)].max(initial=0) == 0
    others = [folder.read(name) for name in names[1:]]
    for row in range(count):
        box = select_boxes(pasted, np.array([row]))
        home = next(o for o in others if (o.boxes.centre == box.centre).all(axis=1).any())
        own = home.labelled.points[points_in_boxes(home.labelled.points[:, :3], box)[0]]
        found = new.points[points_in_boxes(new.points[:, :3], box)[0]]
        np.testing.assert_array_equal(found, own)  # nothing of the frame is left in the box
        assert len(own) >= 5
        place = int(np.flatnonzero((home.boxes.centre == box.centre).all(axis=1))[0])
        assert home.labels[place] == new.labels[len(old.boxes) + row]
    outside = ~points_in_boxes(old.points[:, :3], pasted).any(axis=0)
    np.testing.assert_array_equal(new.points[: outside.sum()], old.points[outside])
    again = ObjectBank(folder, names).paste(names[0], frame, np.random.default_rng(1))
    np.testing.assert_array_equal(again.points, new.points)
    alone = ObjectBank(folder, names[:1]).paste(names[0], frame, np.random.default_rng(1))
    assert alone is old  # a frame gets no copies of its own objects


def test_what_the_camera_did_not_see_is_not_trained_on(by_people) -> None:
    folder = open_labelled(by_people, TINY)
    name = next(iter(folder.paths))
    raw, cut = folder.folder.read(name), folder.read(name).labelled
    camera = raw.labels.camera
    ahead = np.abs(np.arctan2(cut.points[:, 1], cut.points[:, 0]) - camera.heading)
    assert 0.05 * len(raw.cloud.points) < len(cut.points) < 0.4 * len(raw.cloud.points)
    assert ahead.max() < np.deg2rad(45)
    assert (image_boxes(camera, cut.boxes)[:, 2] > 0).all()
    assert np.isnan(cut.boxes.velocity).all()
    batch = FolderCrops(folder, tuple(folder.paths), seed=0)(0)
    wanted = torch.cat([target.values for target in batch.targets])
    assert wanted.isnan().any()
    branches = [[b.name for b in task if b.name != "hm"] for task in TINY.center_head.branches]
    maps = {
        f"{task}.{branch.name}": torch.zeros(
            batch.size, branch.channels, *batch.targets[0].heat.shape[2:], requires_grad=True
        )
        for task, own in enumerate(TINY.center_head.branches)
        for branch in own
    }
    center_losses(maps, batch.targets, branches).total.backward()
    assert all(value.grad is not None and bool(value.grad.isfinite().all()) for value in maps.values())


def test_an_unknown_velocity_asks_for_nothing(simulated) -> None:
    folder = open_labelled(simulated, TINY)
    frame = folder.read(next(iter(folder.paths))).labelled
    boxes = replace(frame.boxes, velocity=np.full_like(frame.boxes.velocity, np.nan))
    branches = [[b.name for b in task if b.name != "hm"] for task in TINY.center_head.branches]
    losses = []
    for given in (frame.boxes, boxes):
        targets = center_targets(given, frame.labels, TINY, low_m=(-12.8, -12.8), shape=(16, 16))
        known = [torch.nan_to_num(target.values) for target in targets]
        maps = {
            f"{task}.hm": torch.zeros(1, len(names), 16, 16)
            for task, names in enumerate(TINY.center_head.classes_by_task)
        }
        for task, (names, values, target) in enumerate(zip(branches, known, targets, strict=True)):
            at = 0
            for name in names:
                width = 3 if name == "dim" else 1 if name == "center_z" else 2
                maps[f"{task}.{name}"] = torch.zeros(1, width, 16, 16)
                if name != "vel":
                    maps[f"{task}.{name}"].view(width, -1)[:, target.cells] = values[:, at : at + width].t()
                at += width
        losses.append(float(center_losses(maps, targets, branches).box))
    assert losses[0] > 0
    assert losses[1] < 0.2 * losses[0]  # objects that share a cell keep a rest


def test_words_of_other_data_sets_are_understood_and_the_rest_is_counted(by_people) -> None:
    path = sorted((by_people / "label_2").iterdir())[0]
    lines = path.read_text().splitlines()
    words = ["Car", "Van", "Cyclist", "Person_sitting", "Misc", "Tram", "Misc"]
    path.write_text("".join(f"{word} {line.split(' ', 1)[1]}\n" for word, line in zip(words, lines, strict=False)))
    folder = open_labelled(by_people, TINY)
    names = [TINY.class_names[label] if label >= 0 else None for label in folder.labels[path.stem]]
    assert names == ["car", "car", "bicycle", "pedestrian", None, None, None]
    assert folder.left_out == {"Misc": 2, "Tram": 1}
    assert folder.sizes_m["car"][0] == pytest.approx(4.3, abs=1.5)
    kitti = replace(TINY, dataset="KittiDataset", class_names=("Car", "Pedestrian", "Cyclist"))
    labels = open_labelled(by_people, kitti).labels[path.stem].tolist()
    assert labels == [0, -1, 2, -1, -1, -1, -1]  # KITTI's own detectors take a van for background


def test_every_bad_folder_is_one_sentence(by_people, tmp_path) -> None:
    labels, clouds = (sorted((by_people / part).iterdir()) for part in ("label_2", "velodyne"))
    text = labels[1].read_text()
    labels[1].write_text(text.replace(text.split(" ", 1)[0], "Unicorn", 1))
    with pytest.raises(UsageError, match=r"000001\.txt, line 1 has the class 'Unicorn', which nothing here knows"):
        open_labelled(by_people, TINY)
    labels[1].unlink()
    with pytest.raises(FrameError, match=r"1 of 4 frames of .* have no labels, first label_2/000001\.txt") as told:
        open_labelled(by_people, TINY)
    assert told.value.fix == "add the files, or move the frames that lack them out of velodyne"  # build, too, says so
    labels[1].write_text(text)
    points = clouds[2].read_bytes()
    clouds[2].write_bytes(b"\x89PNG\r\n" + points)
    for opened in (open_labelled, open_unlabelled):
        with pytest.raises(FrameError, match=r"000002\.bin is a PNG image, not points"):
            opened(by_people, TINY)
    clouds[2].write_bytes(points)
    strange = replace(TINY, class_names=("tram",))
    with pytest.raises(UsageError, match=r"labels .*car.*, and centerpoint-tiny detects tram"):
        open_labelled(by_people, strange)
    with pytest.raises(UsageError, match="is no labelled data set"):
        open_labelled(tmp_path / "nothing", TINY)


def test_a_folder_without_labels_gives_batches_for_a_teacher(simulated, tmp_path) -> None:
    shutil.copytree(simulated / "velodyne", tmp_path / "frames")
    folder = open_unlabelled(tmp_path / "frames", TINY)
    batch = FolderCrops(folder, tuple(folder.paths), seed=0)(0)
    assert len(batch.features) > 500
    assert [len(target.cells) for target in batch.targets] == [0] * 6
    far = replace(TINY, voxels=replace(TINY.voxels, point_range_m=(90.0, 90.0, -5.0, 115.6, 115.6, 3.0)))
    folder = open_unlabelled(tmp_path / "frames", far)
    with pytest.raises(FrameError, match=r"000000\.bin has .* points, and 40 crops of it held fewer than 200 each"):
        FolderCrops(folder, tuple(folder.paths)[:1], seed=0)(0)
