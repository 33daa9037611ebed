"""Every TensorRT name that our engines use exists in the bindings they are written for."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import engines

LISTS = {
    "tensorrt_rtx": ("trt_api_rtx_1.7.1.json",),
    "tensorrt": ("trt_api_10.16.1.json", "trt_api_11.4.0.json"),
}
ALWAYS = {"__version__", "__init__", "name"}  # Python's own; `name` is every enum member's


def bound_modules(tree: ast.AST) -> dict[str, str]:
    """Local name -> TensorRT module, through `import m as n`, `n = require("m", ...)`."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update({a.asname or a.name: a.name for a in node.names if a.name in LISTS})
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and node.value.args:
            module = node.value.args[0]
            if isinstance(module, ast.Constant) and module.value in LISTS:
                names.update({t.id: module.value for t in node.targets if isinstance(t, ast.Name)})
    return names


def root_of(node: ast.AST) -> str | None:
    while isinstance(node, (ast.Attribute, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def chain_of(node: ast.AST) -> list[str]:
    """trt.A.B -> ["A", "B"]; empty where something else than attributes stands between."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return names if isinstance(node, ast.Name) else []


def unknown_names(source: str, api: dict[str, dict[str, list[str]]]) -> tuple[list[str], int]:
    """What the source uses of TensorRT that the lists do not hold, and how many uses were checked."""
    tree = ast.parse(source)
    origin = bound_modules(tree)
    modules = dict(origin)
    for node in ast.walk(tree):  # an object that comes from a TensorRT call has TensorRT's members
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            root = root_of(node.value)
            module = origin.get(root or "")
            if module:
                origin.update({t.id: module for t in node.targets if isinstance(t, ast.Name)})
    unknown, uses = [], 0
    for node in ast.walk(tree):
        root = root_of(node) if isinstance(node, ast.Attribute) else None
        if root not in origin:
            continue
        assert isinstance(node, ast.Attribute)
        listed = api[origin[root]]
        types = {key.split(" ")[1]: members for key, members in listed.items()}
        uses += 1
        chain = chain_of(node)
        if root in modules and len(chain) == 1:
            good = chain[0] in types
        elif root in modules and len(chain) == 2 and chain[0] in types:
            good = chain[1] in types[chain[0]]
        else:
            good = any(node.attr in members for members in types.values())
        if not good and node.attr not in ALWAYS:
            unknown.append(f"{root}.{'.'.join(chain) or node.attr}")
    return unknown, uses


@pytest.fixture(scope="module")
def api(shared: Path) -> dict[str, dict[str, list[str]]]:
    folder = shared / "data" / "tensorrt_api"
    merged: dict[str, dict[str, list[str]]] = {}
    for module, files in LISTS.items():
        merged[module] = {}
        for file in files:
            for key, members in json.loads((folder / file).read_text()).items():
                merged[module].setdefault(key, []).extend(members or [])
    return merged


@pytest.mark.data
def test_engines_use_only_what_the_bindings_have(api: dict[str, dict[str, list[str]]]) -> None:
    folder = Path(engines.__file__).parent
    uses = {}
    for file in sorted(folder.glob("*.py")):
        unknown, uses[file.name] = unknown_names(file.read_text(encoding="utf-8"), api)
        assert unknown == [], file.name
    assert uses["rtx_worker.py"] >= 15
    assert uses["tensorrt_rtx.py"] >= 3


@pytest.mark.data
@pytest.mark.parametrize(
    "wrong",
    [
        "trt.BuilderFlag.FP16",  # gone with strong typing
        "trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
        "trt.Bilder(None)",
        "b = trt.Builder(None)\nb.build_engine_from_nothing()",
        "b = trt.Builder(None)\nc = b.create_builder_config()\nc.set_compute_capabilities(1)",
    ],
)
def test_the_guard_sees_a_wrong_name(api: dict[str, dict[str, list[str]]], wrong: str) -> None:
    unknown, _ = unknown_names(f"import tensorrt_rtx as trt\n{wrong}\n", api)
    assert unknown
    required = f"trt = require('tensorrt_rtx', extra='rtx')\n{wrong}\n"
    assert unknown_names(required, api)[0] == unknown


def test_flags_differ_in_number_so_they_are_used_by_name() -> None:
    """STRONGLY_TYPED is bit 1 in TensorRT 10 and bit 0 in 11 and RTX: no shift by a literal may stand for it."""
    for file in Path(engines.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr in ("create_network", "set_flag"):
                assert not any(isinstance(leaf, ast.Constant) for leaf in node.args), file.name
