"""What the guards know about the sources: their modules, and who imports whom, by syntax alone."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("dm3d_deploy", "calib", "exporters", "engines")
IMPORTING_CALLS = ("require", "import_module", "__import__")


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One imported module: `name` is dotted, `when` says whether it happens with the module, in a call, or never."""

    name: str
    line: int
    when: str  # "start", "call" or "typing"


def modules_of(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name and file of every module of our packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(root: Path = ROOT) -> dict[str, list[Import]]:
    """Every import of every module."""
    modules = modules_of(root)
    return {name: list(_imports(name, path, set(modules))) for name, path in modules.items()}


def _imports(module: str, path: Path, known: set[str]) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node, when in _with_time(tree, "start"):
        for name in _names(node, package, known):
            yield Import(name=name, line=getattr(node, "lineno", 0), when=when)


def _with_time(node: ast.AST, when: str) -> Iterator[tuple[ast.AST, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inner = "call"
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            inner = "typing"
        else:
            inner = when
        yield child, inner
        yield from _with_time(child, inner)


def _names(node: ast.AST, package: str, known: set[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        origin = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            yield f"{origin}.{alias.name}" if f"{origin}.{alias.name}" in known else origin
    elif isinstance(node, ast.Call) and node.args:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        word = node.args[0]
        if called in IMPORTING_CALLS and isinstance(word, ast.Constant) and isinstance(word.value, str):
            yield word.value


def within(module: str, prefixes: Iterable[str]) -> bool:
    """Whether a module is one of the prefixes or lies below one."""
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def reached(module: str, imports: Mapping[str, Iterable[Import]], times: Iterable[str]) -> set[str]:
    """Everything that importing `module` brings along, following our own modules and the packages around them."""
    wanted, seen = [module], set()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        parts = name.split(".")
        wanted += [".".join(parts[:count]) for count in range(1, len(parts))]
        wanted += [found.name for found in imports.get(name, ()) if found.when in times]
    return seen
