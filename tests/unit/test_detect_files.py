"""Detection over files: what is written, what is said, and what is not overwritten."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from run_sample import points_of, tree

from dm3d_deploy.artifacts import artifact_of, read_manifest
from dm3d_deploy.detect import load_run, refuted_outputs
from dm3d_deploy.detect_files import UNTRAINED, detect_files
from dm3d_deploy.errors import FrameError, StaleArtifact, UsageError
from dm3d_deploy.inspection import describe_path
from dm3d_deploy.reporting.detection_files import read_detections, read_kitti_text


def test_each_frame_leaves_json_text_and_picture(tiny_run, tiny_frames, tmp_path):
    said = []
    rows = detect_files(tiny_run, [tiny_frames], out=tmp_path / "out", say=said.append)
    assert [row["frame"] for row in rows] == [str(path) for path in sorted(tiny_frames.iterdir())]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"frame{seed}{ending}" for seed in range(5) for ending in (".json", ".txt", ".png")
    }
    detector = load_run(tiny_run)
    expected = detector.detect(points_of(0)[:, [0, 1, 2, 3, 3]] * np.float32([1, 1, 1, 1, 0]))
    found, frame = read_detections(tmp_path / "out" / "frame0.json")
    assert frame == "frame0.npy"
    assert rows[0]["detections"] == len(found) == len(expected) > 0
    assert np.array_equal(found.boxes.centre, expected.boxes.centre)
    assert np.array_equal(found.scores, expected.scores)
    text = read_kitti_text(tmp_path / "out" / "frame0.txt", found.class_names)
    assert np.array_equal(text.boxes.size, found.boxes.size)
    assert (tmp_path / "out" / "frame0.png").read_bytes().startswith(b"\x89PNG")
    assert said[0] == UNTRAINED
    assert "columns x, y, z, intensity; " in said[1]
    assert re.fullmatch(r"  \d+ boxes from \d+ voxels in \d+ ms -> .*frame0\.json, .*\.txt, .*\.png", said[2])


def test_a_row_is_plain_data_and_says_untrained(tiny_run, tiny_frames, tmp_path):
    (row,) = detect_files(tiny_run, [tiny_frames / "frame1.npy"], out=tmp_path)
    assert json.loads(json.dumps(row)) == row
    assert row["trained"] is False
    assert row["columns"] == ["x", "y", "z", "intensity"]
    assert (row["points"], row["dropped_voxels"], row["cutoff_m"]) == (1500, 0, None)
    assert 0 < row["voxels"] <= 1500
    assert row["ms"] > 0


@pytest.mark.parametrize(
    ("refuted", "told"), [(["boxes (ONNX)"], "NOT PASSED: this run's graphs do not .*: boxes"), (None, "NOT VERIFIED")]
)
def test_a_run_whose_gate_failed_is_not_used_without_a_word(
    tiny_run, tiny_frames, tmp_path, monkeypatch, refuted, told
):
    monkeypatch.setattr("dm3d_deploy.detect_files.refuted_outputs", lambda root, manifest: refuted)
    said = []
    detect_files(tiny_run, [tiny_frames / "frame1.npy"], out=tmp_path, say=said.append)
    assert re.match(told, said[1])


def test_the_gate_of_a_run_is_what_its_build_left(run_copy):
    assert refuted_outputs(run_copy, read_manifest(run_copy)) == []
    assert describe_path(run_copy)["verification"] == "passed"
    file = run_copy / "work" / "verification.json"
    file.write_text(file.read_text().replace('"passed": true', '"passed": false'))
    with pytest.raises(StaleArtifact):
        refuted_outputs(run_copy, read_manifest(run_copy))
    assert describe_path(run_copy)["verification"] == "unknown: its files changed"


def test_the_gate_says_what_failed_and_that_it_was_not_asked(run_copy):
    manifest = read_manifest(run_copy)
    file = run_copy / "work" / "verification.json"
    found = json.loads(file.read_text())
    found["parity"][0]["passed"] = False
    file.write_text(json.dumps(found))
    step = manifest.step("verify")
    now = tuple(artifact_of(run_copy, a.path, a.kind) if a.kind == "verification" else a for a in step.outputs)
    others = tuple(one for one in manifest.steps if one.name != "verify")
    (refuted,) = refuted_outputs(run_copy, replace(manifest, steps=(*others, replace(step, outputs=now))))
    assert refuted == f"{found['parity'][0]['output']} ({found['parity'][0]['candidate']})"
    assert refuted_outputs(run_copy, replace(manifest, steps=others)) is None


def test_weaker_detections_are_left_out(tiny_run, tiny_frames, tmp_path):
    frame = tiny_frames / "frame0.npy"
    detect_files(tiny_run, [frame], out=tmp_path / "all")
    every, _ = read_detections(tmp_path / "all" / "frame0.json")
    threshold = float(np.median(every.scores))
    (row,) = detect_files(tiny_run, [frame], out=tmp_path / "some", min_score=threshold)
    some, _ = read_detections(tmp_path / "some" / "frame0.json")
    assert 0 < row["detections"] < len(every)
    assert np.array_equal(some.scores, every.scores[every.scores >= np.float32(threshold)])
    (row,) = detect_files(tiny_run, [frame], out=tmp_path / "none", min_score=1)
    assert row["detections"] == 0
    assert (tmp_path / "none" / "frame0.txt").read_text() == ""


@pytest.mark.parametrize("score", [-0.1, 1.1, float("nan")])
def test_a_least_score_outside_its_range(tiny_run, tiny_frames, tmp_path, score):
    with pytest.raises(UsageError, match=r"the least score .* is not in \[0, 1\]"):
        detect_files(tiny_run, [tiny_frames], out=tmp_path / "out", min_score=score)
    assert not (tmp_path / "out").exists()


def test_the_dense_variant_and_an_unknown_one(tiny_run, tiny_frames, tmp_path):
    frame = tiny_frames / "frame0.npy"
    for variant in ("pruned", "dense"):
        detect_files(tiny_run, [frame], out=tmp_path / variant, variant=variant)
    texts = [(tmp_path / variant / "frame0.json").read_bytes() for variant in ("pruned", "dense")]
    assert texts[0] != texts[1]
    with pytest.raises(UsageError, match=r"no variant 'dens'.*did you mean 'dense'\?"):
        detect_files(tiny_run, [frame], out=tmp_path, variant="dens")


def test_dropped_voxels_are_said(tiny_run, tmp_path):
    rng = np.random.default_rng(0)
    points = rng.uniform(-12, 12, (9000, 5)).astype(np.float32)
    points[:, 2] = rng.uniform(-2, 2, 9000)
    points[:, 3:] = rng.integers(0, 31, (9000, 2))
    np.save(tmp_path / "full.npy", points)
    said = []
    (row,) = detect_files(tiny_run, [tmp_path / "full.npy"], out=tmp_path / "out", say=said.append)
    assert row["voxels"] == 4000
    assert row["dropped_voxels"] > 1000
    assert 5 < row["cutoff_m"] < 17
    assert f"! {row['dropped_voxels']} voxels beyond {row['cutoff_m']:.1f} m were dropped" in said[-1]


def test_frames_of_one_name_do_not_overwrite_each_other(tiny_run, tiny_frames, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(tiny_frames / "frame1.npy", other / "frame0.npy")
    with pytest.raises(UsageError, match=r"would both be written as .*frame0\.json"):
        detect_files(tiny_run, [tiny_frames, other], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_frame_given_twice_is_detected_once(tiny_run, tiny_frames, tmp_path):
    frame = tiny_frames / "frame0.npy"
    assert len(detect_files(tiny_run, [frame, tiny_frames / ".." / "frames" / "frame0.npy"], out=tmp_path)) == 1


@pytest.mark.parametrize(("name", "folder"), [("report", ""), ("manifest", ""), ("pruned", "detections")])
def test_a_run_s_own_files_are_not_replaced(tiny_run, tiny_frames, tmp_path, name, folder):
    before = tree(tiny_run)
    shutil.copy(tiny_frames / "frame0.npy", tmp_path / f"{name}.npy")
    with pytest.raises(UsageError, match="a file of the run"):
        detect_files(tiny_run, [tmp_path / f"{name}.npy"], out=tiny_run / folder)
    assert tree(tiny_run) == before


def test_a_bad_frame_ends_the_work_and_leaves_what_was_done(tiny_run, tiny_frames, tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    shutil.copy(tiny_frames / "frame0.npy", frames / "a.npy")
    (frames / "b.bin").write_bytes(b"123")
    shutil.copy(tiny_frames / "frame0.npy", frames / "c.npy")
    with pytest.raises(FrameError, match=r"b\.bin has 3 bytes"):
        detect_files(tiny_run, [frames], out=tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.json", "a.txt", "a.png"}


def test_equal_frames_give_equal_bytes(tiny_run, tiny_frames, tmp_path):
    for name in ("one", "two"):
        detect_files(tiny_run, [tiny_frames / "frame2.npy"], out=tmp_path / name)
    first, second = ({name: data for name, (_, data) in tree(tmp_path / name).items()} for name in ("one", "two"))
    assert first == second
