"""What is up to date is left alone, what changed is made again, and nothing of another recipe counts."""

import json
import shutil
from dataclasses import replace

import pytest
from run_sample import TINY, Noted, tiny_recipe, tree, write_frames

from dm3d_deploy import build as builder
from dm3d_deploy.artifacts import read_manifest
from dm3d_deploy.build import build, plan, rerun
from dm3d_deploy.detect import load_run
from dm3d_deploy.errors import CheckpointError, FrameError, InternalError, StaleArtifact, UsageError, VerificationFailed
from dm3d_deploy.measurements import read_measurements
from dm3d_deploy.stages import STAGE_NAMES

SOURCE_DIGEST = builder.source_digest  # before `tiny_run` holds it still


def planned(recipe, root, **window):
    return [row.stage for row in plan(recipe, root, **window) if not row.fresh]


def digests(root, *stages):
    manifest = read_manifest(root)
    return {a.path: a.digest for name in stages for a in manifest.step(name).outputs}


def test_a_second_build_touches_no_file(tiny_run, tiny_frames):
    before, watch = tree(tiny_run), Noted()
    build(tiny_recipe(tiny_frames), tiny_run, watch=watch)
    assert tree(tiny_run) == before
    assert (watch.ran, watch.fresh) == ([], list(STAGE_NAMES))


def test_a_dry_run_touches_no_file(tiny_run, tiny_frames, tmp_path):
    before = tree(tiny_run)
    assert planned(tiny_recipe(tiny_frames), tiny_run) == []
    assert planned(tiny_recipe(tiny_frames, target=0.3), tiny_run) == list(STAGE_NAMES[STAGE_NAMES.index("allocate") :])
    assert tree(tiny_run) == before
    assert planned(tiny_recipe(tiny_frames), tmp_path / "new") == list(STAGE_NAMES)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"seed": 1}, "load"),
        ({"calibration_frames": 1}, "frames"),
        ({"sketches": 2}, "gradients"),
        ({"damping": 0.5}, "gradients"),  # dropped after use, and needed again
        ({"patterns": "unstructured"}, "foresee"),
        ({"precision": "fp32"}, "export"),
        ({"score_frames": 3}, "score"),
    ],
)
def test_a_changed_setting_is_first_felt_by_the_stage_that_reads_it(tiny_run, tiny_frames, changes, first):
    assert planned(tiny_recipe(tiny_frames, **changes), tiny_run)[0] == first


def test_a_changed_frame_is_noticed_by_its_bytes(tiny_run, tiny_frames):
    frame = tiny_frames / "frame0.npy"
    data = frame.read_bytes()
    try:
        frame.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert planned(tiny_recipe(tiny_frames), tiny_run)[0] == "frames"
    finally:
        frame.write_bytes(data)
    assert planned(tiny_recipe(tiny_frames), tiny_run) == []


def test_a_changed_tool_is_noticed(tiny_run, tiny_frames, monkeypatch):
    monkeypatch.setattr(builder, "tool_versions", lambda names: dict.fromkeys(names, "0.0"))
    assert planned(tiny_recipe(tiny_frames), tiny_run) == list(STAGE_NAMES)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"checkpoint": "nothere.pth"}, CheckpointError),
        ({"frames": "nothere"}, FrameError),
        ({"device": "x"}, UsageError),
    ],
)
def test_nothing_is_planned_for_what_cannot_start(tiny_frames, tmp_path, changes, error):
    with pytest.raises(error):
        planned(replace(tiny_recipe(tiny_frames), **changes), tmp_path / "new")


def test_other_code_is_noticed(tiny_run, tiny_frames, monkeypatch):
    monkeypatch.setattr(builder, "source_digest", lambda: "0" * 64)
    assert planned(tiny_recipe(tiny_frames), tiny_run) == list(STAGE_NAMES)


def test_the_digest_of_the_code_sees_every_package(monkeypatch):
    read, digest_of_file = [], builder.digest_of_file
    monkeypatch.setattr(builder, "digest_of_file", lambda path: read.append(path) or digest_of_file(path))
    found = SOURCE_DIGEST()
    assert {"build.py", "readers.py", "bev_head.py", "onnx_runtime.py", "voxelize.py"} <= {path.name for path in read}
    monkeypatch.setattr(
        builder, "digest_of_file", lambda path: "other" if path.name == "nms.py" else digest_of_file(path)
    )
    assert SOURCE_DIGEST() != found


def test_a_new_target_keeps_what_came_before_and_forgets_what_came_after(run_copy, tiny_frames):
    before, watch = tree(run_copy), Noted()
    build(tiny_recipe(tiny_frames, target=0.4), run_copy, last="mask", watch=watch)
    assert watch.ran == ["allocate", "mask"]
    after = tree(run_copy)
    assert {name for name in before if before[name] != after.get(name)} == {
        "manifest.json", "measurements.json", "weights/masks.safetensors", "work/allocation.json", "work/masks.json",
    }  # fmt: skip
    assert read_manifest(run_copy).recipe["target"] == 0.4
    assert read_manifest(run_copy).step("export") is None
    assert read_measurements(run_copy).step("report") is None
    with pytest.raises(StaleArtifact, match="has not finished the stage 'recover'"):
        load_run(run_copy)  # the ONNX files that still lie there are those of 0.5
    with pytest.raises(StaleArtifact, match="has not finished the stage"):
        rerun(run_copy, ("bench",))


