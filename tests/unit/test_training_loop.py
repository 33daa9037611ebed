"""The loop: it learns, it resumes exactly, it stops at nonsense, and what it saved is whole."""

import json
import math
import os
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from training_sample import CONFIG, SIZES, batches, detector

from dm3d_deploy.errors import CheckpointError, OutputError, UsageError
from dm3d_deploy.live_score import LiveScore, simulated_live_frames
from dm3d_deploy.models.checkpoints import load_checkpoint
from dm3d_deploy.models.detector import build_detector
from dm3d_deploy.training.checkpoint import Progress, save_half
from dm3d_deploy.training.log import LOG_NAME, STATE_NAME, WEIGHTS_NAME, LogRow, ScoreRow
from dm3d_deploy.training.loop import COLUMN_SCALE, TrainingDiverged, TrainSettings, raw_maps, train_detector
from dm3d_deploy.training.schedule import OneCycle
from dm3d_deploy.training.stop import SIGNALS, Stop

STEPS = 40


@pytest.fixture(autouse=True)
def _one_thread():
    """Layers this small are much slower on several threads, and training uses one thread a process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def settings_for(steps=STEPS, **changes):
    return TrainSettings(steps=steps, log_every=10, half_2d=False, **changes)


def test_it_learns(tmp_path) -> None:
    rows = []
    made = detector()
    train_detector(made, batches, settings_for(), out=tmp_path, report=rows.append)
    assert [row.step for row in rows] == [10, 20, 30, 40]
    assert rows[-1].losses["heat"] < 0.5 * rows[0].losses["heat"]
    assert not made.training
    logged = [json.loads(line) for line in (tmp_path / LOG_NAME).read_text().splitlines()]
    assert [row["heat"] for row in logged] == [row.losses["heat"] for row in rows]


def test_saved_weights_are_those_in_memory(tmp_path) -> None:
    """Also the first convolution, which is trained on scaled columns."""
    made, again = detector(), build_detector(CONFIG)
    train_detector(made, batches, settings_for(5), out=tmp_path)
    load_checkpoint(again, tmp_path / WEIGHTS_NAME)
    assert len((tmp_path / LOG_NAME).read_text().splitlines()) == 1  # a run shorter than a row still tells its losses
    for name, value in made.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert int(again.global_step) == 5


def test_scaling_the_columns_changes_no_output() -> None:
    assert all(math.log2(factor).is_integer() for factor in COLUMN_SCALE.values())


def test_a_resumed_training_equals_an_unbroken_one(tmp_path) -> None:
    whole = detector()
    train_detector(whole, batches, settings_for(12), out=tmp_path / "whole")
    broken = detector()

    def interrupted(step):
        if step == 7:
            raise KeyboardInterrupt
        return batches(step)

    with pytest.raises(KeyboardInterrupt):
        train_detector(broken, interrupted, settings_for(12, save_every_s=0.0), out=tmp_path / "broken")
    resumed = build_detector(CONFIG)
    progress = train_detector(resumed, batches, settings_for(12), out=tmp_path / "broken", resume=True)
    assert progress.step == 12
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_training_that_is_asked_to_stop_is_saved_at_its_step(tmp_path) -> None:
    """Long before the first checkpoint, and by a signal that came while the step was done."""
    whole, rows, stop = detector(), [], Stop()
    train_detector(whole, batches, settings_for(12), out=tmp_path / "whole")

    def interrupted(step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return batches(step)

    with stop.heard():
        progress = train_detector(
            detector(), interrupted, settings_for(12), out=tmp_path / "broken", report=rows.append, stop=stop
        )
    assert (progress.step, stop.number) == (7, signal.SIGINT)
    assert [row.step for row in rows] == [7]  # what was not logged yet is
    resumed = build_detector(CONFIG)
    assert train_detector(resumed, batches, settings_for(12), out=tmp_path / "broken", resume=True).step == 12
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_second_sigint_is_obeyed_at_once_and_a_second_sigterm_is_not() -> None:
    stop, before = Stop(), [signal.getsignal(number) for number in SIGNALS]
    with stop.heard(), stop.patient():
        for number in (signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_signals_that_are_ignored_stay_so_and_a_thread_hears_none() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and scripts do with what runs behind them
    try:
        with Stop().heard():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    heard = []

    def listen():
        with Stop().heard():
            heard.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert heard == [signal.getsignal(signal.SIGTERM)]


def test_a_score_is_broken_off_between_its_frames(monkeypatch) -> None:
    stop, made = Stop(), detector()
    frames = simulated_live_frames(CONFIG, 2)
    detected = []

    def detect(given, cloud):
        stop.number = signal.SIGINT
        detected.append(cloud)

    monkeypatch.setattr("dm3d_deploy.live_score.detect_in_torch", detect)
    assert LiveScore(lambda: frames, stop)(made) is None
    assert len(detected) == 1


def test_scores_come_as_asked_and_change_nothing(tmp_path) -> None:
    """Scored or not, interrupted and resumed or not, the weights are the same bits; only saved weights are scored."""
    plain, scored, resumed = detector(), detector(), build_detector(CONFIG)
    train_detector(plain, batches, settings_for(6), out=tmp_path / "plain")
    seen, rows = [], []

    def score(given):
        assert not given.training
        assert not any(module.training for module in given.modules())
        seen.append(given.state_dict()["backbone_3d.conv_input.0.weight"].clone())
        return {"car": 50.0, "mean": 50.0}

    def interrupted(step):
        if step == 4:
            raise KeyboardInterrupt
        return batches(step)

    often = settings_for(6, score_every_s=1e-9, save_every_s=0.0)
    with pytest.raises(KeyboardInterrupt):
        train_detector(scored, interrupted, often, out=tmp_path / "scored", score=score, report=rows.append)
    saved = build_detector(CONFIG)
    load_checkpoint(saved, tmp_path / "scored" / WEIGHTS_NAME)
    assert torch.equal(seen[-1], saved.state_dict()["backbone_3d.conv_input.0.weight"])
    train_detector(resumed, batches, often, out=tmp_path / "scored", score=score, resume=True, report=rows.append)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    scores = [row for row in rows if isinstance(row, ScoreRow)]
    assert [row.step for row in scores] == [2, 3, 4, 5, 6]  # no time is known behind the first step
    logged = [json.loads(line) for line in (tmp_path / "scored" / LOG_NAME).read_text().splitlines()]
    assert [row["ap_percent"] for row in logged if "ap_percent" in row] == [{"car": 50.0, "mean": 50.0}] * 5
    assert [row.step for row in rows if isinstance(row, LogRow)] == [6]
    with pytest.raises(UsageError, match="a score every 0 s cannot be"):
        settings_for(score_every_s=0)


def test_frozen_norms_keep_their_statistics_and_learn_their_scales(tmp_path) -> None:
    made = detector()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    train_detector(made, batches, settings_for(3, frozen_norms=True), out=tmp_path)
    after = made.state_dict()
    running = [name for name in after if "running" in name]
    assert len(running) > 20
    assert all(torch.equal(before[name], after[name]) for name in running)
    assert not torch.equal(before["backbone_2d.blocks.0.2.weight"], after["backbone_2d.blocks.0.2.weight"])


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(tmp_path) -> None:
    def poisoned(step):
        batch = batches(step)
        return batch if step < 3 else replace(batch, features=batch.features * float("nan"))

    with pytest.raises(TrainingDiverged, match=r"at step 3: heat loss nan.*start anew with a lower peak rate") as told:
        train_detector(detector(), poisoned, settings_for(save_every_s=0.0), out=tmp_path)
    assert told.value.step == 3
    load_checkpoint(build_detector(CONFIG), tmp_path / WEIGHTS_NAME)
    load_checkpoint(build_detector(CONFIG), tmp_path / STATE_NAME)


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch) -> None:
    train_detector(detector(), batches, settings_for(2), out=tmp_path)
    before = (tmp_path / WEIGHTS_NAME).read_bytes()

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dm3d_deploy.artifacts._write_bytes", full)
    with pytest.raises(OutputError, match="disk is full"):
        train_detector(detector(), batches, settings_for(2), out=tmp_path)
    assert (tmp_path / WEIGHTS_NAME).read_bytes() == before


def test_a_disk_that_is_full_behind_the_state_keeps_the_old_pair(tmp_path) -> None:
    """State and weights change together: what is resumed is what is deployed."""
    train_detector(detector(), batches, settings_for(2), out=tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in (STATE_NAME, WEIGHTS_NAME)}
    (tmp_path / f"{WEIGHTS_NAME}.partial").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=f"{WEIGHTS_NAME} could not be written: the disk is full"):
        train_detector(build_detector(CONFIG), batches, settings_for(4), out=tmp_path, resume=True)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert not list(tmp_path.glob("*.partial"))
    again = build_detector(CONFIG)
    assert train_detector(again, batches, settings_for(4), out=tmp_path, resume=True).step == 4
    assert int(again.global_step) == 4


def test_resuming_nothing_and_resuming_bare_weights(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=f"there is no checkpoint .*{STATE_NAME}"):
        train_detector(detector(), batches, settings_for(2), out=tmp_path, resume=True)
    torch.save({"model_state": detector().state_dict()}, tmp_path / STATE_NAME)
    with pytest.raises(CheckpointError, match=r"no state of a training: KeyError.*start another from it: --init"):
        train_detector(detector(), batches, settings_for(2), out=tmp_path, resume=True)


def test_what_runs_behind_a_step_has_the_last_word(tmp_path) -> None:
    made = detector()
    weight = made.backbone_2d.blocks[0][1].weight

    def mask():
        with torch.no_grad():
            weight[:, ::2] = 0

    train_detector(made, batches, settings_for(3), out=tmp_path, after_step=mask)
    assert not weight[:, ::2].any()
    assert weight[:, 1::2].any()


def test_a_crop_needs_no_detector_of_its_own() -> None:
    """On the detector's own grid the loop's forward pass is the detector's."""
    made, batch = detector(), batches(0)
    made.eval()
    with torch.no_grad():
        maps = raw_maps(made, batch, half_2d=False)
        own = made(batch.features, batch.coords, 2)
    for name, value in own.items():
        torch.testing.assert_close(maps[name], value, rtol=1e-4, atol=1e-4)


