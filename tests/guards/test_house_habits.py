"""Short files and functions, no broad excepts, no asserts as checks, no notes to oneself."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from source_tree import PACKAGES, ROOT, modules_of

LINES_OF_FILE = 400
LINES_OF_FUNCTION = 50
NOTES = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
TOO_BROAD = ("Exception", "BaseException")
OWN_TEXT = (".py", ".md", ".toml", ".yaml", ".txt", ".css", ".j2")

Found = Iterator[tuple[int, str]]


def long_file(text: str) -> Found:
    lines = len(text.splitlines())
    if lines >= LINES_OF_FILE:
        yield lines, f"{lines} lines; a file stays under {LINES_OF_FILE}"


def long_functions(text: str) -> Found:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines >= LINES_OF_FUNCTION:
                yield node.lineno, f"{node.name} has {lines} lines; a function stays under {LINES_OF_FUNCTION}"


def broad_excepts(text: str) -> Found:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler) and not _passes_on(node):
            caught = ast.unparse(node.type) if node.type else "everything"
            if node.type is None or any(re.search(rf"\b{name}\b", caught) for name in TOO_BROAD):
                yield node.lineno, f"catches {caught}"


def _passes_on(handler: ast.ExceptHandler) -> bool:
    """A handler that tidies up and raises the same again swallows nothing."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def asserts(text: str) -> Found:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assert):
            yield node.lineno, "an assert is no check of an input: raise what errors.py offers"


def notes(text: str) -> Found:
    for number, line in enumerate(text.splitlines(), start=1):
        if NOTES.search(line):
            yield number, f"a note to oneself: {line.strip()}"


def scrambling_saves(text: str) -> Found:
    for node in ast.walk(ast.parse(text)):
        names = node.names if isinstance(node, ast.ImportFrom) and node.module == "safetensors.numpy" else []
        if any(alias.name.startswith("save") for alias in names):
            yield node.lineno, "safetensors scrambles arrays that are not in C's order: use artifacts.write_tensors"


def found_in(paths: Iterable[Path], check: Callable[[str], Found]) -> list[str]:
    rows = []
    for path in paths:
        rows += [f"{path.relative_to(ROOT)}:{at} {what}" for at, what in check(path.read_text(encoding="utf-8"))]
    return rows


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("check", [long_file, long_functions])
def test_files_and_functions_are_short(check: Callable[[str], Found]) -> None:
    paths = sources(*PACKAGES, "tests", "benchmarks")
    assert len(paths) > 150
    assert found_in(paths, check) == []


@pytest.mark.parametrize("check", [broad_excepts, asserts])
def test_our_packages_check_and_catch_by_name(check: Callable[[str], Found]) -> None:
    paths = list(modules_of().values())
    assert len(paths) > 80
    assert found_in(paths, check) == []


def test_one_place_alone_writes_arrays() -> None:
    paths = sources(*PACKAGES, "benchmarks")
    found = found_in(paths, scrambling_saves)
    assert [row.split(":")[0] for row in found] == ["dm3d_deploy/artifacts.py"]


def test_nobody_left_notes() -> None:
    folders = (*PACKAGES, "tests", "benchmarks", "docs")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in OWN_TEXT]
    paths += [path for path in ROOT.iterdir() if path.suffix in OWN_TEXT or path.name == "Makefile"]
    assert len(paths) > 150
    assert found_in(paths, notes) == []


@pytest.mark.parametrize(
    ("check", "text", "count"),
    [
        (long_file, "x = 1\n" * 399, 0),
        (long_file, "x = 1\n" * 400, 1),
        (long_functions, "def f():\n" + "    x = 1\n" * 48, 0),
        (long_functions, "class A:\n    def f(self):\n" + "        x = 1\n" * 49, 1),
        (broad_excepts, "try:\n    f()\nexcept Exception:\n    pass\n", 1),
        (broad_excepts, "try:\n    f()\nexcept:\n    pass\n", 1),
        (broad_excepts, "try:\n    f()\nexcept (OSError, BaseException) as e:\n    print(e)\n", 1),
        (broad_excepts, "try:\n    f()\nexcept BaseException:\n    g()\n    raise\n", 0),
        (broad_excepts, "try:\n    f()\nexcept subprocess.TimeoutExpired:\n    pass\n", 0),
        (asserts, "def f(x):\n    assert x\n", 1),
        (asserts, "def f(x):\n    assert_that(x)\n", 0),
        (scrambling_saves, "from safetensors.numpy import load_file, save\n", 1),
        (scrambling_saves, "from safetensors.numpy import load_file\n", 0),
        (notes, "x = 1  # TO" + "DO: later\n", 1),
        (notes, "x = 1  # todos are welcome\n", 0),
    ],
)
def test_each_check_can_fail(check: Callable[[str], Found], text: str, count: int) -> None:
    assert len(list(check(text))) == count