@pytest.mark.parametrize(
    ("file", "stage"), [("work/allocation.json", "allocate"), ("weights/masks.safetensors", "mask")]
)
def test_a_deleted_file_is_made_again_alone(run_copy, tiny_frames, file, stage):
    before, watch = tree(run_copy), Noted()
    (run_copy / file).unlink()
    build(tiny_recipe(tiny_frames), run_copy, watch=watch)
    assert watch.ran == [stage]
    assert {name: data for name, (_, data) in tree(run_copy).items() if name != "measurements.json"} == {
        name: data for name, (_, data) in before.items() if name != "measurements.json"
    }


def test_a_changed_byte_is_found_and_mended(run_copy, tiny_frames):
    file = run_copy / "weights" / "masks.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    reasons = {row.stage: row.reason for row in plan(tiny_recipe(tiny_frames), run_copy) if not row.fresh}
    assert reasons["mask"] == "weights/masks.safetensors was changed"
    build(tiny_recipe(tiny_frames), run_copy, last="mask")
    assert file.read_bytes() == data


def test_gradients_are_gone_and_yet_up_to_date_until_they_are_needed(run_copy, tiny_frames):
    assert not (run_copy / "work" / "gradients").exists()
    (run_copy / "work" / "scores.safetensors").unlink()
    reasons = {row.stage: row.reason for row in plan(tiny_recipe(tiny_frames), run_copy)}
    assert reasons["frames"] == "up to date"
    assert reasons["gradients"].endswith("is missing")


def test_a_damaged_record_of_the_model_is_made_again(run_copy, tiny_frames):
    (run_copy / "work" / "model.json").write_text("[")
    assert planned(tiny_recipe(tiny_frames), run_copy)[0] == "load"


def test_what_an_interrupted_stage_left_does_not_count(run_copy, tiny_frames, monkeypatch):
    left = run_copy / "work" / "gradients"
    left.mkdir()
    for name in ("0007.safetensors", "job.json"):
        (left / name).write_text("of an earlier recipe")
    (run_copy / "onnx" / "bev_head.onnx.partial").write_text("half")

    def gradients(run):
        left.mkdir()
        for name in ("gradients/0000.safetensors", "sensitivity.safetensors", "output_scale.json", "layers.json"):
            (run.root / "work" / name).write_text("new")

    monkeypatch.setattr(builder, "_entry", lambda stage: gradients)
    build(tiny_recipe(tiny_frames), run_copy, first="gradients", last="gradients")
    assert [file.name for file in left.iterdir()] == ["0000.safetensors"]
    assert list(digests(run_copy, "gradients")) == [
        "work/gradients/0000.safetensors", "work/sensitivity.safetensors", "work/output_scale.json",
        "work/layers.json",
    ]  # fmt: skip
    assert not list(run_copy.rglob("*.partial"))


def test_transient_files_that_a_kill_left_are_dropped(run_copy, tiny_frames):
    (run_copy / "work" / "gradients").mkdir()
    build(tiny_recipe(tiny_frames), run_copy, last="curves")
    assert not (run_copy / "work" / "gradients").exists()


def test_a_stage_that_leaves_nothing_is_our_bug(run_copy, tiny_frames, monkeypatch):
    (run_copy / "work" / "masks.json").unlink()
    monkeypatch.setattr(builder, "_entry", lambda stage: lambda run: None)
    with pytest.raises(InternalError, match=r"the stage 'mask' left no work/masks\.json"):
        build(tiny_recipe(tiny_frames), run_copy, first="mask", last="mask")
    assert read_manifest(run_copy).step("mask") is None


@pytest.mark.parametrize("rows", [[], [{"output": "hm_0", "candidate": "ONNX", "passed": False}]])
def test_a_failed_or_empty_comparison_fails_the_build(run_copy, tiny_frames, monkeypatch, rows):
    def verify(run):
        run.path("verification").write_text(json.dumps({"parity": rows}))

    monkeypatch.setattr(builder, "_entry", lambda stage: verify)
    with pytest.raises(VerificationFailed, match=r"hm_0 \(ONNX\)|nothing was compared"):
        build(tiny_recipe(tiny_frames), run_copy, first="verify", last="verify")


def test_rerun_leaves_the_identity_alone(run_copy, tiny_frames):
    manifest = (run_copy / "manifest.json").read_bytes()
    report = json.loads((run_copy / "report.json").read_text())
    rerun(run_copy, ("bench", "report"), changes={"bench_repeats": 3})
    assert (run_copy / "manifest.json").read_bytes() == manifest
    renewed = json.loads((run_copy / "report.json").read_text())
    assert {row["n"] for row in report["latency"]} == {2}
    assert {row["n"] for row in renewed["latency"]} == {3}
    assert planned(tiny_recipe(tiny_frames), run_copy) == []


def test_rerun_checks_what_it_reads(run_copy):
    with (run_copy / "work" / "allocation.json").open("a") as file:
        file.write(" ")
    with pytest.raises(StaleArtifact, match=r"allocation\.json is not the file that was built"):
        rerun(run_copy, ("report",))


def test_other_paths_are_other_inputs(run_copy, tiny_frames, tmp_path):
    elsewhere = write_frames(tmp_path / "elsewhere")
    assert planned(tiny_recipe(elsewhere), run_copy)[0] == "frames"
    copy = shutil.copy(TINY, tmp_path / TINY.name)
    assert planned(tiny_recipe(tiny_frames, model=str(copy)), run_copy)[0] == "load"
