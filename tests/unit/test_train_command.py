"""The `train` command: what excludes what, fine-tuning and distilling runs, torchrun, and every bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from run_sample import TINY
from safetensors.numpy import load_file

from calib.folder_crops import FolderCrops
from dm3d_deploy import train_job
from dm3d_deploy.config import load_config
from dm3d_deploy.models.checkpoints import save_weights
from dm3d_deploy.models.detector import build_detector
from dm3d_deploy.models.seeded import seed_weights
from dm3d_deploy.simulate import simulate
from dm3d_deploy.train_job import place_of, prepare
from dm3d_deploy.train_plan import TrainPlan
from dm3d_deploy.training.log import STATE_NAME
from dm3d_deploy.training.stop import Stop

ROOT = Path(__file__).resolve().parents[2]
LINE = ("train", "--model", TINY, "--processes", "1")
TWO_STEPS = ("train", "--model", TINY, "--steps", "2")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "folder"
    simulate(root, sensor="hdl64", frames=4, seed=7)
    return root


@pytest.fixture
def labelled(folder, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(folder, tmp_path / "folder")


def error_of(answer):
    code, out, err = answer
    assert out == ""
    lines = err.strip().splitlines()
    assert [line[:7] for line in lines] == ["error: ", "  fix: "], err
    return code, " ".join(lines)


def test_a_folder_is_trained_on_scored_and_resumed(cli, labelled, tmp_path) -> None:
    label = labelled / "label_2" / "000000.txt"
    tram = "Tram 0.00 0 -1.57 100.00 100.00 180.00 160.00 3.50 2.50 12.00 0.00 1.70 30.00 -1.57\n"
    label.write_text(label.read_text() + tram)
    shutil.rmtree(labelled / "objects")
    (labelled / "dataset.json").unlink()
    line = (*LINE, "--out", tmp_path / "out", "--data", labelled, "--epochs", "2", "--score-every", "1e-6")
    code, out, err = cli(*line)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "background, for the model does not look for them: 1 Tram"
    assert lines[1] == "not trained on but scored: the last 1 of 4 frames"
    assert any("AP mean" in row for row in lines)
    assert any("heat" in row and "box" in row for row in lines)
    assert lines[-1] == str(tmp_path / "out" / "weights.safetensors")
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["notes"] == lines[:2]
    logged = [json.loads(row) for row in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert logged[-1]["step"] == 3  # three frames twice, two a step
    assert {"mean", "car"} <= logged[0]["ap_percent"].keys()
    code, out, _ = cli(*line, "--resume", "--json")
    assert code == 0
    assert json.loads(out) == {"weights": str(tmp_path / "out" / "weights.safetensors"), "losses": None, "score": None}


def test_a_pruned_run_is_fine_tuned_and_keeps_every_zero(cli, tiny_run, tmp_path) -> None:
    line = (*LINE, "--masks", tiny_run, "--out", tmp_path / "out", "--steps", "3", "--json")
    code, out, err = cli(*line)
    assert (code, err) == (0, "")
    assert json.loads(out)["losses"]["step"] == 3
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["peak_rate"] == pytest.approx(2e-4)
    tuned, masks = (
        load_file(tmp_path / "out" / "weights.safetensors"),
        load_file(tiny_run / "weights/masks.safetensors"),
    )
    pruned = load_file(tiny_run / "weights" / "pruned.safetensors")
    moved = 0
    for name, keep in masks.items():
        weight = tuned[f"{name}.weight"]
        assert not weight[~keep].any(), name
        moved += int(np.count_nonzero(weight != pruned[f"{name}.weight"]))
    assert moved > 100
    line = (*LINE, "--masks", tiny_run, "--out", tmp_path / "again", "--steps", "3")
    code, text = error_of(cli(*line, "--init", tiny_run / "weights" / "pruned.safetensors"))
    assert (code, "--init and --masks exclude each other: both bring weights" in text) == (2, True)
    other = tmp_path / "other.yaml"
    other.write_text(TINY.read_text().replace("SCORE_THRESH: 0.1", "SCORE_THRESH: 0.2"))
    code, text = error_of(cli("train", "--model", other, *line[3:]))
    assert (code, f"was built from another model than {other}" in text) == (2, True)


def test_a_pruned_run_learns_from_the_dense_weights(cli, tiny_run, folder, tmp_path) -> None:
    """On frames alone: the folder has no labels."""
    dense = tiny_run / "weights" / "dense.safetensors"
    line = (*LINE, "--masks", tiny_run, "--teacher", dense, "--steps", "2")
    code, out, err = cli(*line, "--data", folder / "velodyne", "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert out.startswith("the frames teach by what the teacher answers")
    assert "score" in out.splitlines()[-2]
    tuned, pruned = (
        load_file(path) for path in (tmp_path / "out/weights.safetensors", tiny_run / "weights/pruned.safetensors")
    )
    for name, keep in load_file(tiny_run / "weights" / "masks.safetensors").items():
        assert not tuned[f"{name}.weight"][~keep].any(), name
    assert any((tuned[name] != pruned[name]).any() for name in pruned if name.endswith("weight"))


def test_lengths_and_pairs_that_cannot_be(cli, folder, tmp_path) -> None:
    out = ("--out", tmp_path / "out")
    for length in ((), ("--minutes", "1", "--steps", "2"), ("--epochs", "1", "--minutes", "1")):
        code, text = error_of(cli(*LINE, *out, *length))
        assert (code, "the length of a training is given once. " in text) == (2, True)
        assert "give --minutes, --steps or --epochs" in text
    for refused, said in (
        (("--epochs", "1"), "simulated scenes never repeat, so they have no epochs.   fix: give --minutes or --steps"),
        (("--steps", "-1"), "a training of -1 cannot be.   fix: give a length above 0"),
        (("--steps", "1", "--score-every", "-1"), "scores every -1.0 minutes cannot be.   fix: give --score-every"),
        (("--steps", "1", "--peak-rate", "2"), "a peak learning rate of 2.0 cannot train"),
        (("--steps", "1", "--processes", "0"), "0 processes train nothing.   fix: use --processes 1 or more"),
        (("--steps", "1", "--masks", tmp_path), "it is not a finished run"),
    ):
        code, text = error_of(cli(*LINE, *out, *refused))
        assert (code, said in text) == (2, True), text
    single = shutil.copytree(folder, tmp_path / "single")
    for path in single.rglob("00000[123].*"):
        path.unlink()
    (single / "dataset.json").unlink()
    code, text = error_of(cli(*LINE, *out, "--steps", "1", "--data", single))
    said = "a folder of 1 frame cannot spare one to score on.   fix: use two or more; only train can do without a score"
    assert (code, said in text) == (2, True)
    assert not (tmp_path / "out").exists()  # nothing was begun


def test_bad_folders_are_refused_before_anything_is_written(cli, labelled, tmp_path) -> None:
    line = (*LINE, "--steps", "1", "--out", tmp_path / "out", "--data", labelled)
    label, cloud = labelled / "label_2" / "000002.txt", labelled / "velodyne" / "000001.bin"
    text, points = label.read_text(), cloud.read_bytes()
    label.write_text(text.replace(text.split(" ", 1)[0], "Unicorn", 1))
    code, said = error_of(cli(*line))
    assert (code, "000002.txt, line 1 has the class 'Unicorn', which nothing here knows" in said) == (2, True)
    label.unlink()
    code, said = error_of(cli(*line))
    assert (code, f"1 of 4 frames of {labelled} have no labels, first label_2/000002.txt. " in said) == (4, True)
    assert "add the files, or move the frames that lack them out of velodyne; a --teacher reads no labels" in said
    label.write_text(text)
    cloud.write_bytes(b"\xff\xd8\xff\xe0" + points)
    code, said = error_of(cli(*line))
    assert (code, "000001.bin is a JPEG image, not points" in said) == (4, True)
    cloud.write_bytes(points)
    model = tmp_path / "tram.yaml"
    model.write_text(TINY.read_text().replace("[car, ", "[tram, ").replace("- [car]", "- [tram]"))
    for path in (labelled / "label_2").iterdir():
        path.write_text("".join(f"Car {row.split(' ', 1)[1]}\n" for row in path.read_text().splitlines()))
    code, said = error_of(cli("train", "--model", model, *line[3:]))
    assert code == 2
    assert "labels Car, and tram detects tram, truck" in said
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_is_one_sentence_from_two_processes(tmp_path) -> None:
    """Points that are no numbers reach the loss; nothing of that step is kept, so there is nothing to resume."""
    line = ("train", "--model", TINY, "--steps", "400", "--out", tmp_path)
    done = program(*line, "--data", "simulated", before=POISON)
    assert done.returncode == 1, done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines[0].startswith("error: the training diverged at step 2: heat loss nan"), done.stderr
    assert lines[1:] == ["  fix: start anew with a --peak-rate below 0.002"]
    assert not (tmp_path / STATE_NAME).exists()


POISON = """
import calib.training_frames as frames
whole = frames.SimulatedCrops.__call__
def poisoned(self, step):
    batch = whole(self, step)
    if step == 2:
        batch.features.fill_(float("nan"))
    return batch
