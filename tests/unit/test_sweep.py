"""A sweep builds its points from the same frames and gradients; a comparison refuses what cannot stand side by side."""

import json
import shutil

import numpy as np
import pytest
from run_sample import Noted, tiny_recipe
from safetensors.numpy import load_file
from typer.main import get_command

from dm3d_deploy import build as builder
from dm3d_deploy.artifacts import read_manifest
from dm3d_deploy.cli import app
from dm3d_deploy.compare import OPTIONS, SETTINGS_OF_FRAMES, compare
from dm3d_deploy.errors import StaleArtifact, UsageError
from dm3d_deploy.sweep import sweep

METHODS, TARGETS = ("dm3d", "lamp"), (0.7, 0.4)


@pytest.fixture(scope="module")
def recipe(tiny_frames):
    return tiny_recipe(tiny_frames, patterns="unstructured", recover="reconstruct")


@pytest.fixture(scope="module")
def swept(recipe, tmp_path_factory):
    """A sweep of two methods and two targets, with the folders of its points and what ran."""
    out, digest = tmp_path_factory.mktemp("sweep") / "out", builder.source_digest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "source_digest", lambda: digest)
        watch = Noted()
        points = sweep(recipe, targets=TARGETS, methods=METHODS, out=out, watch=watch)
        yield out, points, watch


def test_points_share_frames_and_gradients_and_are_runs(swept, recipe):
    out, points, watch = swept
    assert [point.name for point in points] == ["dm3d-0.7", "dm3d-0.4", "lamp-0.7", "lamp-0.4"]
    assert [watch.ran.count(stage) for stage in ("frames", "gradients", "curves", "mask", "held out")] == [
        1,
        1,
        2,
        4,
        4,
    ]
    shares = {}
    for point in points:
        manifest = read_manifest(point)
        method, target = point.name.split("-")
        assert (manifest.recipe["method"], manifest.recipe["target"]) == (method, float(target))
        assert [step.name for step in manifest.steps][-1] == "recover"
        shares[point.name] = json.loads((point / "work" / "allocation.json").read_text())["share"]
        assert shares[point.name] <= float(target)
    assert all(shares[name] > float(name[-3:]) - 0.02 for name in shares)
    assert {a.digest for p in points for s in read_manifest(p).steps if s.name == "frames" for a in s.outputs} == {
        a.digest for s in read_manifest(out / "base").steps if s.name == "frames" for a in s.outputs
    }


def test_methods_keep_different_weights_and_targets_nest(swept):
    out, _, _ = swept
    masks = {name: load_file(out / name / "weights" / "masks.safetensors") for name in ("dm3d-0.7", "lamp-0.7")}
    assert any(not np.array_equal(masks["dm3d-0.7"][name], masks["lamp-0.7"][name]) for name in masks["dm3d-0.7"])
    fewer = load_file(out / "lamp-0.4" / "weights" / "masks.safetensors")
    assert all((masks["lamp-0.7"][name] | ~fewer[name]).all() for name in fewer)


def test_a_repeated_sweep_does_nothing(swept, recipe):
    out, points, _ = swept
    watch = Noted()
    assert sweep(recipe, targets=TARGETS, methods=METHODS, out=out, watch=watch) == points
    assert watch.ran == []


def test_recovery_tells_each_step(swept):
    _, points, _ = swept
    for point in points:
        told = json.loads((point / "work" / "recovery.json").read_text())
        assert [step["method"] for step in told["steps"]] == ["layer-wise reconstruction"]
        assert told["accepted"] == any(step["accepted"] for step in told["steps"])
        assert set(json.loads((point / "work" / "recovery_seconds.json").read_text())) == {
            step["method"] for step in told["steps"]
        }
        pruned, masks = (load_file(point / "weights" / f"{name}.safetensors") for name in ("pruned", "masks"))
        assert not any(pruned[f"{name}.weight"][~keep].any() for name, keep in masks.items())


def test_a_comparison_holds_each_method_against_the_best_other(swept, tmp_path):
    _, points, _ = swept
    found = compare(points, out=tmp_path / "page")
    rows = {row.run.rsplit("/", 1)[1]: row for row in found.runs}
    for target in TARGETS:
        ours, theirs = rows[f"dm3d-{target:g}"], rows[f"lamp-{target:g}"]
        assert ours.to_best_other == pytest.approx(ours.distortion / theirs.distortion)
        assert theirs.to_best_other == pytest.approx(theirs.distortion / ours.distortion)
    assert "UNTRAINED" in found.headline
    text = (tmp_path / "page" / "comparison.txt").read_text()
    assert text == found.as_text()
    assert len(text.splitlines()) == 2 + len(points)
    assert json.loads((tmp_path / "page" / "comparison.json").read_text())["runs"][0]["method"] == "dm3d"
    page = (tmp_path / "page" / "comparison.html").read_text()
    assert page.count("<svg") >= 1
    assert all(f"<td>{point}</td>" in page for point in points)
    assert compare(points[:1]).runs[0].to_best_other is None