def test_start_weights_say_the_average_box() -> None:
    made, batch = detector(), batches(0)
    head = made.dense_head.heads_list[1]
    np.testing.assert_allclose(
        head.dim[1].bias.detach(), np.log([SIZES["bus"], SIZES["trailer"]]).mean(axis=0), rtol=1e-6
    )
    assert head.hm[2].bias.unique().item() == pytest.approx(-2.19)
    again = detector()
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))
    made.train()
    maps = raw_maps(made, batch, half_2d=False)
    assert all(value.abs().max() < 20 for value in maps.values())


def test_the_cycle_climbs_and_falls() -> None:
    cycle = OneCycle(peak_rate=0.01)
    assert cycle.at(0) == pytest.approx((0.001, 0.95))
    assert cycle.at(0.15) == pytest.approx((0.01, 0.85))
    assert cycle.at(1.0) == pytest.approx((0.01 * 0.005, 0.95))
    rates = [cycle.at(i / 100)[0] for i in range(101)]
    assert rates == sorted(rates[:16]) + sorted(rates[16:], reverse=True)
    with pytest.raises(UsageError, match=r"peak learning rate of 0 cannot train"):
        OneCycle(peak_rate=0)


def test_the_length_is_given_once_and_pauses_do_not_count() -> None:
    for wrong in ({}, {"minutes": 1.0, "steps": 5}):
        with pytest.raises(UsageError, match="length of a training is given once"):
            TrainSettings(**wrong)
    with pytest.raises(UsageError, match="a training of -1 cannot be"):
        TrainSettings(minutes=-1)
    settings = TrainSettings(minutes=2.0)
    assert settings.share_done(Progress(step=10**6, active_s=60.0)) == 0.5
    assert settings.share_done(Progress(active_s=1e9)) == 1.0


def test_delivered_weights_are_halves_that_load(tmp_path) -> None:
    made, again = detector(), build_detector(CONFIG)
    save_half(made, tmp_path / "half.safetensors")
    load_checkpoint(again, tmp_path / "half.safetensors")
    for name, value in made.state_dict().items():
        found = again.state_dict()[name]
        halved = value.half().float() if value.ndim > 1 else value
        assert torch.equal(found, halved), name
    with torch.no_grad():
        made.backbone_2d.blocks[0][1].weight[0, 0, 0, 0] = 1e5
    with pytest.raises(CheckpointError, match=r"backbone_2d.blocks.0.1.weight holds a weight of 100000, and float16"):
        save_half(made, tmp_path / "large.safetensors")
