"""The command line: exit codes, what goes to which stream, and what is imported before anything is asked for."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from run_sample import TINY, tree

import dm3d_deploy
from dm3d_deploy import errors
from dm3d_deploy.cli import root as command_line

HEAVY = ("torch", "onnx", "onnxruntime", "matplotlib", "scipy", "numpy", "jinja2", "yaml", "tensorrt_rtx")
BUILD = ("--target", "0.5", "--device", "orin", "--calibration-frames", "2")
COMMANDS = ("build", "detect", "bench", "report", "engine", "inspect", "models", "devices", "doctor", "plan")


def test_help_imports_nothing_heavy():
    script = (
        "import sys\nsys.argv = ['dm3d-deploy', '--help']\nfrom dm3d_deploy.cli import main\n"
        f"try:\n    main()\nfinally:\n    print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    root = Path(dm3d_deploy.__file__).parents[1]
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=root,
        env={**os.environ, "COLUMNS": "100"},
    )  # fmt: skip
    assert ended.returncode == 0
    assert ended.stderr.strip() == "[]"
    named = re.findall(rf"^\W+({'|'.join(COMMANDS)})  ", ended.stdout, re.MULTILINE)
    assert named[:4] == ["build", "detect", "bench", "report"]
    assert sorted(named) == sorted(COMMANDS)


def test_version_and_help_of_every_command(cli):
    assert cli("--version") == (0, f"dm3d-deploy {dm3d_deploy.__version__}\n", "")
    for command in COMMANDS:
        code, out, err = cli(command, "--help")
        assert (code, err) == (0, "")
        assert "Usage: " in out


@pytest.mark.parametrize("arguments", [("bulid",), ("build",), ("build", "--target", "a third"), ("report",)])
def test_a_line_that_cannot_be_read_is_a_usage_error(cli, arguments):
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err


def raising(error):
    def app():
        raise error

    return app


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.VerificationFailed("no", fix="f"), 1),
        (errors.UsageError("no", fix="f"), 2),
        (errors.MissingDependency("no", fix="pip install 'dm3d-deploy[compile]'"), 3),
        (errors.CheckpointError("no", fix="f"), 4),
        (errors.FrameError("no", fix="f"), 4),
        (errors.InfeasibleBudget("no", fix="f", cheapest=0.1), 5),
        (errors.DistortionMissed("no", fix="f"), 5),
        (errors.ExportError("no", fix="f"), 6),
        (errors.EngineError("no", fix="f"), 6),
        (errors.StaleArtifact("no", fix="f"), 7),
        (errors.OutputError("no", fix="f"), 8),
        (errors.InternalError("no"), 70),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_error_has_its_exit_code(cli, monkeypatch, error, code):
    monkeypatch.setattr(command_line, "app", raising(error))
    found, out, err = cli("report", "x")
    assert (found, out) == (code, "")
    if isinstance(error, errors.Dm3dError):
        assert err == f"error: no\n  fix: {error.fix}\n"  # brackets of an extra are no markup
    else:
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize("command", [("detect", "nowhere", "frame.bin"), ("inspect", "nowhere"), ("report", "nowhere")])
def test_an_error_is_a_document_too(cli, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*command, "--json")
    told = json.loads(out)["error"]
    assert code != 0
    assert err == f"error: {told['what']}\n  fix: {told['fix']}\n"
    assert issubclass(getattr(errors, told["kind"]), errors.Dm3dError)


@pytest.mark.parametrize(("command", "key"), [("models", "models"), ("devices", "devices"), ("doctor", "packages")])
def test_looking_things_up(cli, command, key):
    code, out, err = cli(command, "--json")
    assert (code, err) == (0, "")
    assert len(json.loads(out)[key]) > 1
    code, out, err = cli(command)
    assert (code, err) == (0, "")
    assert {"models": "centerpoint", "devices": "orin", "doctor": "onnxruntime"}[command] in out


def test_a_dry_run_prints_the_plan_and_touches_nothing(cli, tiny_frames, tmp_path):
    line = ("build", "--model", TINY, *BUILD, "--frames", tiny_frames, "--out", tmp_path / "run", "--dry-run")
    code, out, err = cli(*line)
    assert (code, err) == (0, "")
    assert [row.split()[:2] for row in out.splitlines()][:2] == [["run", "load"], ["run", "frames"]]
    code, out, _ = cli(*line, "--to", "mask", "--json")
    plan = json.loads(out)
    assert plan["stages"][-1] == {"stage": "mask", "run": True, "reason": "an earlier stage will run"}
    assert not (tmp_path / "run").exists()


@pytest.fixture
def same_build(tiny_run, tiny_frames):
    """The line that asks for the tiny run again, as far as a line can: its other settings come from the recipe."""
    return ("build", "--model", TINY, *BUILD, "--frames", tiny_frames, "--to", "load", "--out", tiny_run)


def test_a_build_that_finds_all_done(cli, tiny_run, same_build):
    before = tree(tiny_run)
    code, out, err = cli(*same_build)
    assert (code, out) == (0, "")
    assert "= load" in err
    assert "up to date" in err
    assert cli(*same_build, "--quiet") == (0, "", "")
    code, out, err = cli(*same_build, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"run": str(tiny_run), "report": None}
    assert tree(tiny_run) == before


def test_report_renders_again_and_prints_one_document(cli, run_copy):
    page = (run_copy / "report.html").read_bytes()
    (run_copy / "report.html").unlink()
    code, out, err = cli("report", run_copy, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["report"]["budget"]["target"] == 0.5
    assert (run_copy / "report.html").read_bytes() == page
    code, out, err = cli("report", run_copy)
    assert code == 0
    assert "UNTRAINED" in out
    assert out.rstrip().endswith("report.html")
    assert "report" in err


def test_a_build_that_fails_shows_no_old_report(cli, run_copy, tiny_frames):
    line = ("build", "--model", TINY, "--frames", run_copy / "none", "--target", "0.5", "--out", run_copy)
    code, out, err = cli(*line, "--device", "orin", "--json")
    assert (code, list(json.loads(out))) == (4, ["error"])
    assert "there is no file or folder" in err


def test_bench_wants_at_least_one_sample(cli, tiny_run):
    code, _, err = cli("bench", tiny_run, "--repeats", "0")
    assert code == 2
    assert "--repeats is 0" in err


def test_detect_prints_lines_or_one_document_or_nothing(cli, tiny_run, tiny_frames, tmp_path):
    line = ("detect", tiny_run, tiny_frames / "frame0.npy", "--out", tmp_path)
    code, out, err = cli(*line)
    assert (code, err) == (0, "")
    assert out.startswith("UNTRAINED weights")
    assert cli(*line, "--quiet") == (0, "", "")
    code, out, err = cli(*line, "--json")
    assert (code, err) == (0, "")
    assert [row["frame"] for row in json.loads(out)["frames"]] == [str(tiny_frames / "frame0.npy")]


def test_inspect_prints_lines_or_one_document(cli, tiny_run):
    code, out, err = cli("inspect", tiny_run, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["what"] == "run"
    code, out, err = cli("inspect", tiny_run)
    assert (code, err) == (0, "")
    assert "UNTRAINED" in out


def test_a_full_standard_output_is_one_sentence():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dm3d_deploy", "models", "--json"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 8
    assert done.stderr == "error: standard output could not be written: No space left on device.\n"
