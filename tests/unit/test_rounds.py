"""Rounds: each starts from what the one before left, and all are held against the dense detector."""

import json
from dataclasses import replace

import numpy as np
import pytest
from run_sample import Noted, tiny_recipe
from safetensors.numpy import load_file

from dm3d_deploy import build as builder
from dm3d_deploy.artifacts import read_manifest
from dm3d_deploy.build import build, plan
from dm3d_deploy.errors import CheckpointError, UsageError
from dm3d_deploy.rounds import earlier_rounds

TARGET = 0.36


@pytest.fixture(scope="module")
def recipe(tiny_frames):
    return tiny_recipe(tiny_frames, target=TARGET, patterns="unstructured")


@pytest.fixture(scope="module")
def built(recipe, tmp_path_factory):
    """Two rounds up to the recovery: the last one's folder and recipe."""
    out, digest = tmp_path_factory.mktemp("rounds") / "out", builder.source_digest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "source_digest", lambda: digest)
        last = earlier_rounds(recipe, out, 2)
        build(last, out, last="recover")
        yield out, last


def weights(root, name):
    return load_file(root / "weights" / f"{name}.safetensors")


def test_the_last_round_starts_from_what_the_first_left(built):
    out, last = built
    first = out.with_name("out-round1")
    assert read_manifest(first).recipe["target"] == pytest.approx(TARGET**0.5)
    assert last.start == str(first / "weights" / "pruned.safetensors")
    left, start = weights(first, "pruned"), weights(out, "start")
    assert all(np.array_equal(start[name], left[name]) for name in left)
    dense = weights(out, "dense")
    assert all(np.array_equal(dense[name], array) for name, array in weights(first, "dense").items())
    assert any(not np.array_equal(start[name], dense[name]) for name in dense)
    assert json.loads((out / "work" / "allocation.json").read_text())["share"] <= TARGET


def test_what_the_first_round_pruned_is_nearly_all_pruned_again(built):
    out, _ = built
    earlier, later = weights(out.with_name("out-round1"), "masks"), weights(out, "masks")
    gone = sum(int((~keep).sum()) for keep in earlier.values())
    again = sum(int((~later[name] & ~keep).sum()) for name, keep in earlier.items())
    assert again > 0.9 * gone > 0


def test_one_round_is_the_recipe_itself(recipe, tmp_path):
    assert earlier_rounds(recipe, tmp_path / "out", 1) is recipe
    assert list(tmp_path.iterdir()) == []


def test_repeated_rounds_do_nothing(built, recipe):
    out, last = built
    watch = Noted()
    assert earlier_rounds(recipe, out, 2, watch=watch) == last
    build(last, out, last="recover", watch=watch)
    assert watch.ran == []


def test_other_weights_to_start_from_are_noticed(built, recipe):
    out, last = built
    rows = plan(replace(last, start=None), out)
    assert next(row.stage for row in rows if not row.fresh) == "load"
    with pytest.raises(CheckpointError, match=r"there are no weights nowhere\.safetensors to start from"):
        plan(replace(recipe, start="nowhere.safetensors"), out)


def test_rounds_to_nowhere_are_refused(recipe, tmp_path):
    with pytest.raises(UsageError, match="0 rounds prune nothing"):
        earlier_rounds(recipe, tmp_path / "out", 0)
    goal = replace(recipe, target=None, max_distortion=0.1)
    with pytest.raises(UsageError, match="Rounds go down to a share of the cost"):
        earlier_rounds(goal, tmp_path / "out", 2)
