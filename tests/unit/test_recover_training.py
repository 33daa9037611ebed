"""Steps of recovery that train behind the masks: judged on frames, or by labels, that they did not see."""

import json

import numpy as np
import pytest
import torch
from run_sample import Noted, tiny_recipe
from safetensors.numpy import load_file

from calib import training_frames
from calib.pool import FramePool
from dm3d_deploy.build import build
from dm3d_deploy.errors import FrameError, UsageError
from dm3d_deploy.outside import outside_digest
from dm3d_deploy.pointcloud import Boxes3D
from dm3d_deploy.recipe import Recipe
from dm3d_deploy.stages import RunContext
from dm3d_deploy.steps import recover_by_training
from dm3d_deploy.training.batch import Batch
from dm3d_deploy.training.loop import TrainingDiverged
from dm3d_deploy.training.targets import center_targets, collate


class Crops:
    """Random voxels with a box in place of simulated scenes, which take seconds each."""

    def __init__(self, config, *, seed, crops, rank=0):
        self.columns, self.seed, self.config = len(config.voxels.columns), (seed, rank), config
        self.shape = (config.voxels.grid_zyx[0] + 1, *config.voxels.grid_zyx[1:])

    def __call__(self, step):
        random = np.random.default_rng((*self.seed, step))
        cells = np.unique(random.integers(0, self.shape, (300, 3)), axis=0)
        coords = torch.from_numpy(np.pad(cells, ((0, 0), (1, 0))).astype(np.int64))
        features = torch.from_numpy(random.normal(size=(len(cells), self.columns)).astype(np.float32))
        return Batch(features=features, coords=coords, shape_zyx=self.shape, size=1, targets=self.targets())

    def targets(self):
        stride, low_m = self.config.head.stride, np.array(self.config.voxels.point_range_m[:2])
        box = Boxes3D(
            centre=np.array([[*(low_m + 4), -1]], np.float32), size=np.array([[4, 2, 1.5]], np.float32),
            yaw=np.zeros(1, np.float32), velocity=np.zeros((1, 2), np.float32),
        )  # fmt: skip
        shape = (self.shape[1] // stride, self.shape[2] // stride)
        return collate([center_targets(box, np.zeros(1, np.int64), self.config, low_m=low_m, shape=shape)])


def test_distillation_is_tried_behind_the_reconstruction_and_judged(tiny_frames, tmp_path, monkeypatch):
    monkeypatch.setattr(training_frames, "SimulatedCrops", Crops)
    recipe = tiny_recipe(tiny_frames, recover="distill", recover_steps=3)
    states = []
    for name in ("one", "two"):
        build(recipe, tmp_path / name, last="recover")
        told = json.loads((tmp_path / name / "work" / "recovery.json").read_text())
        first, second = told["steps"]
        assert [first["method"], second["method"]] == ["layer-wise reconstruction", "label-free distillation"]
        assert second["before"] == (first["after"] if first["accepted"] else first["before"])
        assert second["accepted"] == (second["after"] < second["before"])
        states.append(load_file(tmp_path / name / "weights" / "pruned.safetensors"))
        assert masks_hold(tmp_path / name)
        assert not list((tmp_path / name / "work").glob(".*"))
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])


def test_steps_that_move_no_weight_leave_the_distortion(tiny_frames, tmp_path, monkeypatch):
    """What is judged is what was trained, in whatever order of memory the training left it."""
    monkeypatch.setattr(training_frames, "SimulatedCrops", Crops)
    monkeypatch.setattr(recover_by_training, "DISTILL_RATE", 1e-9)
    build(tiny_recipe(tiny_frames, recover="distill", recover_steps=2), tmp_path, last="recover")
    told = json.loads((tmp_path / "work" / "recovery.json").read_text())["steps"][1]
    assert told["after"] == pytest.approx(told["before"], rel=1e-3)


def masks_hold(root):
    state, masks = (load_file(root / "weights" / f"{name}.safetensors") for name in ("pruned", "masks"))
    return not any(state[f"{layer}.weight"][~keep].any() for layer, keep in masks.items())


def test_fine_tuning_is_judged_by_labels_of_other_scenes(tiny_frames, tmp_path, monkeypatch):
    monkeypatch.setattr(training_frames, "SimulatedCrops", Crops)
    recipe = tiny_recipe(tiny_frames, recover="finetune", recover_steps=6)
    build(recipe, tmp_path, last="recover")
    told = json.loads((tmp_path / "work" / "recovery.json").read_text())
    first, second = told["steps"]
    assert (first["measure"], second["measure"]) == ("distortion", "labelled loss")
    assert second["method"] == "fine-tuning with labels"
    assert second["accepted"]  # one box in one place is soon learned
    assert second["after"] < second["before"]
    assert "of 8 batches of other scenes fell" in second["reason"]
    assert told["before"] == first["before"]
    assert told["after"] not in (first["after"], second["after"])  # the distortion behind the fine-tuning
    assert masks_hold(tmp_path)

    monkeypatch.setattr(recover_by_training, "PEAK_RATE", 9.0)
    build(recipe, tmp_path, first="recover", last="recover")
    told = json.loads((tmp_path / "work" / "recovery.json").read_text())
    first, second = told["steps"]
    assert not second["accepted"]
    assert "did not fall" in second["reason"]
    assert told["accepted"] == first["accepted"]
    assert not first["accepted"] or told["after"] == first["after"]


def test_training_data_is_an_input_like_the_frames(tiny_frames, tmp_path):
    folder = tmp_path / "drives"
    (folder / "label_2").mkdir(parents=True)
    (folder / "label_2" / "0.txt").write_text("Car")
    recipe = tiny_recipe(tiny_frames, recover="finetune", recover_data=str(folder))
    first = outside_digest("recover_data", recipe)
    assert first == outside_digest("recover_data", recipe) != outside_digest("recover_data", tiny_recipe(tiny_frames))
    (folder / "label_2" / "0.txt").write_text("Van")
    assert outside_digest("recover_data", recipe) != first
    with pytest.raises(FrameError, match="no folder nowhere to learn from"):
        outside_digest("recover_data", tiny_recipe(tiny_frames, recover="distill", recover_data="nowhere"))
    with pytest.raises(UsageError, match="--recover bn learns from no --recover-data"):
        tiny_recipe(tiny_frames, recover="bn", recover_data=str(folder))


def test_no_steps_are_refused(tiny_frames):
    with pytest.raises(UsageError, match="recover_steps is 0"):
        tiny_recipe(tiny_frames, recover_steps=0)


def test_a_training_that_diverges_names_what_a_build_can_do(tmp_path):
    run = RunContext(root=tmp_path, recipe=Recipe(model="centerpoint", target=0.5), watch=Noted(), pool=FramePool())
    told = pytest.raises(TrainingDiverged, match=r"diverged at step 3\. Fix: recover without training")
    with told as caught, recover_by_training._alone(run):
        raise TrainingDiverged("the training diverged at step 3.", fix="a lower peak rate", step=3)
    assert caught.value.step == 3
