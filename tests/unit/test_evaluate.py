"""evaluate: a run without torch, a checkpoint with it, folders and simulated frames, files and refusals."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from calib.held_out import FIRST_SEED, FIRST_TRAINING_SEED
from calib.labelled_frames import read_labelled
from dm3d_deploy.config import load_config
from dm3d_deploy.detect_in_torch import detect_in_torch
from dm3d_deploy.errors import CheckpointError, Dm3dError, FrameError, UsageError
from dm3d_deploy.evaluate import evaluate
from dm3d_deploy.evaluation.benchmarks import benchmark_scores
from dm3d_deploy.models.checkpoints import load_checkpoint, save_weights
from dm3d_deploy.models.detector import build_detector
from dm3d_deploy.models.seeded import seed_weights
from dm3d_deploy.simulate import simulate

TINY = Path(__file__).parents[1] / "fixtures" / "centerpoint-tiny.yaml"
SETTINGS = {"sensor": "hdl64", "frames": 2}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    detector = build_detector(load_config(TINY))
    seed_weights(detector, 0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(detector, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("set") / "held-out"
    simulate(root, sensor="hdl64", frames=2, seed=FIRST_SEED)
    return root


@pytest.mark.parametrize("metric", ["kitti", "nuscenes", "once"])
def test_a_run_on_simulated_frames(tiny_run, tmp_path, metric: str) -> None:
    told = []
    result = evaluate(tiny_run, metric=metric, out=tmp_path / "out", advanced=lambda *s: told.append(s), **SETTINGS)
    assert told == [(1, 2), (2, 2)]
    assert (result.frames, result.metric) == (2, metric)
    assert result.subject == "run (centerpoint-tiny, pruned, UNTRAINED)"
    assert result.data == "simulated hdl64 seeds 1000000000 to 1000000001"
    data = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert data == json.loads(json.dumps(result.as_json()))
    assert set(data["rows"][0]) == {"class_name", "subset", "measure", "objects", "ap_percent", "recall", "precision"}
    text = (tmp_path / "out" / "evaluation.txt").read_text()
    assert text == result.as_text()
    assert text.startswith(f"{result.subject} on {result.data}: 2 frames, metric {metric}\n")
    names = [line.split()[0].lower() for line in text.splitlines() if line and line.split()[0].isalpha()]
    assert names.index("pedestrian") < names.index("car")
    assert (tmp_path / "out" / "precision_recall.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.rglob("*.partial"))


def test_a_folder_gives_what_its_seeds_give(tiny_run, folder) -> None:
    from_disk = evaluate(tiny_run, metric="kitti", data=folder)
    simulated = evaluate(tiny_run, metric="kitti", **SETTINGS)
    assert [(r.class_name, r.subset, r.measure, r.objects) for r in from_disk.rows] == [
        (r.class_name, r.subset, r.measure, r.objects) for r in simulated.rows
    ]
    assert [r.ap_percent for r in from_disk.rows] == pytest.approx([r.ap_percent for r in simulated.rows], abs=0.5)
    assert from_disk.data == from_disk.as_json()["data"] == f"{folder} (simulated hdl64)"
    assert f" on {folder} (simulated hdl64): 2 frames, metric kitti\n" in from_disk.as_text()
    single = evaluate(tiny_run, data=folder, frames=1)
    assert (single.frames, f"{single.data}: 1 frame, metric nuscenes\n" in single.as_text()) == (1, True)
    assert evaluate(tiny_run, data=folder, frames=["000001"]).frames == 1


def test_a_checkpoint_in_processes_scores_as_in_one(weights, folder) -> None:
    told = []
    result = evaluate(weights, model=str(TINY), data=folder, metric="once", advanced=lambda *step: told.append(step))
    assert result.subject == "tiny.safetensors (centerpoint-tiny)"
    assert told == [(1, 2), (2, 2)]
    detector = build_detector(load_config(TINY))
    load_checkpoint(detector, weights)
    source = {"folder": str(folder), "names": ["000000", "000001"]}
    frames = [read_labelled(source, index) for index in range(2)]
    found = [detect_in_torch(detector, frame.cloud) for frame in frames]
    assert sum(map(len, found)) > 10
    assert result.rows == benchmark_scores("once", found, [frame.labels for frame in frames]).rows
    assert sum(row.objects for row in result.rows) > 10


def test_a_folder_that_people_labelled_is_not_called_simulated(tiny_run, folder, tmp_path) -> None:
    copied = shutil.copytree(folder, tmp_path / "set")
    (copied / "dataset.json").unlink()
    assert evaluate(tiny_run, data=copied, frames=1).data == str(copied)


def test_what_a_process_refuses_is_said_as_it_was(weights, folder, tmp_path) -> None:
    copied = shutil.copytree(folder, tmp_path / "set")
    (copied / "velodyne" / "000001.bin").write_bytes(b"\x89PNG")
    with pytest.raises(FrameError, match=r"velodyne/000001\.bin is a PNG image, not points\."):
        evaluate(weights, model=str(TINY), data=copied, frames=["000001"])


def test_a_checkpoint_is_refused_before_a_process_starts(weights, folder) -> None:
    with pytest.raises(UsageError, match=r"tiny.safetensors fits none of the models centerpoint, .*centerpoint-slim, "):
        evaluate(weights, data=folder)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        evaluate(weights.parent / "nothing.pth")


def test_the_model_of_a_checkpoint_is_known_by_its_tensors(tmp_path) -> None:
    from dm3d_deploy.evaluate import _fitting_model

    detector = build_detector(load_config("centerpoint-slim"))
    save_weights(detector, tmp_path / "slim.safetensors")
    assert _fitting_model(tmp_path / "slim.safetensors") == "centerpoint-slim"
    save_weights(build_detector(load_config("centerpoint-0075")), tmp_path / "fine.safetensors")
    with pytest.raises(UsageError, match=r"fits centerpoint and centerpoint-0075, which differ in their voxels only"):
        _fitting_model(tmp_path / "fine.safetensors")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metric": "waymo"}, "there is no metric 'waymo'"),
        ({"frames": 0}, "0 frames show nothing"),
        ({"frames": ["000000"]}, "simulated frames have no names. Fix: give --frames N, and --seed of the first"),
        ({"sensor": "vlp16"}, "no simulated sensor 'vlp16'"),
        ({"seed": -1}, "training may have seen the frames of seed -1"),
        ({"seed": FIRST_TRAINING_SEED, "frames": 1}, "training may have seen the frames"),
        ({"data": "FOLDER", "sensor": "hdl64"}, "a sensor was given for frames that lie on disk"),
        ({"data": "FOLDER", "seed": 0}, "a seed was given for frames that lie on disk. Fix: leave --seed out"),
        ({"data": "FOLDER", "frames": 3}, "holds 2 frames, not 3"),
        ({"data": "FOLDER", "frames": ["000009"]}, "has no frame '000009'"),
        ({"data": "nowhere"}, "nowhere is no labelled data set"),
        ({"variant": "prune"}, "no variant 'prune'"),
    ],
)
def test_refusals(tiny_run, folder, changes, words: str) -> None:
    given = {key: str(folder) if value == "FOLDER" else value for key, value in changes.items()}
    with pytest.raises(UsageError, match=words):
        evaluate(tiny_run, **given)


def test_missing_labels_are_told_before_the_first_frame(tiny_run, tmp_path, folder) -> None:
    for part in ("velodyne", "calib"):
        (tmp_path / part).symlink_to(folder / part)
    told = []
    with pytest.raises(FrameError, match=r"2 of 2 frames of .* have no labels, first label_2/000000.txt"):
        evaluate(tiny_run, data=tmp_path, advanced=lambda *step: told.append(step))
    assert told == []


def test_named_frames_of_a_folder_where_others_have_no_labels(tiny_run, tmp_path, folder, cli) -> None:
    copied = shutil.copytree(folder, tmp_path / "set")
    (copied / "label_2" / "000000.txt").unlink()
    code, _, err = cli("evaluate", tiny_run, "--data", copied)
    assert code == 4
    assert "name the frames that have them (evaluate --names)" in " ".join(err.split())
    code, out, err = cli("evaluate", tiny_run, "--data", copied, "--names", " 000001", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["rows"] == evaluate(tiny_run, data=folder, frames=["000001"]).as_json()["rows"]


def test_a_seed_and_a_sensor_choose_the_simulated_frames(tiny_run, cli) -> None:
    code, out, _ = cli(
        "evaluate", tiny_run, "--frames", 1, "--sensor", "hdl64", "--seed", FIRST_SEED + 1, "--metric", "once", "--json"
    )
    assert (code, json.loads(out)["data"]) == (0, "simulated hdl64 seed 1000000001")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--names", "000000", "--frames", "1"), "--names and --frames were both given"),
        (("--names", "000000"), "simulated frames have no names"),
        (("--names", "000001,", "--data", "FOLDER"), "has no frame ''"),
    ],
)
def test_refusals_of_the_command(tiny_run, folder, cli, words, told: str) -> None:
    code, _, err = cli("evaluate", tiny_run, *(str(folder) if word == "FOLDER" else word for word in words))
    assert code == 2
    assert told in " ".join(err.split())


def test_a_folder_that_cannot_be_written_is_told_before_the_first_frame(tiny_run, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    told = []
    with pytest.raises(Dm3dError, match="could not be written: a parent is a file"):
        evaluate(tiny_run, out=tmp_path / "file" / "out", advanced=lambda *step: told.append(step), **SETTINGS)
    assert told == []


def test_a_run_is_evaluated_without_torch(tiny_run, folder) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from dm3d_deploy.evaluate import evaluate\n"
        f"print(evaluate({str(tiny_run)!r}, data={str(folder)!r}, frames=1, metric='once').as_text())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "AP %, 3d" in done.stdout