frames.SimulatedCrops.__call__ = poisoned
"""


def program(*words, before="", launcher=()):
    """Run the command in a program of its own: children and torchrun start it anew."""
    script = Path(str(words[words.index("--out") + 1])).parent / "program.py"
    script.write_text(f"{before}\nfrom dm3d_deploy.cli import main\nif __name__ == '__main__':\n    main()\n")
    return subprocess.run(
        [sys.executable, *launcher, str(script), *map(str, words)], cwd=ROOT, capture_output=True, text=True,
        timeout=300, check=False, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )  # fmt: skip


def test_a_training_is_not_written_over(cli, tmp_path) -> None:
    (tmp_path / STATE_NAME).write_bytes(b"of another")
    code, text = error_of(cli(*LINE, "--out", tmp_path, "--steps", "1"))
    assert (code, f"{tmp_path} holds a training. " in text) == (2, True)
    assert "go on with it (--resume), or give another --out" in text
    assert [path.name for path in tmp_path.iterdir()] == [STATE_NAME]


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(cli, tmp_path) -> None:
    assert cli(*LINE, "--out", tmp_path, "--steps", "1")[0] == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "log.jsonl"}
    (tmp_path / f"{STATE_NAME}.partial").symlink_to("/dev/full")
    code, text = error_of(cli(*LINE, "--out", tmp_path, "--steps", "1", "--resume", "--quiet"))
    assert code == 8
    assert f"{tmp_path / STATE_NAME} could not be written: the disk is full. " in text
    assert (tmp_path / STATE_NAME).read_bytes() == before[STATE_NAME]
    assert (tmp_path / "weights.safetensors").read_bytes() == before["weights.safetensors"]


@pytest.fixture(scope="module")
def unbroken(folder, tmp_path_factory):
    """What two processes train in two steps."""
    out = tmp_path_factory.mktemp("unbroken") / "ours"
    ours = program(*TWO_STEPS, "--data", folder, "--processes", "2", "--out", out)
    assert ours.returncode == 0, ours.stderr
    return out


INTERRUPTED_THEN_RESUMED = """
import os, signal, sys
import calib.folder_crops as frames
whole = frames.FolderCrops.__call__
def interrupted(self, step):
    os.killpg(0, signal.SIGINT)
    return whole(self, step)
