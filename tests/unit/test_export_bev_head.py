"""BEV backbone and head as ONNX: torch's numbers, stable names, and nothing lost in silence."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from dm3d_deploy.config import load_config
from dm3d_deploy.errors import ExportError, UsageError
from dm3d_deploy.models.detector import build_detector
from dm3d_deploy.models.seeded import seed_weights
from engines.onnx_runtime import open_session
from exporters.bev_head import export_bev_head
from exporters.graph_checks import check_graph, sparsity_of

BRANCHES = ("center", "center_z", "dim", "rot", "vel", "hm")


@pytest.fixture
def detector(request):
    built = build_detector(load_config(request.path.parents[1] / "fixtures" / "centerpoint-tiny.yaml"))
    seed_weights(built, 0)
    return built


def weights_of(path):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 1e-2)])
def test_it_computes_what_torch_computes(detector, tmp_path, precision, tolerance):
    path = tmp_path / "bev_head.onnx"
    graph = export_bev_head(detector, path, precision=precision)
    kind = {"fp32": "float32", "fp16": "float16"}[precision]
    assert graph.inputs == {"bev": (kind, (1, 32, 16, 16))}
    assert list(graph.outputs) == [f"{branch}_{task}" for task in range(6) for branch in BRANCHES]
    assert graph.outputs["hm_1"] == (kind, (1, 2, 16, 16))
    assert graph.artifact.kind == f"bev_head_{precision}"
    bev = np.random.default_rng(0).normal(size=(1, 32, 16, 16)).astype(np.float32)
    outputs = open_session(path, digest=graph.artifact.digest, threads=1).run({"bev": bev.astype(kind)})
    with torch.no_grad():
        expected = detector.bev_to_heads(torch.from_numpy(bev))
    assert len(expected) == 36
    for key, value in expected.items():
        task, branch = key.split(".")
        found = outputs[f"{branch}_{task}"]
        assert found.dtype == kind
        assert np.abs(found - value.numpy()).max() <= tolerance * value.abs().max(), key


def test_the_graph_is_plain_and_named_like_the_parameters(detector, tmp_path):
    export_bev_head(detector, tmp_path / "a.onnx", precision="fp32")
    model = check_graph(tmp_path / "a.onnx")
    assert {node.op_type for node in model.graph.node} == {"Conv", "ConvTranspose", "Relu", "Concat", "Split"}
    names = {tensor.name for tensor in model.graph.initializer}
    packed = {
        output for name in names if name.endswith(".widths") for output in name.removesuffix(".widths").split("+")
    }
    assert {output.name for output in model.graph.output} - packed == {"hm_5"}
    convolutions = {
        name
        for name, module in detector.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d)
        and ("heads_list" not in name or "heads_list.5.hm." in name)
    }
    assert {name for name in names if "+" not in name} == {
        f"{name}.{part}" for name in convolutions for part in ("weight", "bias")
    }


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_equal_detectors_give_equal_bytes(detector, tmp_path, precision):
    digests = {export_bev_head(detector, tmp_path / f"{i}.onnx", precision=precision).artifact.digest for i in range(2)}
    assert len(digests) == 1


def test_zeros_of_a_mask_stay_and_lost_weights_are_counted(detector, tmp_path):
    layer = detector.backbone_2d.blocks[0][4]
    with torch.no_grad():
        layer.weight[:, ::2] = 0
        layer.weight[0, 1] = 1e-9
        layer.weight[1, 1] = 1e-7  # a subnormal of fp16: small, not lost
    exact = export_bev_head(detector, tmp_path / "32.onnx", precision="fp32")
    half = export_bev_head(detector, tmp_path / "16.onnx", precision="fp16")
    assert exact.rounded_to_zero == 0
    assert half.rounded_to_zero >= 9
    name = "backbone_2d.blocks.0.4.weight"
    kept, small = weights_of(tmp_path / "32.onnx")[name], weights_of(tmp_path / "16.onnx")[name]
    assert not kept[:, ::2].any()
    assert not small[:, ::2].any()
    assert kept[0, 1].all()
    assert not small[0, 1].any()
    lost = sum(
        int(((w16 == 0) & (w32 != 0)).sum())
        for w32, w16 in zip(
            weights_of(tmp_path / "32.onnx").values(), weights_of(tmp_path / "16.onnx").values(), strict=True
        )
    )
    assert half.rounded_to_zero == lost
    verdict = next(v for v in sparsity_of(tmp_path / "16.onnx") if v.weight == name)
    assert verdict.legal
    assert verdict.eligible


def test_weights_that_overflow_are_refused_by_name_and_number(detector, tmp_path):
    with torch.no_grad():
        detector.dense_head.heads_list[2].dim[1].bias[1] = 70000.0
        detector.dense_head.heads_list[2].rot[1].weight[0, 0] = -1e6
    with pytest.raises(ExportError, match="2 tensors do not fit fp16") as caught:
        export_bev_head(detector, tmp_path / "a.onnx", precision="fp16")
    assert "dense_head.heads_list.2.dim.1.bias (1 of 3, largest 70000)" in str(caught.value)
    assert "dense_head.heads_list.2.rot.1.weight (9 of 288, largest 1e+06)" in str(caught.value)
    assert not list(tmp_path.iterdir())
    export_bev_head(detector, tmp_path / "a.onnx", precision="fp32")


def test_modules_without_a_form_are_refused(detector, tmp_path):
    with pytest.raises(UsageError, match="no precision 'int4'"):
        export_bev_head(detector, tmp_path / "a.onnx", precision="int4")
    detector.backbone_2d.blocks[1][3] = torch.nn.GELU()
    with pytest.raises(ExportError, match=r"backbone_2d\.blocks\.1\.3 is a GELU, which has no ONNX form here"):
        export_bev_head(detector, tmp_path / "a.onnx", precision="fp32")
    detector.backbone_2d.blocks[1][3] = torch.nn.ReLU()
    detector.backbone_2d.blocks[1].insert(1, torch.nn.ReLU())
    with pytest.raises(ExportError, match=r"backbone_2d\.blocks\.1\.1 follows a ZeroPad2d"):
        export_bev_head(detector, tmp_path / "a.onnx", precision="fp32")


def test_paddings_that_are_not_zeros_are_refused(detector, tmp_path):
    detector.backbone_2d.blocks[0][4].padding_mode = "reflect"
    with pytest.raises(ExportError, match="pads by 'reflect'"):
        export_bev_head(detector, tmp_path / "a.onnx", precision="fp32")
    detector.backbone_2d.blocks[0][4].padding_mode = "zeros"
    detector.backbone_2d.deblocks[0].insert(0, torch.nn.ZeroPad2d(1))
    with pytest.raises(ExportError, match="ConvTranspose2d behind a ZeroPad2d"):
        export_bev_head(detector, tmp_path / "a.onnx", precision="fp32")
