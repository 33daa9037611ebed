"""Folders that a build does not touch, windows that make no sense, and two builds at once."""

import fcntl
import json
import os

import pytest
from run_sample import TINY, tiny_recipe, tree

from dm3d_deploy.artifacts import MANIFEST_NAME, read_manifest
from dm3d_deploy.build import build, default_out, plan, rerun
from dm3d_deploy.errors import StaleArtifact, UsageError
from dm3d_deploy.recipe import Recipe


@pytest.mark.parametrize("window", [{"first": "curvs"}, {"last": "curvs"}])
def test_an_unknown_stage_is_named_with_the_nearest(tiny_frames, tmp_path, window):
    for action in (build, plan):
        with pytest.raises(UsageError, match=r"there is no stage 'curvs'.*did you mean 'curves'\?"):
            action(tiny_recipe(tiny_frames), tmp_path / "run", **window)
    assert not (tmp_path / "run").exists()


def test_a_window_that_ends_before_it_begins_is_refused(tiny_frames, tmp_path):
    with pytest.raises(UsageError, match="--from export comes after --to mask"):
        plan(tiny_recipe(tiny_frames), tmp_path, first="export", last="mask")


def test_from_forces_what_is_up_to_date(tiny_run, tiny_frames):
    rows = plan(tiny_recipe(tiny_frames), tiny_run, first="mask", last="export")
    assert [(row.stage, row.reason) for row in rows if not row.fresh] == [
        (name, "asked for by --from") for name in ("mask", "recover", "export")
    ]
    assert rows[-1].stage == "export"


def test_a_file_is_no_folder(tiny_frames, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        build(tiny_recipe(tiny_frames), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_with_other_files_is_left_alone(tiny_frames, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="holds files that are not a run"):
        build(tiny_recipe(tiny_frames), tmp_path)
    assert list(tree(tmp_path)) == ["thesis.tex"]


def test_the_run_of_another_model_is_left_alone(tiny_run, tiny_frames):
    before = tree(tiny_run)
    with pytest.raises(UsageError, match=r"holds a build of '.*centerpoint-tiny\.yaml', not of 'centerpoint'"):
        build(tiny_recipe(tiny_frames, model="centerpoint"), tiny_run)
    assert tree(tiny_run) == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1, "steps": 7}', "{" * 3000, "[" * 100_000])
def test_a_broken_manifest_is_told(tiny_frames, tmp_path, text):
    (tmp_path / MANIFEST_NAME).write_text(text)
    for action in (lambda: build(tiny_recipe(tiny_frames), tmp_path), lambda: rerun(tmp_path, ("report",))):
        with pytest.raises(StaleArtifact, match=r"manifest\.json is not a manifest.*delete the folder"):
            action()


def test_a_manifest_of_another_version_is_told(run_copy):
    data = json.loads((run_copy / MANIFEST_NAME).read_text())
    (run_copy / MANIFEST_NAME).write_text(json.dumps({**data, "schema": 99}))
    with pytest.raises(StaleArtifact, match="has schema 99; this version reads 1"):
        read_manifest(run_copy)


def test_a_manifest_cannot_point_outside_its_run(run_copy):
    text = (run_copy / MANIFEST_NAME).read_text()
    (run_copy / MANIFEST_NAME).write_text(text.replace('"model.yaml"', '"../../etc/passwd"'))
    with pytest.raises(StaleArtifact, match="names a file outside its run"):
        read_manifest(run_copy)


def test_an_empty_folder_is_as_good_as_a_new_one(tiny_frames, tmp_path):
    (tmp_path / ".lock").touch()
    assert plan(tiny_recipe(tiny_frames), tmp_path)[0].reason == "not done yet"


def test_a_second_build_at_the_same_time_is_refused(tiny_run, tiny_frames):
    before = tree(tiny_run)
    handle = os.open(tiny_run / ".lock", os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another build is running in"):
            build(tiny_recipe(tiny_frames), tiny_run)
        with pytest.raises(UsageError, match="another build is running in"):
            rerun(tiny_run, ("report",))
    finally:
        os.close(handle)
    assert tree(tiny_run) == before


def test_a_folder_that_is_no_run_cannot_be_run_again(tmp_path):
    with pytest.raises(UsageError, match=r"holds no manifest\.json"):
        rerun(tmp_path, ("report",))
    assert not list(tmp_path.iterdir())


def test_the_default_folder_is_named_for_model_and_target():
    assert str(default_out(Recipe(model=str(TINY), target=0.3))) == "runs/centerpoint-tiny-0.3"