if __name__ == "__main__":
    from dm3d_deploy.cli import main
    frames.FolderCrops.__call__ = interrupted
    try:
        main()
    except SystemExit as ended:
        sys.stderr.write(f"{ended.code}\\n")
    frames.FolderCrops.__call__ = whole
    sys.argv.append("--resume")
"""


def test_ctrl_c_saves_what_two_processes_did_and_resuming_ends_like_an_unbroken_training(
    folder, unbroken, tmp_path
) -> None:
    """A terminal sends the signal to the whole process group, in the first step here."""
    line = (*TWO_STEPS, "--data", folder, "--processes", "2", "--out", tmp_path / "out")
    ended = program(*line, before=INTERRUPTED_THEN_RESUMED)
    said = "interrupted: the training is saved at step 1, and the same command with --resume goes on from there\n"
    assert (ended.returncode, ended.stderr) == (0, f"{said}130\n")
    logged = [json.loads(row)["step"] for row in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert logged == [1, 2]
    a, b = (load_file(root / "weights.safetensors") for root in (unbroken, tmp_path / "out"))
    for name, value in a.items():
        if "running" in name:  # averaged once more on the way
            np.testing.assert_allclose(b[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
        else:
            assert (b[name] == value).all(), name


ORPHANED = """
import multiprocessing, os, signal
from dm3d_deploy.train import _end_with_parent, _start
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=_end_with_parent)
    _start([child])
    os.kill(child.pid, signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_deaf_child_ends_with_its_killed_parent() -> None:
    """It holds our end of standard output: `run` returns when both have ended."""
    done = subprocess.run([sys.executable, "-c", ORPHANED], cwd=ROOT, capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGKILL, b"", b"")


def test_a_sigterm_saves_and_one_before_the_first_step_says_that_nothing_is_kept(cli, folder, tmp_path, monkeypatch):
    line = (*LINE, "--out", tmp_path / "out", "--steps", "3", "--data", folder, "--quiet")
    weights = tmp_path / "start.safetensors"
    save_weights(build_detector(load_config(str(TINY))), weights)

    def told_in(place, signalled):
        whole = getattr(*place)

        def interrupted(*given):
            os.kill(os.getpid(), signalled)
            return whole(*given)

        with monkeypatch.context() as patch:
            patch.setattr(*place, interrupted)
            return cli(*line, "--init", weights, *resume)

    resume = ()
    before = told_in((train_job, "prepare"), signal.SIGTERM)
    assert before == (143, "", "interrupted before anything was saved: the same command starts again\n")
    assert not (tmp_path / "out").exists()
    said = "interrupted: the training is saved at step 1, and the same command with --resume goes on from there\n"
    in_step = told_in((FolderCrops, "__call__"), signal.SIGTERM)
    assert in_step == (143, "", said)
    resume = ("--resume",)
    again = told_in((train_job, "prepare"), signal.SIGINT)
    assert again == (
        130,
        "",
        f"interrupted: the last checkpoint in {tmp_path / 'out'} stays, and --resume goes on from it\n",
    )
    code, text = error_of(cli(*line, "--resume", "--init", "other.safetensors"))
    assert (code, f"init was {weights} and is other.safetensors. " in text) == (2, True)
    assert f"from its weights: --init {tmp_path / 'out' / 'weights.safetensors'}, another --out" in text
    for again in (("--init", weights), ()):
        assert cli(*line, *again, "--resume") == (0, "", "")
        state = torch.load(tmp_path / "out" / STATE_NAME, weights_only=True)
        assert state["progress"]["step"] == 3


def test_the_command_that_a_divergence_names_trains(cli, folder, tmp_path, monkeypatch) -> None:
    """Resumed it would diverge again, and a rate cannot mend weights that give no number at once."""
    whole, out = FolderCrops.__call__, tmp_path / "out"
    line = ("--data", folder, "--quiet")
    assert cli(*LINE, *line, "--out", out, "--steps", "1")[0] == 0
    plan = json.loads((out / "plan.json").read_text())
    (out / "plan.json").write_text(json.dumps({**plan, "steps": 3}))

    def poisoned(source, step):
        batch = whole(source, step)
        return replace(batch, features=batch.features * float("nan"))

    with monkeypatch.context() as patch:
        patch.setattr(FolderCrops, "__call__", poisoned)
        code, text = error_of(cli(*LINE, *line, "--out", out, "--steps", "3", "--resume"))
        assert (code, "diverged at step 1: heat loss nan" in text) == (1, True)
        last = out / "weights.safetensors"
        words = f"start anew with a --peak-rate below 0.002, another --out and --init {last}, the last checkpoint"
        assert text.endswith(words)
        code, text = error_of(cli(*LINE, *line, "--out", tmp_path / "first", "--steps", "1"))
        assert text.endswith("no step was taken yet, so no rate helps: begin from other weights, or check the frames")
    more = ("--steps", "1", "--peak-rate", "0.001", "--init", last)
    assert cli(*LINE, *line, "--out", tmp_path / "again", *more) == (0, "", "")


def test_detectors_that_cannot_be_trained_are_refused_before_anything_is_written(cli, tmp_path) -> None:
    for model, what in (("voxel-rcnn", "a second stage"), ("voxelnext", "a sparse head")):
        code, text = error_of(cli("train", "--model", model, "--out", tmp_path / "out", "--steps", "1"))
        assert (code, f"{model} has {what}, and no targets are made here for its " in text) == (2, True)
        assert "train it with OpenPCDet; build --recover reconstruct needs no training" in text
    assert not (tmp_path / "out").exists()


def test_torchrun_trains_what_two_processes_train(folder, unbroken, tmp_path) -> None:
    line = (*TWO_STEPS, "--data", folder)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    theirs = program(*line, "--out", tmp_path / "theirs", launcher=launcher)
    assert theirs.returncode == 0, theirs.stderr
    assert theirs.stdout.count("weights.safetensors") == 1  # the first process speaks, the others do not
    a, b = (load_file(root / "weights.safetensors") for root in (unbroken, tmp_path / "theirs"))
    assert all((a[name] == b[name]).all() for name in a)
    assert (unbroken / "plan.json").read_bytes() == (tmp_path / "theirs/plan.json").read_bytes()
    wrong = program(*line, "--out", tmp_path / "wrong", "--processes", "3", launcher=launcher)
    assert "torchrun started 2 processes, not 3" in wrong.stderr


def test_weights_of_a_smaller_model_grow_and_it_is_said(tmp_path) -> None:
    small = build_detector(load_config("centerpoint-slim"))
    seed_weights(small, 5)
    save_weights(small, tmp_path / "small.safetensors")
    plan = TrainPlan(
        model="centerpoint", out=str(tmp_path / "out"), data="simulated", minutes=None, steps=1, epochs=None,
        init=str(tmp_path / "small.safetensors"), masks=None, teacher=None, resume=False, seed=0, processes=1,
        crops=1, peak_rate=1e-3, score_every=0.0,
    )  # fmt: skip
    job = prepare(plan, place_of(1), Stop())
    assert len(job.notes) == 1
    assert "small.safetensors is of a smaller detector" in job.notes[0]
    name = "backbone_2d.blocks.0.4.weight"
    assert torch.equal(job.detector.state_dict()[name][:64, :64], small.state_dict()[name])
