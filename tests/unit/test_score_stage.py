"""The stage that counts AP: what it needs, what it leaves, and why it may have nothing to say."""

import json
from dataclasses import replace

import pytest
from report_sample import sample_report
from run_sample import Noted, tiny_recipe

from calib.calibration_set import plan_frames
from calib.held_out import FIRST_SCORE_SEED, FIRST_SEED, FIRST_TRAINING_SEED
from calib.pool import FramePool
from dm3d_deploy.config import load_config
from dm3d_deploy.reporting.facts import verdict_sentence
from dm3d_deploy.reporting.schema import validate_report
from dm3d_deploy.stages import RunContext
from dm3d_deploy.steps import score as stage
from dm3d_deploy.steps.score import score


def context(root, frames, pool=None, **changes):
    return RunContext(root=root, recipe=tiny_recipe(frames, **changes), watch=Noted(), pool=pool or FramePool())


def result(root):
    return json.loads((root / "work" / "score.json").read_text())


@pytest.fixture
def trained_run(run_copy):
    """The tiny run, its noise passed off as learned."""
    info = run_copy / "work" / "model.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "trained": True}))
    return run_copy


def test_untrained_weights_are_not_scored(tiny_run) -> None:
    found = result(tiny_run)
    assert found["none_because"] == "the weights are UNTRAINED and find nothing that could be counted."
    assert (found["means"], found["classes"], found["data"]) == ([], [], None)


@pytest.mark.parametrize("accepted", [True, False])
def test_dense_masked_and_recovered_on_scenes_of_their_own(trained_run, tiny_frames, accepted: bool) -> None:
    recovery = trained_run / "work" / "recovery.json"
    recovery.write_text(json.dumps({**json.loads(recovery.read_text()), "accepted": accepted}))
    before = {path.name for path in (trained_run / "work").iterdir()}
    with FramePool() as pool:
        score(context(trained_run, tiny_frames, pool, score_frames=2))
    assert {path.name for path in (trained_run / "work").iterdir()} == before
    found = result(trained_run)
    assert found["none_because"] is None
    assert found["data"] == "2 simulated nuscenes32 scenes, seeds 1000900000 to 1000900001"
    assert [row["name"] for row in found["means"]] == ["vulnerable road users", "all classes"]
    whole = [row for row in found["classes"] if row["subset"] == "all"]
    assert [row["name"] for row in whole][:4] == ["pedestrian", "bicycle", "motorcycle", "car"]
    assert [row["vulnerable"] for row in whole] == [True] * 3 + [False] * 7
    cars = next(row for row in whole if row["name"] == "car")
    assert cars["objects"] > 0
    assert cars["dense_percent"] is not None
    assert cars["masked_percent"] is not None
    assert (cars["recovered_percent"] is not None) == accepted
    shipped = cars["recovered_percent"] if accepted else cars["masked_percent"]
    assert cars["change_points"] == pytest.approx(shipped - cars["dense_percent"])
    assert cars["change_low_points"] is None  # two frames tell nothing of their spread
    report = {**sample_report(trained=True), "ap": found}
    report["verdict"]["sentence"] = verdict_sentence(report)
    validate_report(report)
    ranges = [row["subset"] for row in found["classes"] if row["name"] == "car"]
    assert ranges == ["all", "0-30 m", "30-50 m"]


def test_none_asked_for(trained_run, tiny_frames) -> None:
    score(context(trained_run, tiny_frames, score_frames=0))
    assert result(trained_run)["none_because"] == "it was not asked for (--score-frames 0)."


def test_foreign_classes_and_empty_scenes_are_a_sentence(trained_run, tiny_frames, monkeypatch) -> None:
    config = load_config(trained_run / "model.yaml")
    foreign = replace(config, class_names=tuple(f"tram{i}" for i in range(len(config.class_names))))
    monkeypatch.setattr(stage, "load_config", lambda path: foreign)
    score(context(trained_run, tiny_frames))
    assert "none of which the metric 'nuscenes' knows" in result(trained_run)["none_because"]
    near = replace(config, voxels=replace(config.voxels, point_range_m=(-0.2, -0.2, -5.0, 0.2, 0.2, 3.0)))
    monkeypatch.setattr(stage, "load_config", lambda path: near)
    monkeypatch.setattr(stage, "simulate_scenes", lambda file, *rest, **more: _drawn(file, config, **more))
    with FramePool() as pool:
        score(context(trained_run, tiny_frames, pool, score_frames=1))
    assert "hold no object of pedestrian, bicycle" in result(trained_run)["none_because"]


def _drawn(file, config, **more):
    from dm3d_deploy.held_out_score import simulate_scenes

    return simulate_scenes(file, config, **more)


def test_no_seed_of_anything_else_reaches_the_scenes() -> None:
    scored = range(FIRST_SCORE_SEED, FIRST_SCORE_SEED + 100_000)
    for seed in (0, 1, 7, 999, 1000, 1001, 2000):
        frames = plan_frames(
            "simulated", dataset="NuScenesDataset", calibration=500, selection=200, held_out=200, seed=seed
        ).frames
        assert len(frames) == 900
        assert not [frame.seed for frame in frames if frame.seed in scored]
    assert scored.start >= FIRST_SEED + 900_000
    assert scored.stop <= FIRST_TRAINING_SEED
