"""Fixtures that every test may use."""

import shutil
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from run_sample import tiny_recipe, write_frames

settings.register_profile("house", deadline=None)  # a loaded machine takes longer than any fixed time
settings.load_profile("house")
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Ctrl-C as a terminal gives it: what a script runs behind itself is born deaf to it, and so are its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real frames and oracles beside the checkout."""
    if not (SHARED / "oracle").is_dir():
        pytest.skip("needs the real frames and oracles in ../shared")
    return SHARED


@pytest.fixture(scope="session")
def tiny_frames(tmp_path_factory):
    """A folder of small point clouds; tests leave it as it is."""
    return write_frames(tmp_path_factory.mktemp("tiny") / "frames")


@pytest.fixture(scope="session")
def tiny_run(tiny_frames):
    """A whole run of the tiny model, built once; tests leave it as it is."""
    from dm3d_deploy import build as builder

    root, digest = tiny_frames.parent / "run", builder.source_digest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "source_digest", lambda: digest)  # code edited while the tests run is not their subject
        builder.build(tiny_recipe(tiny_frames), root)
        yield root


@pytest.fixture
def run_copy(tiny_run, tmp_path):
    """A copy of the tiny run that a test may change."""
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture
def cli(monkeypatch, capsys):
    """Call the command line in this process: arguments -> (exit code, standard output, standard error)."""
    from dm3d_deploy.cli import main

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dm3d-deploy", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return ended.value.code or 0, told.out, told.err

    return call
