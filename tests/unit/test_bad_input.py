"""Every bad input ends with its exit code, one sentence and a fix; no traceback, and nothing half written."""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from run_sample import TINY, points_of, tiny_recipe, tree

from dm3d_deploy import artifacts
from dm3d_deploy import build as builder
from dm3d_deploy.artifacts import disk_errors, read_manifest, write_bytes
from dm3d_deploy.errors import Dm3dError, InfeasibleBudget

torch = pytest.importorskip("torch")


@pytest.fixture
def refused(cli, tmp_path):
    """Call the command line, expect a refusal, and return its words after the common checks."""

    def call(*arguments, code):
        found, out, err = cli(*arguments)
        assert found == code, err
        lines = err.strip().splitlines()
        fixes = [line for line in lines if line.startswith("  fix: ")]
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == len(fixes) == 1, err
        assert lines[-2:] == [*errors, *fixes], err
        assert "Traceback" not in err
        assert out == ""
        assert not list(tmp_path.rglob("*.partial"))
        return errors[0] + fixes[0]

    return call


@pytest.fixture
def build(refused, tmp_path, tiny_frames):
    """A build of the tiny model that is to be refused."""

    def call(*arguments, code, target="0.5", model=TINY, frames=tiny_frames, last="load", out=tmp_path / "run"):
        options = ("--model", model, "--target", target, "--frames", frames, "--out", out, "--to", last)
        return refused("build", *options, "--device", "orin", *arguments, code=code)

    return call


@pytest.mark.parametrize("target", ["0", "-0.1", "1.01", "nan", "inf", "-inf", "1e-400"])
def test_a_target_outside_its_range(build, tmp_path, target):
    assert "is not a share of MACs in (0, 1]" in build(f"--target={target}", code=2)
    assert not (tmp_path / "run").exists()


def test_an_infeasible_target_says_the_cheapest_reachable_which_is_then_reached(run_copy, tiny_frames):
    with pytest.raises(InfeasibleBudget, match="cannot be reached") as raised:
        builder.build(tiny_recipe(tiny_frames, target=0.001), run_copy)
    assert raised.value.exit_code == 5
    advised = re.search(r"raise --target to ([\d.]+) or more", raised.value.fix)
    assert float(advised[1]) == pytest.approx(raised.value.cheapest, abs=1e-4)
    assert read_manifest(run_copy).step("allocate") is None
    builder.build(tiny_recipe(tiny_frames, target=float(advised[1])), run_copy, last="mask")
    assert json.loads((run_copy / "work" / "allocation.json").read_text())["share"] <= float(advised[1])


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--scope", "backbones"), "did you mean 'backbone'?"),
        (("--patterns", "2:4"), "known: auto, unstructured"),
        (("--precision", "fp61"), "did you mean 'fp16'?"),
        (("--calibration-frames", "0"), "calibration_frames is 0"),
        (("--seed", "-1"), "cannot be negative"),
        (("--from", "maks"), "did you mean 'mask'?"),
    ],
)
def test_unknown_choices(build, option, words):
    assert words in build(*option, code=2, last="report")


def test_an_unknown_device_is_told_before_the_work(build, tmp_path):
    assert "the device 'orn' is unknown.  fix: did you mean 'orin'?" in build("--device", "orn", code=2)
    assert not (tmp_path / "run").exists()


def test_an_unknown_model_is_answered_with_the_nearest_name(build, tmp_path):
    assert "did you mean 'centerpoint'?" in build(code=2, model="centrepoint")
    assert not (tmp_path / "run").exists()
    assert "there is no config file" in build(code=2, model=tmp_path / "no.yaml")


def truncated(folder):
    (folder / "f.bin").write_bytes(points_of(0).tobytes()[:-3])
    return "no whole number of points"


def not_a_number(folder):
    points = points_of(0)
    points[7, 2] = np.nan
    np.save(folder / "f.npy", points)
    return "point 7 of 1500 has z = nan"


def empty_file(folder):
    (folder / "f.bin").write_bytes(b"")
    return "is empty (0 bytes)"


def empty_folder(folder):
    return "holds no .bin, .pcd, .npy file"


def no_folder(folder):
    folder.rmdir()
    return "there is no file or folder"


def far_away(folder):
    points = points_of(0)
    points[:, 0] += 100
    np.save(folder / "f.npy", points)
    return "none inside x -12.8..12.8"


BAD_FRAMES = (truncated, not_a_number, empty_file, empty_folder, no_folder, far_away)


@pytest.mark.parametrize("spoil", BAD_FRAMES)
def test_bad_frames_stop_a_build(build, tmp_path, spoil):
    folder = tmp_path / "bad"
    folder.mkdir()
    words = spoil(folder)
    assert words in build(code=4, frames=folder, last="frames")
    assert not (tmp_path / "run" / "work" / "frames.safetensors").exists()


@pytest.mark.parametrize("spoil", BAD_FRAMES)
def test_bad_frames_stop_a_detection(refused, tiny_run, tmp_path, spoil):
    folder = tmp_path / "bad"
    folder.mkdir()
    words = spoil(folder)
    assert words in refused("detect", tiny_run, folder, "--out", tmp_path / "out", "--quiet", code=4)
    assert not (tmp_path / "out").exists()


