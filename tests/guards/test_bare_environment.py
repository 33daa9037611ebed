"""The base package, as a vehicle computer has it: every optional package is absent, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import ROOT, imports_of, modules_of, reached, within

OPTIONAL = ("torch", "tensorrt", "tensorrt_rtx", "triton", "spconv", "cumm", "scipy", "onnxscript")
MAY_BE_MADE_OF = {
    "torch": ("dm3d_deploy.models", "dm3d_deploy.training", "dm3d_deploy.train_job", "exporters", "calib"),
    "triton": ("engines.sparse3d",),
}

BLOCK = """
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {blocked!r} else PathFinder.find_spec(name, path, target)
    @classmethod
    def find_distributions(cls, context):
        hidden = (context.name or "").replace("-", "_") in {blocked!r}
        return () if hidden else PathFinder.find_distributions(context)
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""
IMPORT_ALL = """
import importlib, json
missing = {{}}
for name in {modules!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing[name] = error.name
print(json.dumps(missing))
"""
COMMAND = """
from dm3d_deploy.cli import main
sys.argv = ["dm3d-deploy", *{words!r}]
main()
"""


def bare(program: str, blocked: tuple[str, ...] = OPTIONAL) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh interpreter without the optional packages, warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCK.format(blocked=blocked) + program],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return bare(COMMAND.format(words=words))


def missing_of(modules: list[str], blocked: tuple[str, ...] = OPTIONAL) -> dict[str, str]:
    done = bare(IMPORT_ALL.format(modules=modules), blocked)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


def made_of(package: str) -> set[str]:
    """The modules that import an optional package as they are imported themselves."""
    imports = imports_of()
    return {name for name in imports if any(within(found, [package]) for found in reached(name, imports, ["start"]))}


def everything() -> list[str]:
    return sorted(name for name in modules_of() if not name.endswith("__main__"))


def test_every_module_imports_without_the_optional_packages_but_those_made_of_them() -> None:
    makers = {package: made_of(package) for package in OPTIONAL}
    assert makers["torch"], "the guard sees torch where it is"
    missing = missing_of(everything())
    assert set(missing) == set().union(*makers.values())
    for package, modules in makers.items():
        assert [name for name in modules if not within(name, MAY_BE_MADE_OF.get(package, ()))] == [], package


def test_torch_alone_is_enough_to_import_nearly_everything() -> None:
    others = tuple(name for name in OPTIONAL if name != "torch")
    assert set(missing_of(everything(), others)) == set().union(*(made_of(package) for package in others))


def test_the_block_blocks() -> None:
    done = bare("import torch\n")
    assert done.returncode == 1
    assert "No module named 'torch'" in done.stderr


@pytest.mark.parametrize("word", ["build", "detect", "bench", "engine", "report", "inspect"])
def test_commands_explain_themselves(word: str) -> None:
    done = command(word, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


@pytest.mark.parametrize("word", ["doctor", "devices", "models"])
def test_commands_that_look_things_up_work(word: str) -> None:
    done = command(word, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


def test_the_doctor_sees_what_is_absent() -> None:
    packages = json.loads(command("doctor", "--json").stdout)["packages"]
    assert {"torch", "tensorrt-rtx"} <= {package["name"] for package in packages if package["version"] is None}


def test_build_names_the_extra_in_one_sentence(tmp_path: Path) -> None:
    done = command("build", "--model", "centerpoint", "--target", "0.3", "--out", str(tmp_path / "run"), "--quiet")
    assert done.returncode == 3, done.stderr
    assert "dm3d-deploy[compile]" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_was_built_runs_without_torch(run_copy: Path, tiny_frames: Path, tmp_path: Path) -> None:
    """The way of a vehicle computer: detect, measure, render again, look inside."""
    run, frame = str(run_copy), str(next(path for path in sorted(tiny_frames.iterdir()) if path.is_file()))
    for words in (
        ("detect", run, frame, "--out", str(tmp_path / "found"), "--json"),
        ("bench", run, "--repeats", "2", "--json"),
        ("engine", run, "--json"),
        ("report", run, "--json"),
        ("inspect", run, "--json"),
        ("plan", "inspect", run, "--json"),
    ):
        done = command(*words)
        assert done.returncode == 0, f"{words[0]}: {done.stderr}"
        assert json.loads(done.stdout), words[0]
    assert list((tmp_path / "found").iterdir())
