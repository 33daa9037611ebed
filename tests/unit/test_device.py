"""The device table, the choice of devices, and the stamp."""

from __future__ import annotations

import dataclasses
import json
import re
import stat
import sys
from pathlib import Path

import pytest

from dm3d_deploy import device as device_module
from dm3d_deploy.device import (
    DEVICES,
    GPU_QUERY,
    device_named,
    devices_from,
    gpu_here,
    rtx_targets,
    stamp_here,
    version_of,
)
from dm3d_deploy.errors import UsageError

RTX_4090 = "NVIDIA GeForce RTX 4090, 560.35, 8.9, 2520 MHz, 3105 MHz, 450.00 W, P0, 41, 24564 MiB"


def program(folder: Path, name: str, body: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def path_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH of one empty folder: no GPU tool answers until a test puts one there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def nvidia_smi(folder: Path, line: str) -> None:
    program(folder, "nvidia-smi", f"echo '{line}'")


def test_table_is_well_formed() -> None:
    names = [device.name for device in DEVICES]
    assert len(names) == len(set(names))
    for device in DEVICES:
        assert device.builds_here in ("tensorrt_rtx", "on the device", "onnxruntime")
        assert device.sm is None or re.fullmatch(r"sm_\d{2,3}", device.sm)
        figures = (device.fp16_tflops, device.int8_tops, device.gb_per_s, device.clock_ghz, device.multiprocessors)
        assert all(f is None for f in figures) == (device.standing is None), device.name
        assert all(f is not None and f > 0 for f in figures) or all(f is None for f in figures), device.name


@pytest.mark.data
def test_peaks_are_those_of_the_latency_page(shared: Path) -> None:
    page = (shared / "design" / "latency_model.md").read_text()
    rows = {
        "orin": "Jetson AGX Orin 64 GB, MAXN",
        "orin-jp7": "Jetson AGX Orin 64 GB, MAXN",
        "drive-orin": "DRIVE Orin",
        "thor-jp7": "Jetson Thor T5000",
        "a100": "A100 PCIe 40 GB",
        "a30": "A30",
        "rtx4090": "RTX 4090 (fp32 accumulate)",
        "h200": "H200 SXM",
    }
    lines = {cells[1].strip(): cells for line in page.splitlines() if len(cells := line.split("|")) == 9}
    for name, row in rows.items():
        cells = [cell.strip().replace(",", "") for cell in lines[row][2:8]]
        d = device_named(name)
        expected = [d.multiprocessors, d.clock_ghz, d.fp16_tflops, d.int8_tops, d.gb_per_s]
        assert [float(cell) for cell in cells[:5]] == expected, name
        assert d.standing == cells[5], name
    assert {d.name for d in DEVICES if d.standing} == set(rows)


def test_auto_without_a_gpu_is_the_rtx_group(path_dir: Path) -> None:
    devices = devices_from("auto")
    assert devices == devices_from("rtx")
    assert rtx_targets(devices) == ("sm_80", "sm_86", "sm_89", "sm_120")


def test_auto_takes_the_gpu_that_answers(path_dir: Path) -> None:
    nvidia_smi(path_dir, RTX_4090)
    assert [d.name for d in devices_from("auto")] == ["rtx4090"]


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        (RTX_4090.replace("GeForce RTX 4090", "L4"), "--device rtx4090"),
        (RTX_4090.replace("GeForce RTX 4090", "Orin (nvgpu)").replace("8.9", "8.7"), "orin or orin-jp7 or drive-orin"),
        (RTX_4090.replace("8.9", "6.1"), "name a device"),
    ],
)
def test_auto_refuses_to_guess(path_dir: Path, line: str, fix: str) -> None:
    nvidia_smi(path_dir, line)
    with pytest.raises(UsageError, match="is not one row of the device table") as caught:
        devices_from("auto")
    assert fix in caught.value.fix


def test_lists_keep_order_and_name_each_device_once() -> None:
    assert [d.name for d in devices_from("thor, orin,thor")] == ["thor", "orin"]
    assert [d.name for d in devices_from("DGX-Spark")] == ["gb10"]
    assert [d.name for d in devices_from("rtx4090,rtx")][:2] == ["rtx4090", "a100"]


def test_rtx_targets_leave_out_what_is_built_on_the_device() -> None:
    assert rtx_targets(devices_from("orin,h200,cpu")) == ()
    assert rtx_targets(devices_from("rtx5090,orin,a100,a30")) == ("sm_80", "sm_120")


def test_unknown_device_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'oirn' is unknown.*did you mean 'orin'"):
        devices_from("oirn")
    with pytest.raises(UsageError, match="no device was named"):
        devices_from(" ,")


def test_drive_orin_is_refused_with_its_reason() -> None:
    with pytest.raises(UsageError, match=r"TensorRT 8\.x, which has no IPluginV3"):
        devices_from("drive-orin")
    assert device_named("drive-orin").fp16_tflops == 41.8


@pytest.mark.parametrize("body", ["exit 9", "echo", "echo 'No devices were found'", "echo a, b"])
def test_no_gpu_where_nvidia_smi_says_nothing_useful(path_dir: Path, body: str) -> None:
    assert gpu_here() is None
    program(path_dir, "nvidia-smi", body)
    assert gpu_here() is None


def test_a_hanging_nvidia_smi_is_no_gpu(path_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "QUERY_TIMEOUT_S", 0.2)
    program(path_dir, "nvidia-smi", "exec /bin/sleep 5")
    assert gpu_here() is None


def test_stamp_without_a_gpu(path_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    stamp = stamp_here()
    plain = json.loads(json.dumps(stamp.as_json()))
    assert plain["gpu"] == "no GPU"
    assert plain["omp_num_threads"] == "3"
    assert plain["cpu"]
    assert 1 <= plain["cores_usable"] <= plain["cores"]
    assert plain["libraries"]["numpy"] == version_of("numpy")
    assert "torch" not in plain["libraries"]


def test_stamp_names_torch_only_where_it_was_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", json)
    monkeypatch.setattr(device_module, "version_of", lambda *names: f"version of {names[0]}")
    assert stamp_here().libraries["torch"] == "version of torch"


def test_stamp_with_a_gpu_carries_clocks_power_and_temperature(path_dir: Path) -> None:
    nvidia_smi(path_dir, RTX_4090)
    program(path_dir, "nvpmodel", "printf 'NV Power Mode: MAXN\\n0\\n'")
    gpu = stamp_here().gpu
    assert gpu is not None
    assert gpu["name"] == gpu_here() == "NVIDIA GeForce RTX 4090"
    assert (gpu["driver_version"], gpu["clocks.sm"], gpu["temperature.gpu"]) == ("560.35", "2520 MHz", "41")
    assert gpu["power_mode"] == "NV Power Mode: MAXN 0"
    assert set(gpu) == {*GPU_QUERY, "power_mode"}


def test_version_of_takes_the_first_that_is_installed() -> None:
    assert version_of("no-such-distribution", "numpy") == version_of("numpy") is not None
    assert version_of("no-such-distribution") is None


def test_rows_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DEVICES[0].sm = "sm_1"  # type: ignore[misc]