class Payload:
    """What a hostile checkpoint runs when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_pickle_payload_is_not_executed(build, refused, tmp_path):
    mark, file = tmp_path / "executed", tmp_path / "evil.pth"
    torch.save({"model_state": {"a": torch.zeros(2)}, "more": Payload(mark)}, file)
    for words in (build("--checkpoint", file, code=4), refused("inspect", file, code=4)):
        assert "nothing in it was executed" in words
        assert "weights_only" not in words
    assert not mark.exists()
    torch.load(file, weights_only=False)  # the payload is real
    assert mark.exists()


def test_the_checkpoint_of_another_model(build, tiny_run, tmp_path):
    other = tmp_path / "other.pth"
    torch.save({"model_state": {"backbone_2d.blocks.0.1.weight": torch.zeros(3)}}, other)
    words = build("--checkpoint", other, code=4)
    assert "does not fit centerpoint-tiny: it holds nothing known here" in words
    assert "453 missing: " in words
    assert "1 misshapen: backbone_2d.blocks.0.1.weight" in words
    words = build("--checkpoint", tiny_run / "weights" / "dense.safetensors", code=4, model="centerpoint")
    assert "does not fit centerpoint" in words
    assert "there is no checkpoint" in build("--checkpoint", tmp_path / "no.pth", code=4)


def test_yaml_with_unknown_keys(build, tmp_path):
    file = tmp_path / "model.yaml"
    file.write_text(TINY.read_text() + "\nMODLE: 3\n")
    words = build(code=2, model=file)
    assert "unknown entry MODLE" in words
    assert "did you mean 'MODEL'?" in words


def test_a_yaml_alias_bomb(build, tmp_path):
    file = tmp_path / "bomb.yaml"
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    file.write_text("\n".join(rows))
    assert "once aliases are expanded" in build(code=2, model=file)


def test_an_output_folder_that_is_a_file_or_lies_in_one(build, refused, tiny_run, tiny_frames, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    assert "is a file" in build(code=2, out=file)
    assert "a parent is a file" in build(code=8, out=file / "run")
    for out in (file, file / "below"):
        assert "a parent is a file" in refused("detect", tiny_run, tiny_frames, "--out", out, "--quiet", code=8)
    assert "file name too long" in build(code=8, out=tmp_path / ("x" * 300))
    assert file.read_text() == "mine"


def test_an_output_folder_of_another_model(build, tiny_run):
    before = tree(tiny_run)
    assert "holds a build of" in build(code=2, model="centerpoint", out=tiny_run)
    assert tree(tiny_run) == before


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "permission was denied"),
        (errno.EIO, "input/output error"),
    ],
)
def test_a_disk_that_refuses(build, tmp_path, monkeypatch, number, words):
    def refuse(handle):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(artifacts.os, "fsync", refuse)
        assert f"could not be written: {words}" in build(code=8)
    assert {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()} <= {".lock"}


def test_a_file_larger_than_the_limit(build, cli, tmp_path, tiny_frames):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert "dense.safetensors could not be written: the limit on the size of a file" in build(code=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "run" / "weights" / "dense.safetensors").exists()


def on_a_small_disk(options, *arguments, mount):
    """The command line in a namespace of its own, where `mount` is a tmpfs with these options."""
    script = f'mount -t tmpfs -o {options} tmpfs "$0" && exec "$@"'
    command = ["-c", "import sys; from dm3d_deploy.cli import main; sys.argv[0] = 'dm3d-deploy'; main()"]
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, str(mount), sys.executable, *command, *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=Path(artifacts.__file__).parents[1],
    )  # fmt: skip


@pytest.mark.parametrize(("options", "words"), [("size=300k", "the disk is full"), ("ro", "the file system is read")])
def test_a_real_disk_that_is_full_or_read_only(tiny_frames, tmp_path, options, words):
    if shutil.which("unshare") is None or on_a_small_disk("size=1m", "--version", mount=tmp_path).returncode:
        pytest.skip("this system mounts no tmpfs for its users")
    recipe = ("--model", TINY, "--target", "0.5", "--frames", tiny_frames, "--device", "orin", "--to", "load")
    ended = on_a_small_disk(options, "build", *recipe, "--out", tmp_path / "run", mount=tmp_path)
    assert ended.returncode == 8
    assert f"could not be written: {words}" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_disk_errors_keep_quiet_about_what_is_no_disk_error(tmp_path):
    with pytest.raises(OSError, match="no number"), disk_errors(tmp_path):
        raise OSError("no number")
    (tmp_path / "file").touch()
    with pytest.raises(Dm3dError, match=r"file/below could not be written: a parent is a file"):
        write_bytes(tmp_path / "file" / "below", b"")


@pytest.mark.parametrize("graph", ["onnx/bev_head.onnx", "onnx/backbone3d.onnx", "model.yaml"])
def test_a_graph_whose_digest_does_not_match(refused, run_copy, tiny_frames, tmp_path, graph):
    with (run_copy / graph).open("ab") as file:
        file.write(b"\n")
    for command in (("detect", run_copy, tiny_frames, "--out", tmp_path / "out", "-q"), ("bench", run_copy, "-q")):
        words = refused(*command, code=7)
        assert f"{graph} is not the file that was built: expected sha256 " in words
    assert not (tmp_path / "out").exists()
    (run_copy / graph).unlink()
    assert "is missing" in refused("detect", run_copy, tiny_frames, "--out", tmp_path / "out", "-q", code=7)


def test_what_is_no_run(refused, tiny_frames, tmp_path):
    for command in (("detect", tmp_path, tiny_frames), ("bench", tmp_path), ("report", tmp_path), ("engine", tmp_path)):
        assert "holds no manifest.json" in refused(*command, "-q", code=2)
    assert not list(tmp_path.iterdir())
