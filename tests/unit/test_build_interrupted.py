"""A build that is killed in the middle of a write of every stage ends with the bytes of one that never was."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from run_sample import tiny_recipe, tree

from dm3d_deploy import build as builder
from dm3d_deploy.artifacts import read_manifest
from dm3d_deploy.stages import STAGES

# Kills itself between the bytes and the name of the first artefact that the parent writes in the stage named; in
# `gradients` and `bench` earlier, behind the first piece of their work.
BUILD = """
import os, signal, sys
from pathlib import Path
from run_sample import Noted, tiny_recipe
from dm3d_deploy import build as builder
frames, root, deadly, digest = sys.argv[1:]
EARLY = ("gradients", "bench")

class Deadly(Noted):
    stage = ""
    def started(self, stage, says):
        self.stage = stage
    def advanced(self, done, total):
        if self.stage == deadly and deadly in EARLY and done > 1:
            os.kill(os.getpid(), signal.SIGKILL)

watch, replace = Deadly(), Path.replace
def dying_replace(self, target):
    if watch.stage == deadly not in EARLY and Path(target).name not in ("manifest.json", "measurements.json"):
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
Path.replace = dying_replace
builder.source_digest = lambda: digest
builder.build(tiny_recipe(frames), Path(root), watch=watch)
print(*watch.ran)
"""


def build_in_a_child(frames, root, deadly):
    tests = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join([str(tests), str(tests.parent)])
    return subprocess.run(
        [sys.executable, "-c", BUILD, str(frames), str(root), deadly, builder.source_digest()],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_build_killed_in_every_stage_ends_with_the_same_bytes(tiny_run, tiny_frames, tmp_path):
    root = tmp_path / "run"
    leftovers = 0
    for stage in STAGES:
        ended = build_in_a_child(tiny_frames, root, stage.name)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        leftovers += len(list(root.rglob("*.partial")))
        assert read_manifest(root).step(stage.name) is None
    assert leftovers >= len(STAGES) - 2
    ended = build_in_a_child(tiny_frames, root, "none")
    assert (ended.returncode, ended.stdout.split()) == (0, ["report"]), ended.stderr

    manifest = read_manifest(tiny_run)
    assert (root / "manifest.json").read_bytes() == (tiny_run / "manifest.json").read_bytes()
    files = [a.path for step in manifest.steps for a in step.outputs if not a.path.startswith("work/gradients/")]
    assert len(files) > 20
    for file in files:
        assert (root / file).read_bytes() == (tiny_run / file).read_bytes(), file
    assert tree(root).keys() == tree(tiny_run).keys()


def test_the_recipe_is_the_one_of_the_child(tiny_run, tiny_frames):
    assert read_manifest(tiny_run).recipe == tiny_recipe(tiny_frames).as_json()