def test_a_comparison_shows_ap_where_a_run_was_evaluated(swept, tmp_path):
    _, points, _ = swept
    copies = [shutil.copytree(point, tmp_path / point.name) for point in points[:2]]
    for value, copy in zip((61.5, 48.25), copies, strict=True):
        (copy / "ap").mkdir()
        (copy / "ap" / "evaluation.json").write_text(json.dumps({"summary": {"mAP": value, "NDS": 1.0}}))
    found = compare(copies, out=tmp_path / "page")
    assert [(row.ap, row.ap_name) for row in found.runs] == [(61.5, "mAP"), (48.25, "mAP")]
    assert "mAP, percent" in (tmp_path / "page" / "comparison.html").read_text()


def test_a_whole_build_can_be_compared(tiny_run):
    found = compare([tiny_run])
    rows = json.loads((tiny_run / "report.json").read_text())["distortion"]
    assert found.runs[0].pruned == pytest.approx(rows["heldout"])
    assert found.frames == tuple(row["frame"] for row in rows["per_frame"])


def test_other_weights_other_frames_and_no_run_are_refused(swept, tiny_run, tmp_path):
    _, points, _ = swept
    with pytest.raises(UsageError, match="There is nothing to compare"):
        compare([])
    other = shutil.copytree(points[0], tmp_path / "other")
    held_out = json.loads((other / "held_out.json").read_text())
    (other / "held_out.json").write_text(json.dumps({**held_out, "frames": ["elsewhere"]}))
    with pytest.raises(
        UsageError, match=r"held against other frames\. Fix: make them anew: the files of --frames chang"
    ):
        compare([points[0], other])
    manifest = json.loads((other / "manifest.json").read_text())
    next(a for s in manifest["steps"] for a in s["outputs"] if a["kind"] == "dense_weights")["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="prune other weights"):
        compare([points[0], other])
    (other / "held_out.json").unlink()
    with pytest.raises(StaleArtifact, match=r"holds no work/verification\.json"):
        compare([other])


def test_other_frames_are_refused_with_the_options_that_make_them_the_same(swept, tiny_run, tmp_path):
    _, points, _ = swept
    assert len(compare([tiny_run, points[0]]).runs) == 2  # a build and a sweep of the same settings stand side by side

    def changed(run, name, **settings):
        copy = shutil.copytree(run, tmp_path / name)
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["recipe"].update(settings)
        (copy / "manifest.json").write_text(json.dumps(manifest))
        return copy

    def told(*runs):
        with pytest.raises(UsageError) as error:
            compare(runs)
        return error.value

    more = changed(points[0], "more", held_out_frames=16)
    held_out = json.loads((more / "held_out.json").read_text())
    (more / "held_out.json").write_text(json.dumps({**held_out, "frames": ["elsewhere"]}))
    for runs, values in (((tiny_run, more), "4 and 16"), ((more, tiny_run), "16 and 4")):
        error = told(*runs)
        assert error.what.endswith(f"were held against other frames; held_out_frames is {values}.")
        assert error.fix == f"repeat the sweep of {more} with --held-out-frames 4"
    build = changed(tiny_run, "build", calibration_frames=3, seed=5)
    assert told(build, more).fix == (
        f"repeat the build of {build} with --calibration-frames 2, "
        f"repeat the sweep of {more} with --held-out-frames 4, repeat the sweep of {more} with --seed 5"
    )
    build = changed(tiny_run, "selects", selection_frames=9, held_out_frames=16)
    assert told(build, more).fix == "build both with the same selection_frames"
    commands = get_command(app).commands
    for command, names in OPTIONS.items():
        known = {option for parameter in commands[command].params for option in parameter.opts}
        options = {f"--{name.replace('_', '-')}" for name in SETTINGS_OF_FRAMES}
        assert known & options == {f"--{name.replace('_', '-')}" for name in names}


@pytest.mark.parametrize(
    ("methods", "targets", "what"),
    [
        (("dm3d", "snip"), (0.5,), "a sweep knows no method 'snip'"),
        (("paper-eq13",), (0.5,), "a sweep knows no method 'paper-eq13'"),
        (("lamp", "lamp"), (0.5,), r"the methods \['lamp', 'lamp'\] are none, or one of them is double"),
        (("lamp",), (), r"the targets \[\] are none"),
    ],
)
def test_a_sweep_of_nothing_or_twice_the_same_is_refused(recipe, tmp_path, methods, targets, what):
    with pytest.raises(UsageError, match=what):
        sweep(recipe, targets=targets, methods=methods, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_compares(swept, cli, tmp_path):
    _, points, _ = swept
    code, told, _ = cli("compare", *points, "--json")
    assert code == 0
    assert len(json.loads(told)["runs"]) == 4
    code, told, _ = cli("compare", *points, "--out", tmp_path / "page")
    assert code == 0
    assert "x best other" in told
    assert told.rstrip().endswith("comparison.html")


def test_the_command_refuses_words_for_shares(cli, tmp_path):
    code, _, told = cli("sweep", "--model", "centerpoint-slim", "--out", tmp_path / "out", "--targets", "0.5,half")
    assert code == 2
    assert "--targets has 'half', which is no number" in told
