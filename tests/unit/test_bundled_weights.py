"""Default weights: taken when they lie in the package, called untrained when they do not, noticed when they appear."""

import json

import pytest
from run_sample import Noted

from dm3d_deploy.build import build, plan
from dm3d_deploy.config import detector_names, load_config
from dm3d_deploy.errors import CheckpointError
from dm3d_deploy.models import bundled
from dm3d_deploy.models.bundled import bundled_weights
from dm3d_deploy.models.checkpoints import read_tensors, save_weights
from dm3d_deploy.models.detector import build_detector
from dm3d_deploy.models.seeded import seed_weights
from dm3d_deploy.recipe import Recipe

RECIPE = Recipe(model="centerpoint", target=0.3)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder in the place of the package's weights."""
    monkeypatch.setattr(bundled, "WEIGHT_FILES", tmp_path / "weights")
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


def told(run):
    return json.loads((run / "work" / "model.json").read_text())


def test_only_names_have_weights_of_their_own(folder, tmp_path) -> None:
    (folder / "centerpoint.safetensors").write_bytes(b"")
    assert bundled_weights("centerpoint") == folder / "centerpoint.safetensors"
    assert bundled_weights("centerpoint-slim") is None
    assert bundled_weights(str(tmp_path / "centerpoint")) is None
    assert bundled_weights("../weights/centerpoint") is None


def test_the_package_bundles_weights_only_for_models_that_it_has() -> None:
    files = sorted(path.stem for path in bundled.WEIGHT_FILES.glob("*.safetensors"))
    assert "centerpoint-slim" in files
    assert set(files) <= set(detector_names())
    assert [name for name in files if not (bundled.WEIGHT_FILES / f"{name}.md").is_file()] == []


def test_the_full_model_is_untrained_until_its_weights_are_there(folder, tmp_path) -> None:
    run, watch = tmp_path / "run", Noted()
    build(RECIPE, run, last="load", watch=watch)
    assert (told(run)["trained"], watch.notes[0][:9]) == (False, "UNTRAINED")
    assert [row.stage for row in plan(RECIPE, run, last="load") if not row.fresh] == []

    detector = build_detector(load_config("centerpoint"))
    seed_weights(detector, 5)
    save_weights(detector, folder / "centerpoint.safetensors")
    assert [row.stage for row in plan(RECIPE, run, last="load") if not row.fresh] == ["load"]
    watch = Noted()
    build(RECIPE, run, last="load", watch=watch)
    assert watch.notes == [
        "no --checkpoint was given: the bundled weights were trained on simulated scenes only",
    ]
    assert told(run)["trained"]
    assert told(run)["weights_source"] == "bundled with dm3d-deploy, trained on simulated scenes only"
    given, kept = (
        read_tensors(path) for path in (folder / "centerpoint.safetensors", run / "weights/dense.safetensors")
    )
    assert given.keys() == kept.keys()
    assert all(given[name].equal(kept[name]) for name in given)


def test_bundled_weights_of_another_model_are_refused(folder, tmp_path) -> None:
    detector = build_detector(load_config("centerpoint-slim"))
    save_weights(detector, folder / "centerpoint.safetensors")
    with pytest.raises(CheckpointError, match=r"missing|misshapen|unexpected"):
        build(RECIPE, tmp_path / "run", last="load")
    assert not (tmp_path / "run").exists()
