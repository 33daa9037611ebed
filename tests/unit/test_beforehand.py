"""What no frame decides is refused before any is read, by a dry run as by a build."""

import numpy as np
import pytest
from run_sample import TINY, tiny_recipe

from dm3d_deploy import build as builder
from dm3d_deploy.errors import Dm3dError

TIME = {"target": None, "target_ms": 18.0, "cost": "latency"}


@pytest.fixture
def unlabelled(tmp_path):
    """A folder of frames without labels, and another folder's name that is none."""
    (tmp_path / "nolab").mkdir()
    np.save(tmp_path / "nolab" / "a.npy", np.zeros((4, 5), np.float32))
    return tmp_path


@pytest.mark.parametrize("way", [builder.plan, builder.build], ids=["dry-run", "build"])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({**TIME, "device": "orin,a30"}, "a time is that of one device"),
        ({**TIME, "profile": "nosuch"}, "the device 'nosuch' is unknown"),
        ({**TIME, "profile": "nosuch.json"}, r"nosuch\.json cannot be read"),
        ({**TIME, "profile": "orin"}, "this one has 1"),
        ({**TIME, "model": "centerpoint", "profile": "h100"}, "no figures to estimate times on 'h100'"),
        ({**TIME, "model": "centerpoint", "profile": "orin", "precision": "fp32"}, "times are fp16, the build is fp32"),
        ({**TIME, "model": "voxelnext", "profile": "orin"}, "there is no profile of voxelnext"),
        ({"voxel_keep": 0.5, "voxel_stages": "9"}, "--voxel-stages names 9, and the backbone has 4 stages"),
        ({"recover": "finetune", "recover_data": "nolab"}, "nolab"),
        ({"recover": "distill", "recover_data": "absent"}, "there is no folder .*absent to learn from"),
    ],
)
def test_it_is_refused_before_any_frame(way, given, words, unlabelled) -> None:
    if "recover_data" in given:
        given = {**given, "recover_data": str(unlabelled / given["recover_data"])}
    recipe = tiny_recipe("no-such-frames", **{"model": str(TINY), **given})
    with pytest.raises(Dm3dError, match=words):
        way(recipe, unlabelled / "run")
    assert not (unlabelled / "run").exists()
