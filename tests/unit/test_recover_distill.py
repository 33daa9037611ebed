"""Distillation behind the masks: a step like the others, judged on frames that it did not see."""

import json

import numpy as np
import pytest
import torch
from run_sample import tiny_recipe
from safetensors.numpy import load_file

from calib import training_frames
from dm3d_deploy.build import build
from dm3d_deploy.errors import UsageError
from dm3d_deploy.training.batch import Batch


class Crops:
    """Random voxels in place of simulated scenes, which take seconds each."""

    def __init__(self, config, *, seed, crops):
        self.columns, self.seed = len(config.voxels.columns), seed
        self.shape = (config.voxels.grid_zyx[0] + 1, *config.voxels.grid_zyx[1:])

    def __call__(self, step):
        random = np.random.default_rng((self.seed, step))
        cells = np.unique(random.integers(0, self.shape, (300, 3)), axis=0)
        coords = torch.from_numpy(np.pad(cells, ((0, 0), (1, 0))).astype(np.int64))
        features = torch.from_numpy(random.normal(size=(len(cells), self.columns)).astype(np.float32))
        return Batch(features=features, coords=coords, shape_zyx=self.shape, size=1, targets=())


def test_distillation_is_tried_behind_the_reconstruction_and_judged(tiny_frames, tmp_path, monkeypatch):
    monkeypatch.setattr(training_frames, "SimulatedCrops", Crops)
    recipe = tiny_recipe(tiny_frames, recover="distill", distill_steps=3)
    states = []
    for name in ("one", "two"):
        build(recipe, tmp_path / name, last="recover")
        told = json.loads((tmp_path / name / "work" / "recovery.json").read_text())
        first, second = told["steps"]
        assert [first["method"], second["method"]] == ["layer-wise reconstruction", "label-free distillation"]
        assert second["before"] == (first["after"] if first["accepted"] else first["before"])
        assert second["accepted"] == (second["after"] < second["before"])
        states.append(load_file(tmp_path / name / "weights" / "pruned.safetensors"))
        masks = load_file(tmp_path / name / "weights" / "masks.safetensors")
        assert not any(states[-1][f"{layer}.weight"][~keep].any() for layer, keep in masks.items())
        assert not list((tmp_path / name / "work").glob(".*"))
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])


def test_no_steps_are_refused(tiny_frames):
    with pytest.raises(UsageError, match="distill_steps is 0"):
        tiny_recipe(tiny_frames, distill_steps=0)
