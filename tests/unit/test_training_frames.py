"""Simulated crops: the same for the same step, turned without losing a point, aligned to the grid; whole trainings."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from calib.crops import Window, turned
from calib.held_out import model_labels, seen_objects
from calib.simulator.frame import simulate_frame
from calib.training_frames import SimulatedCrops, labelled
from dm3d_deploy.config import config_from_text, load_config
from dm3d_deploy.errors import StaleArtifact, UsageError
from dm3d_deploy.evaluate import evaluate
from dm3d_deploy.train import train
from dm3d_deploy.training.log import STATE_NAME

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "fixtures" / "centerpoint-tiny.yaml"
SLIM = load_config("centerpoint-slim")


def points_in(points, boxes):
    counts = []
    for centre, size, yaw in zip(boxes.centre, boxes.size, boxes.yaw, strict=True):
        away = points[:, :3] - centre
        along = np.cos(yaw) * away[:, 0] + np.sin(yaw) * away[:, 1]
        across = np.cos(yaw) * away[:, 1] - np.sin(yaw) * away[:, 0]
        local = np.abs(np.stack([along, across, away[:, 2]], axis=1))
        counts.append(int((local <= size / 2 * 1.001).all(axis=1).sum()))
    return counts


def test_a_step_is_its_batch_whatever_came_before() -> None:
    config = load_config(TINY)
    running, fresh = SimulatedCrops(config, seed=3), SimulatedCrops(config, seed=3)
    batches = [running(step) for step in range(6)]
    again = fresh(5)
    assert torch.equal(batches[5].features, again.features)
    assert torch.equal(batches[5].targets[0].heat, again.targets[0].heat)
    other = SimulatedCrops(config, seed=3, rank=1)(5)
    assert not torch.equal(batches[5].features[:10], other.features[:10])
    assert other.shape_zyx == again.shape_zyx


def test_turning_keeps_points_in_their_boxes() -> None:
    frame = labelled(simulate_frame(5, sensor="hdl64"), SLIM, min_points=5)
    before = points_in(frame.points, frame.boxes)
    assert sum(before) > 500
    random = np.random.default_rng(0)
    for _ in range(6):
        points, boxes = turned(frame, random)
        after = points_in(points, boxes)
        assert np.abs(np.subtract(before, after)).max() <= 2  # rounding at the faces
        speed = np.hypot(*boxes.velocity.T) / boxes.size[:, 0]
        np.testing.assert_allclose(speed, np.hypot(*frame.boxes.velocity.T) / frame.boxes.size[:, 0], rtol=1e-4)


def test_crops_lie_on_the_grid_and_hold_what_their_targets_say() -> None:
    crops = SimulatedCrops(SLIM, seed=1)
    objects = 0
    for step in range(4):
        batch = crops(step)
        depth, height, width = batch.shape_zyx
        assert depth == 41
        assert (height, width) in ((256, 256), (384, 384))
        assert batch.size == (2 if height == 256 else 1)
        limits = torch.tensor([batch.size, depth - 1, height, width])
        assert bool((batch.coords >= 0).all() & (batch.coords < limits).all())
        for target in batch.targets:
            assert target.heat.shape[2:] == (height // 8, width // 8)
            assert int((target.heat == 1).sum()) <= len(target.cells)
            objects += len(target.cells)
        # absolute coordinates: the first two columns may not be those of the crop
        assert batch.features[:, :2].abs().max() <= 51.3
    assert objects > 4


def test_a_crop_never_exceeds_the_range_of_its_model() -> None:
    tiny = load_config(TINY)
    assert Window.of(SLIM, 25.6).cells == (32, 32)
    assert Window.of(SLIM, 38.4).size_m == pytest.approx((38.4, 38.4))
    assert Window.of(tiny, 38.4).cells == (16, 16)
    assert SimulatedCrops(tiny, seed=0)(0).shape_zyx == (41, 128, 128)


def test_labels_are_the_models_own() -> None:
    text = TINY.read_text(encoding="utf-8")
    some = config_from_text(
        text.replace("[car, truck, construction_vehicle, bus, trailer, barrier, motorcycle, bicycle, ", "[")
        .replace("- [car]\n", "- [traffic_cone]\n")
        .replace("            - [truck, construction_vehicle]\n            - [bus, trailer]\n", "")
        .replace("            - [barrier]\n            - [motorcycle, bicycle]\n", "")
        .replace("- [pedestrian, traffic_cone]", "- [pedestrian]"),
        "two.yaml",
    )
    assert model_labels(some).tolist() == [-1] * 8 + [0, 1]
    frame = simulate_frame(3)
    _, labels = seen_objects(frame, some, min_points=1)
    assert np.bincount(labels, minlength=2).tolist() == [
        int(((frame.labels == label) & (frame.num_points >= 1)).sum()) for label in (8, 9)
    ]
    strange = config_from_text(text.replace("car,", "tram,", 1).replace("[car]", "[tram]"), "tram.yaml")
    with pytest.raises(UsageError, match=r"tram detects tram, which no simulated scene holds"):
        SimulatedCrops(strange, seed=0)
    with pytest.raises(UsageError, match="a batch of 0 crops"):
        SimulatedCrops(SLIM, seed=0, crops=0)


def test_a_training_of_two_processes_leaves_weights_that_evaluate(tmp_path) -> None:
    """In a program of its own: children are started anew, and import what started them."""
    program = (
        "import sys\nfrom dm3d_deploy.train import train\n"
        "if __name__ == '__main__':\n"
        f"    print(train({str(TINY)!r}, out=sys.argv[1], steps=2, processes=2))\n"
    )
    script = tmp_path / "go.py"
    script.write_text(program)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "out")],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    weights = Path(done.stdout.strip())
    with pytest.raises(UsageError, match=r"began with other settings: steps was 2 and is 3; seed was 0 and is 1"):
        train(str(TINY), out=weights.parent, steps=3, seed=1, resume=True)
    result = evaluate(weights, model=str(TINY), frames=1, sensor="hdl64")
    assert result.frames == 1
    assert 0 <= result.summary["mAP"] <= 100


def test_settings_that_exclude_each_other(tmp_path) -> None:
    with pytest.raises(UsageError, match="0 processes train nothing"):
        train(str(TINY), out=tmp_path, steps=1, processes=0)
    with pytest.raises(UsageError, match="length of a training is given once"):
        train(str(TINY), out=tmp_path)
    with pytest.raises(UsageError, match="holds no training to resume"):
        train(str(TINY), out=tmp_path, steps=1, resume=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(UsageError, match=r"holds no training to resume.*start one, without --resume"):
        train(str(TINY), out=tmp_path, steps=1, resume=True)
    (tmp_path / STATE_NAME).write_bytes(b"")
    with pytest.raises(StaleArtifact, match="is no plan of a training"):
        train(str(TINY), out=tmp_path, steps=1, resume=True)
