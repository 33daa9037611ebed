"""What is on disk is what is installed, and what is imported is what is declared."""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from source_tree import PACKAGES, ROOT, imports_of, modules_of

import calib
import dm3d_deploy
import engines
import exporters

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DISTRIBUTION_OF_MODULE = {
    "yaml": "pyyaml",
    "spconv": "spconv-cu120",
    "cumm": "cumm-cu126",
    "google": "onnx",  # protobuf's errors, which onnx raises
    "markupsafe": "jinja2",  # the strings that jinja2 hands out
}
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PINNED_EXTRAS = ("compile", "rtx", "sparse3d", "test")
X86 = {"platform_machine": "x86_64", "sys_platform": "linux"}
ARM = {"platform_machine": "aarch64", "sys_platform": "linux"}


def requirements(extras: Iterable[str] = ()) -> list[Requirement]:
    project: dict[str, Any] = PROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def holds(requirement: Requirement, environment: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(environment)


def unpinned(wanted: Iterable[Requirement], pins: Iterable[Requirement], environment: dict[str, str]) -> list[str]:
    """Requirements of an environment that have not exactly one pin that fits."""
    rows = []
    valid = [pin for pin in pins if holds(pin, environment)]
    for requirement in wanted:
        if not holds(requirement, environment):
            continue
        versions = [
            pin.specifier for pin in valid if canonicalize_name(pin.name) == canonicalize_name(requirement.name)
        ]
        pinned = [str(specifier).removeprefix("==") for specifier in versions if str(specifier).startswith("==")]
        if len(versions) != 1 or len(pinned) != 1 or not requirement.specifier.contains(pinned[0]):
            rows.append(f"{requirement} on Python {environment['python_version']}: {[str(v) for v in versions]}")
    return rows


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("machine", [X86, ARM], ids=["x86_64", "aarch64"])
def test_everything_the_makefile_installs_is_pinned_once(python: str, machine: dict[str, str]) -> None:
    environment = {**machine, "python_version": python, "python_full_version": f"{python}.9"}
    assert unpinned(requirements(PINNED_EXTRAS), constraints(), environment) == []


def test_a_missing_a_double_and_a_wrong_pin_are_found() -> None:
    environment = {**X86, "python_version": "3.10"}
    wanted = [Requirement("numpy>=2")]
    for lines in (
        [],
        ["numpy==2.1", "numpy==2.2"],
        ["numpy==1.26"],
        ["numpy>=2"],
        ["numpy==2.1; python_version>'3.10'"],
    ):
        assert unpinned(wanted, [Requirement(line) for line in lines], environment), lines
    assert unpinned(wanted, [Requirement("numpy==2.1")], environment) == []


@pytest.mark.parametrize("python", PYTHONS)
def test_rtx_brings_nothing_where_it_has_no_wheel(python: str) -> None:
    (rtx,) = (Requirement(line) for line in PROJECT["project"]["optional-dependencies"]["rtx"])
    base = {"python_version": python}
    assert holds(rtx, {**base, **X86})
    assert holds(rtx, {**base, "platform_machine": "x86_64", "sys_platform": "win32"})
    assert not holds(rtx, {**base, **ARM})
    assert not holds(rtx, {**base, "platform_machine": "x86_64", "sys_platform": "darwin"})


def test_spconv_follows_the_python_version() -> None:
    cuda = [Requirement(line) for line in PROJECT["project"]["optional-dependencies"]["cuda"]]
    for python, name in zip(PYTHONS, ("spconv-cu120", "spconv-cu120", "spconv-cu126", "spconv-cu126"), strict=True):
        found = [r.name for r in cuda if r.name.startswith("spconv") and holds(r, {**X86, "python_version": python})]
        assert found == [name]


def test_the_base_brings_no_torch() -> None:
    names = {canonicalize_name(requirement.name) for requirement in requirements()}
    assert not names & {"torch", "tensorrt", "tensorrt-rtx", "triton", "scipy", "onnxscript"}


def distribution_of(module: str) -> str:
    top = module.split(".", 1)[0]
    return DISTRIBUTION_OF_MODULE.get(top, canonicalize_name(top))


def test_what_is_imported_is_declared_and_what_build_needs_is_imported() -> None:
    imported = {found.name.split(".", 1)[0] for module in imports_of().values() for found in module}
    foreign = {distribution_of(name) for name in imported - set(sys.stdlib_module_names) - {*PACKAGES, ""}}
    extras = [extra for extra in PROJECT["project"]["optional-dependencies"] if extra != "test"]
    declared = {canonicalize_name(requirement.name) for requirement in requirements(extras)}
    assert len(foreign) > 8
    assert foreign - declared == set()
    needed = {canonicalize_name(requirement.name) for requirement in requirements(["compile"])}
    assert needed - foreign == set(), "declared for nothing"


def test_packages_listed_are_packages_on_disk() -> None:
    modules = modules_of()
    on_disk = {name for name, path in modules.items() if path.name == "__init__.py"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == on_disk
    homeless = [name for name in modules if "." in name and name.rpartition(".")[0] not in on_disk]
    assert homeless == [], "a folder of modules without __init__.py is not installed"


def test_every_file_that_is_no_module_is_package_data() -> None:
    data: dict[str, list[str]] = PROJECT["tool"]["setuptools"]["package-data"]
    installed = {
        path for package, patterns in data.items() for pattern in patterns for path in (ROOT / package).glob(pattern)
    }
    others = {
        path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert len(others) >= 4
    assert others - installed == set()
    assert ROOT / "dm3d_deploy" / "py.typed" in installed


def test_the_generic_names_are_ours() -> None:
    for module in (dm3d_deploy, calib, exporters, engines):
        assert Path(str(module.__file__)).parent == ROOT / module.__name__


def test_tests_shadow_no_package() -> None:
    files = list((ROOT / "tests").rglob("*.py"))
    assert len(files) > 50
    assert [path for path in files if path.name == "__init__.py"] == []
    assert [name for name, count in Counter(path.name for path in files).items() if count > 1] == []
    assert not {path.stem for path in files} & {*PACKAGES, *sys.stdlib_module_names}


def test_every_mark_in_use_is_explained() -> None:
    declared = {line.split(":")[0] for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    used = set()
    for path in (ROOT / "tests").rglob("*.py"):
        used |= set(re.findall(r"pytest\.mark\.(\w+)", ast.unparse(ast.parse(path.read_text(encoding="utf-8")))))
    assert used - {"parametrize", "skipif", "xfail", "filterwarnings", "usefixtures"} <= declared
