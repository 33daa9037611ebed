"""What the doctor says of a machine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from dm3d_deploy import doctor
from dm3d_deploy.device import DEVICES
from dm3d_deploy.doctor import CORE, PACKAGES, device_rows, diagnose, print_diagnosis
from dm3d_deploy.errors import MissingDependency
from engines import tensorrt_rtx

ROOT = Path(__file__).resolve().parents[2]


def distributions(block: str) -> set[str]:
    return set(re.findall(r'^\s*"([a-zA-Z0-9-]+)', block, flags=re.MULTILINE))


def test_the_packages_are_those_of_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    core = re.search(r"^dependencies = \[(.*?)^\]", text, flags=re.MULTILINE | re.DOTALL)
    assert core
    assert {name for names, extra, _ in PACKAGES if extra == CORE for name in names} == {
        *distributions(core[1]),
        "onnxruntime-gpu",
    }
    for extra in {extra for _, extra, _ in PACKAGES} - {CORE}:
        declared = re.search(rf"^{extra} = \[(.*?)\]\n", text, flags=re.MULTILINE | re.DOTALL)
        assert declared, extra
        named = set(re.findall(r'"([a-zA-Z0-9-]+)', declared[1])) - {"cumm-cu126"}  # a pin for spconv
        assert {name for names, e, _ in PACKAGES if e == extra for name in names} == named, extra
    extras = re.search(r"optional-dependencies\]\n(.*?)\n\[", text, flags=re.DOTALL)
    assert extras
    known = {extra for _, extra, _ in PACKAGES} - {CORE} | {"test"}
    assert set(re.findall(r"^(\w+) = \[", extras[1], flags=re.MULTILINE)) == known


def test_a_diagnosis_is_plain_data(tmp_path: Path) -> None:
    found = diagnose(tmp_path)
    plain = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert plain["disk_free_bytes"] > 0
    assert plain["cores_usable"] >= 1
    numpy = next(package for package in plain["packages"] if package["name"] == "numpy")
    assert numpy["version"]
    assert numpy["fix"] is None


def test_what_is_missing_says_which_extra_brings_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed = {"numpy": "2.0", "onnxruntime-gpu": "1.31", "dm3d-deploy": "1.0"}
    monkeypatch.setattr(
        doctor, "version_of", lambda *names: next((installed[name] for name in names if name in installed), None)
    )
    monkeypatch.setattr(doctor, "gpu_here", lambda: None)
    monkeypatch.setattr(tensorrt_rtx, "rtx_missing", lambda: MissingDependency("no [rtx] wheel.", fix="use x86_64"))
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    found = diagnose(tmp_path)
    missing = {package.name: package for package in found.missing}
    assert missing["torch"].fix == "pip install 'dm3d-deploy[compile]'"
    assert missing["onnx"].fix == "pip install 'dm3d-deploy'"
    assert missing["tensorrt"].extra == "tensorrt"
    assert "3D plan" in missing["triton"].enables
    assert "onnxruntime or onnxruntime-gpu" not in missing
    text = printed(found)
    for words in (
        "no GPU",
        "OMP_NUM_THREADS=4",
        "dm3d-deploy[compile]'   brings torch",
        "no [rtx] wheel. Fix: use x86_64",
    ):
        assert words in text, words


def printed(found: doctor.Diagnosis) -> str:
    out = StringIO()
    print_diagnosis(found, Console(file=out, width=80))
    return out.getvalue()


def test_it_prints_to_the_terminal_by_itself(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    print_diagnosis(diagnose(tmp_path))
    assert "Python" in capsys.readouterr().out


def test_the_doctor_imports_nothing_heavy() -> None:
    heavy = ("torch", "onnx", "onnxruntime", "tensorrt_rtx", "matplotlib", "scipy")
    program = (
        "import sys; from dm3d_deploy.doctor import *; diagnose(); device_rows();"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def here(name: str) -> str:
    return next(row["here"] for row in device_rows() if row["device"] == name)


def test_every_device_has_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = device_rows()
    assert [row["device"] for row in rows] == [device.name for device in DEVICES]
    assert json.dumps(rows)
    assert len({tuple(row) for row in rows}) == 1
    assert "no IPluginV3" in here("drive-orin")
    assert here("cpu") == "runs here with ONNX Runtime"


def test_a_row_says_what_can_be_built_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_rtx, "rtx_missing", lambda: None)
    monkeypatch.setattr(doctor, "version_of", lambda *names: None)
    assert here("rtx4090") == "engines are built here"
    assert here("orin") == "ONNX here; the engine is built on the device (its own TensorRT)"
    monkeypatch.setattr(tensorrt_rtx, "rtx_missing", lambda: MissingDependency("no wheel.", fix="x"))
    monkeypatch.setattr(doctor, "version_of", lambda *names: "10.3")
    assert here("rtx4090") == "no engine here: no wheel."
    assert here("orin") == "ONNX here; the engine is built on the device (TensorRT 10.3 is installed here)"
