"""What `inspect`, `models` and `devices` tell, and how it fits into a terminal."""

import io
import json
import sys

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from calib.calibration_set import load_frame, plan_frames
from dm3d_deploy.artifacts import digest_of_file
from dm3d_deploy.config import detector_names, load_config
from dm3d_deploy.doctor import device_rows
from dm3d_deploy.errors import CheckpointError, ExportError, StaleArtifact, UsageError
from dm3d_deploy.geometry.voxelize import voxelize
from dm3d_deploy.inspection import describe_path, print_description, print_rows
from dm3d_deploy.model_table import MULTIPLICATIONS, model_rows
from dm3d_deploy.models.bundled import bundled_weights

SLOT = "dense_head.heads_list"


def shown(call, *arguments, width=80):
    console = Console(file=io.StringIO(), width=width)
    call(*arguments, console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    return "\n".join(line.rstrip() for line in lines)


def test_a_run_tells_its_recipe_its_stages_and_its_files(tiny_run):
    found = describe_path(tiny_run)
    assert json.loads(json.dumps(found)) == found
    assert (found["what"], found["weights"], found["recipe"]["target"]) == ("run", "UNTRAINED", 0.5)
    assert found["files_changed_or_missing"] == 0
    assert [row["state"] for row in found["stages"]] == ["done"] * len(found["stages"])
    assert {row["check"] for row in found["files"]} == {"ok", "removed after use"}
    report = json.loads((tiny_run / "report.json").read_text())
    assert found["kept"]["of scope"] == pytest.approx(report["budget"]["kept"])
    assert found["kept"]["of model"] == pytest.approx(report["budget"]["kept_of_model"])
    dense = report["macs"]["dense"]
    assert found["kept"]["executed of model"] == pytest.approx(report["macs"]["executed"] / dense)
    assert describe_path(tiny_run / "manifest.json") == found


def test_a_run_tells_what_was_changed(run_copy):
    (run_copy / "onnx" / "bev_head.onnx").write_bytes(b"other")
    (run_copy / "work" / "allocation.json").unlink()
    found = describe_path(run_copy)
    checks = {row["file"]: row["check"] for row in found["files"]}
    assert (checks["onnx/bev_head.onnx"], checks["work/allocation.json"]) == ("changed", "missing")
    assert found["files_changed_or_missing"] == 2
    assert found["kept"] is None


@pytest.mark.parametrize("width", [80, 120])
def test_a_run_fits_the_terminal(tiny_run, width):
    text = shown(print_description, describe_path(tiny_run), width=width)
    assert "weights                   UNTRAINED" in text
    assert "removed after use" in text


def test_a_dense_graph_tells_its_interface_and_its_sparsity(tiny_run):
    file = tiny_run / "onnx" / "bev_head.onnx"
    found = describe_path(file)
    assert json.loads(json.dumps(found)) == found
    assert (found["bytes"], found["sha256"]) == (file.stat().st_size, digest_of_file(file))
    assert found["inputs"] == [{"name": "bev", "type": "float16", "shape": "1x32x16x16"}]
    assert {"name": "hm_0", "type": "float16", "shape": "1x1x16x16"} in found["outputs"]
    convolutions = found["nodes"]["Conv"] + found["nodes"]["ConvTranspose"]
    assert len(found["convolutions"]) == convolutions
    assert found["two_four_convolutions"].endswith(f" of {convolutions}")
    assert found["nodes_in_function_bodies"] == {}
    assert f"convolutions ({convolutions})" in shown(print_description, found)


def test_a_sparse_graph_tells_our_nodes(tiny_run):
    found = describe_path(tiny_run / "onnx" / "backbone3d.onnx")
    assert found["nodes"] == {"dm3d::SparseBackbone3d": 1}
    assert found["nodes_in_function_bodies"]["MatMul"] > 10
    assert {row["name"]: row["shape"] for row in found["inputs"]}["features"] == "4000x5"
    assert found["two_four_convolutions"] is None


def test_a_safetensors_file_is_read_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    weights = {"a": np.float32([1, np.nan, np.inf]), "b": np.float16([-np.inf]), "c": np.arange(6).reshape(2, 3)}
    save_file({**weights, "d": np.array(3, "f4")}, tmp_path / "w.safetensors")
    found = describe_path(tmp_path / "w.safetensors")
    assert (found["tensors_total"], found["numbers_total"], found["non_finite_total"]) == (4, 11, 3)
    assert found["tensors"][2] == {"name": "c", "type": "i64", "shape": "2x3", "numbers": 6, "non_finite": 0}
    assert found["tensors"][3]["shape"] == "scalar"
    assert found["looks_like"] == "no model known here (parts: a, b, c, d)"
    assert "non finite total  3" in shown(print_description, found)


def test_torch_and_safetensors_tell_the_same(tiny_run, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    source = tiny_run / "weights" / "pruned.safetensors"
    torch.save({"model_state": load_file(source), "epoch": 3}, tmp_path / "w.pth")
    one, two = describe_path(source), describe_path(tmp_path / "w.pth")
    for key in ("looks_like", "tensors_total", "numbers_total", "non_finite_total"):
        assert one[key] == two[key]
    parts = "a residual 3D backbone, a centre head with 1, 2, 2, 1, 2, 2 classes per task"
    assert one["looks_like"] == f"{parts}; of no configuration known here"


def test_bfloat16_and_types_that_numpy_lacks(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save

    save({"b": torch.tensor([1, torch.inf, torch.nan]).bfloat16()}, tmp_path / "b.safetensors")
    assert describe_path(tmp_path / "b.safetensors")["non_finite_total"] == 2
    save({"f": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "f.safetensors")
    assert describe_path(tmp_path / "f.safetensors")["types_not_checked_for_non_finite"] == 1


def test_a_known_model_is_guessed_by_its_tasks_and_width(tmp_path):
    tasks = (1, 2, 2, 1, 2, 2)
    weights = {f"{SLOT}.{task}.hm.0.0.weight": np.zeros((64, 64, 3, 3), "f4") for task in range(6)}
    weights |= {f"{SLOT}.{task}.hm.1.weight": np.zeros((count, 64, 3, 3), "f4") for task, count in enumerate(tasks)}
    weights["backbone_3d.conv_out.0.weight"] = np.zeros((128, 3, 1, 1, 128), "f4")
    weights["backbone_3d.conv1.0.conv1.weight"] = np.zeros((16, 3, 3, 3, 16), "f4")
    save_file(weights, tmp_path / "w.safetensors")
    told = "centerpoint or centerpoint-0075, by its classes per task and its width (not loaded)"
    assert describe_path(tmp_path / "w.safetensors")["looks_like"] == told


@pytest.mark.parametrize(
    ("scores", "before", "told"),
    [
        (18, "backbone_3d.conv_out.0.weight", "second, by its classes per task"),
        (50, "backbone_3d.conv_out.0.weight", "second-once, by its classes per task"),
        (18, "vfe.pfn_layers.0.linear.weight", "pointpillars, by its classes per task"),
        (7, "vfe.pfn_layers.0.linear.weight", "pillars, an anchor head of 7 scores a cell; of no configuration known"),
    ],
)
def test_anchor_heads_are_guessed_too(tmp_path, scores, before, told):
    weights = {"dense_head.conv_cls.weight": np.zeros((scores, 8, 1, 1), "f4")}
    weights[before] = np.zeros((128, 3, 1, 1, 64) if "3d" in before else (64, 10), "f4")
    save_file(weights, tmp_path / "w.safetensors")
    assert describe_path(tmp_path / "w.safetensors")["looks_like"].startswith(told)


@pytest.mark.parametrize(
    ("sixth", "told"), [(True, "voxelnext, by its"), (False, "centerpoint or centerpoint-0075, by")]
)
def test_a_sixth_stage_makes_a_voxelnext(tmp_path, sixth, told):
    classes = (1, 2, 2, 1, 2, 2)
    weights = {f"{SLOT}.{task}.hm.1.weight": np.zeros((count, 1, 1, 4), "f4") for task, count in enumerate(classes)}
    weights["backbone_3d.conv1.0.conv1.weight"] = np.zeros((4, 3, 3, 3, 4), "f4")
    weights["backbone_3d.conv_out.0.weight"] = np.zeros((128, 3, 1, 1, 128), "f4")
    if sixth:
        weights["backbone_3d.conv6.0.0.weight"] = np.zeros((4, 3, 3, 3, 4), "f4")
    save_file(weights, tmp_path / "w.safetensors")
    assert describe_path(tmp_path / "w.safetensors")["looks_like"].startswith(told)


@pytest.mark.parametrize("name", detector_names())
def test_parameters_and_fixed_multiplications_that_models_tells_are_counted(name):
    pytest.importorskip("torch")
    from dm3d_deploy.models.detector import build_detector, dense_positions

    row = next(row for row in model_rows() if row["model"] == name)
    detector = build_detector(load_config(name))
    assert row["parameters"] == sum(p.numel() for p in detector.parameters())
    weights = ((detector.get_parameter(f"{layer}.weight"), cells) for layer, cells in dense_positions(detector).items())
    assert row["MACs of 2D and head"] == sum(weight.numel() * cells for weight, cells in weights)


@pytest.mark.parametrize("name", ["centerpoint-0075", "pointpillars", "second"])
def test_multiplications_before_the_birds_eye_view_are_those_of_a_simulated_frame(name):
    pytest.importorskip("torch")
    from dm3d_deploy.models.detector import build_detector, sparse_pair_counts, tensors_from_voxels

    config = load_config(name)
    plan = plan_frames("simulated", dataset=config.dataset, calibration=1, selection=0, held_out=1, seed=0)
    voxels = voxelize(load_frame(next(ref for ref in plan.frames if ref.role == "calibration")), config)
    detector = build_detector(config)
    pairs = sparse_pair_counts(detector, tensors_from_voxels(voxels)[1])
    matrix = {layer: detector.get_parameter(f"{layer}.weight").numel() // len(taps) for layer, taps in pairs.items()}
    assert MULTIPLICATIONS[name].voxels == voxels.cells
    assert MULTIPLICATIONS[name].of_frame == sum(int(taps.sum()) * matrix[layer] for layer, taps in pairs.items())


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("g.onnx", ExportError, "is not an ONNX file"),
        ("g.safetensors", CheckpointError, "is not a whole safetensors file"),
        ("g.pth", CheckpointError, "nothing in it was executed"),
        ("g.txt", UsageError, "is neither a run's folder nor a file that ends in .onnx"),
    ],
)
@pytest.mark.parametrize("data", [b"", b"garbage" * 9, b"\x80\x02}q\x00." * 3])
def test_garbage_is_told_in_one_sentence(tmp_path, name, error, words, data):
    if name == "g.pth":
        pytest.importorskip("torch")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(error) as raised:
        describe_path(tmp_path / name)
    assert data != b"garbage" * 9 or words in raised.value.what
    assert "\n" not in str(raised.value)


def test_what_is_not_there_or_no_run(tmp_path, run_copy):
    with pytest.raises(UsageError, match="there is no file or folder"):
        describe_path(tmp_path / "none")
    with pytest.raises(UsageError, match=r"holds no manifest\.json"):
        describe_path(tmp_path)
    (run_copy / "measurements.json").write_text("[]")
    with pytest.raises(StaleArtifact, match="is not a record of measurements"):
        describe_path(run_copy)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_models_and_devices_fit_the_terminal(width):
    models, devices = model_rows(), device_rows()
    assert "centerpoint" in [row["model"] for row in models]
    for row in models:
        bundled = bundled_weights(row["model"]) is not None
        assert ("simulated scenes only" in row["weights"]) == bundled
        assert ("UNTRAINED" in row["weights"]) != bundled
    text = shown(print_rows, "models", models, width=width)
    assert "120,000" in text
    text = shown(print_rows, "devices", devices, width=width)
    assert all(row["device"] in text for row in devices)


def test_rows_keep_brackets_and_leave_out_empty_columns():
    rows = [{"name": "[bold]a[/]", "note": None, "size": 1234567}, {"name": "b", "note": "", "size": None}]
    text = shown(print_rows, "things", rows)
    assert "[bold]a[/]  1,234,567" in text
    assert "note" not in text
    assert "things (0)" in shown(print_rows, "things", [])
