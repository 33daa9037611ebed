"""A module imports its own floor or a lower one; the three rooms of floor 2 do not know each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from source_tree import PACKAGES, Import, imports_of, modules_of, reached, within

ROOMS = ("calib", "exporters", "engines")
GROUND = (
    "artifacts", "config", "device", "errors", "evidence", "measurements", "pointcloud", "progress", "recipe",
    "yaml_reader",
)  # fmt: skip
FIRST = ("evaluation", "geometry", "models", "pruning", "training")
WITHOUT_TORCH = (
    *(f"dm3d_deploy.{name}" for name in GROUND),
    "dm3d_deploy.geometry",
    "dm3d_deploy.reporting",
    "dm3d_deploy.detect",
    "dm3d_deploy.detect_files",
    "engines",
    "calib.calibration_set",
    "calib.pcd_reader",
    "calib.readers",
    "calib.simulator",
)
GIANTS = ("torch", "onnx", "onnxruntime", "tensorrt_rtx", "matplotlib", "scipy", "triton", "spconv")


def floor_of(module: str) -> int:
    """The floor of a module of ours: what nobody named lies under the roof, where no lower floor may know it."""
    if module == "dm3d_deploy" or within(module, (f"dm3d_deploy.{name}" for name in GROUND)):
        return 0
    if within(module, (f"dm3d_deploy.{name}" for name in FIRST)):
        return 1
    return 2 if within(module, ROOMS) else 3


def room_of(module: str) -> str:
    return module.split(".", 1)[0]


def broken_laws(imports: Mapping[str, Iterable[Import]]) -> list[str]:
    broken = []
    for module, found in imports.items():
        own = floor_of(module)
        for imported in found:
            other = floor_of(imported.name) if room_of(imported.name) in PACKAGES else 0
            where = f"{module}:{imported.line} imports {imported.name}"
            if other > own:
                broken.append(f"{where}: floor {own} may not know floor {other}")
            elif own == other == 2 and room_of(module) != room_of(imported.name):
                broken.append(f"{where}: files and arrays are what passes between these rooms")
    return broken


def giants_behind(imports: Mapping[str, Iterable[Import]], modules: Iterable[str], giants: Iterable[str]) -> list[str]:
    found = []
    for module in modules:
        around = reached(module, imports, ("start", "call"))
        found += [f"{module} brings {giant}" for giant in giants if any(within(name, (giant,)) for name in around)]
    return found


def test_the_law_holds() -> None:
    imports = imports_of()
    ours = [found for module in imports.values() for found in module if room_of(found.name) in PACKAGES]
    assert len(imports) > 80
    assert len(ours) > 200, "the guard saw no imports"
    assert broken_laws(imports) == []


def test_what_runs_in_the_vehicle_knows_no_torch() -> None:
    imports = imports_of()
    modules = [module for module in imports if within(module, WITHOUT_TORCH)]
    assert len(modules) > 40
    assert giants_behind(imports, modules, ["torch"]) == []
    assert giants_behind(imports, ["exporters.bev_head"], ["torch"]), "the guard finds torch where it is"


def test_the_command_line_starts_without_giants() -> None:
    around = reached("dm3d_deploy.cli", imports_of(), ("start",))
    assert not [name for name in around if within(name, (*GIANTS, "numpy"))]


def test_every_torch_free_name_exists() -> None:
    modules = modules_of()
    assert [name for name in WITHOUT_TORCH if name not in modules] == []


PLANTED = {
    "engines/__init__.py": "",
    "calib/__init__.py": "",
    "exporters/__init__.py": "",
    "dm3d_deploy/__init__.py": "",
    "dm3d_deploy/errors.py": "",
    "dm3d_deploy/geometry/__init__.py": "",
    "dm3d_deploy/geometry/boxes.py": "from dm3d_deploy import errors\n",
}


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("engines/a.py", "import exporters\n", "between these rooms"),
        ("calib/a.py", "def f():\n    from engines import b\n", "between these rooms"),
        ("dm3d_deploy/errors.py", "from dm3d_deploy.geometry import boxes\n", "floor 0 may not know floor 1"),
        ("dm3d_deploy/geometry/nms.py", "from . import cells\nimport calib.b\n", "floor 1 may not know floor 2"),
        ("dm3d_deploy/pruning/a.py", "import importlib\nimportlib.import_module('calib')\n", "may not know floor 2"),
        ("dm3d_deploy/pruning/a.py", "if TYPE_CHECKING:\n    import engines\n", "may not know floor 2"),
        ("exporters/a.py", "class A:\n    from dm3d_deploy.cli import app\n", "floor 2 may not know floor 3"),
        ("dm3d_deploy/attic.py", "import engines, calib, dm3d_deploy.geometry.boxes\n", None),
        ("dm3d_deploy/geometry/a.py", "import dm3d_deploy.attic\n", "floor 1 may not know floor 3"),
        ("dm3d_deploy/geometry/a.py", "from .boxes import f\n", None),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, text: str, words: str | None) -> None:
    for name, content in {**PLANTED, file: text}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    broken = broken_laws(imports_of(tmp_path))
    assert broken == [] if words is None else any(words in row for row in broken), broken


def test_a_planted_torch_is_found_behind_a_call(tmp_path: Path) -> None:
    files = {**PLANTED, "engines/a.py": "def f():\n    import engines.b\n", "engines/b.py": "from torch import nn\n"}
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    imports = imports_of(tmp_path)
    assert giants_behind(imports, ["engines.a"], ["torch"]) == ["engines.a brings torch"]
    assert giants_behind(imports, ["dm3d_deploy.geometry.boxes"], ["torch"]) == []
