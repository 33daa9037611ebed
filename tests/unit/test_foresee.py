"""When a refit is foreseen, and what that does to the curves."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from dm3d_deploy.artifacts import write_json
from dm3d_deploy.errors import InternalError
from dm3d_deploy.recipe import Recipe
from dm3d_deploy.steps.foresee import foresee, foreseen_curves

ROW = {
    "layer": "a", "pattern": "tile", "unit": "macs", "ratio": [0.0, 0.3, 0.6], "distortion": [0.0, 1.0, 4.0],
    "cost": [9.0, 6.0, 3.0],
}  # fmt: skip


class Run(SimpleNamespace):
    def path(self, kind):
        return self.root / f"{kind}.json"


@pytest.fixture
def run(tmp_path):
    found = Run(root=tmp_path, recipe=Recipe(model="m", target=0.5), pool=None)
    write_json(found.path("curves"), [ROW, {**ROW, "pattern": "unstructured"}])
    return found


def test_a_refit_scales_its_curve_alone_and_no_curve_falls(run) -> None:
    write_json(run.path("refit_shares"), {"tile a": [1.0, 0.5, 0.1]})
    (tile, free), foreseen = foreseen_curves(run)
    assert foreseen
    assert tile.distortion.tolist() == [0.0, 0.5, 0.5]  # 4 * .1 is less than what an earlier ratio leaves
    assert free.distortion.tolist() == ROW["distortion"]
    np.testing.assert_array_equal(tile.cost, ROW["cost"])


def test_without_shares_curves_are_those_of_the_mask(run) -> None:
    write_json(run.path("refit_shares"), {})
    curves, foreseen = foreseen_curves(run)
    assert not foreseen
    assert [curve.distortion.tolist() for curve in curves] == [ROW["distortion"]] * 2


def test_shares_of_no_curve_are_refused(run) -> None:
    write_json(run.path("refit_shares"), {"2:4 a": [1.0]})
    with pytest.raises(InternalError, match="shares of no curve: 2:4 a"):
        foreseen_curves(run)


@pytest.mark.parametrize(
    ("changes", "roles"),
    [
        ({"recover": "none"}, ["calibration", "selection"]),
        ({"recover": "bn"}, ["calibration", "selection"]),
        ({"method": "lamp", "patterns": "unstructured"}, ["calibration", "selection"]),
        ({"cost": "executed"}, ["calibration", "selection"]),
        ({"target": None, "max_distortion": 0.1}, ["calibration", "selection"]),
        ({}, ["calibration", "held_out"]),
    ],
    ids=["no recovery", "no refit", "a baseline", "channels too", "a distortion", "no frame to accept a refit"],
)
def test_none_is_foreseen(run, changes, roles) -> None:
    run.recipe = Recipe(**{"model": "m", "target": 0.5, **changes})
    write_json(run.path("frames_info"), {"frames": [{"role": role} for role in roles]})
    foresee(run)
    assert json.loads(run.path("refit_shares").read_text()) == {}
