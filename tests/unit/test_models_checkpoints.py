"""Checkpoints: both spconv layouts, half precision, what does not fit, what is not a checkpoint, what is hostile."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models_sample import small_config

from dm3d_deploy.errors import CheckpointError, Dm3dError
from dm3d_deploy.models.checkpoints import load_checkpoint, save_weights
from dm3d_deploy.models.detector import build_detector
from dm3d_deploy.models.seeded import seed_weights


@pytest.fixture(scope="module")
def source():
    detector = build_detector(small_config())
    seed_weights(detector, 7)
    return detector


@pytest.fixture
def target():
    return build_detector(small_config())


def state_of(detector):
    return {name: value.clone() for name, value in detector.state_dict().items()}


def sparse_names(detector):
    return [f"backbone_3d.{name}.weight" for name, _ in detector.backbone_3d.convolutions()]


def same(a, b):
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def write(path, content):
    torch.save(content, path)
    return path


def old_layout(state, names):
    return {name: v.permute(1, 2, 3, 4, 0).contiguous() if name in names else v for name, v in state.items()}


def test_names_behind_a_ddp_wrapper_are_read(source, target, tmp_path):
    state = {f"module.{name}": value for name, value in state_of(source).items()}
    load_checkpoint(target, write(tmp_path / "ddp.pth", {"model_state": state}))
    assert same(source, target)


def test_axes_of_another_order_are_named(source, target, tmp_path):
    state, names = state_of(source), sparse_names(source)
    turned = {name: v.permute(0, 4, 1, 2, 3).contiguous() if name in names else v for name, v in state.items()}
    with pytest.raises(CheckpointError, match="misshapen") as caught:
        load_checkpoint(target, write(tmp_path / "turned.pth", turned))
    assert caught.value.fix.startswith("bring the axes into an order that spconv writes: [Cout, kz, ky, kx, Cin]")


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("layout", ["1.x", "2.x"])
def test_both_layouts_load(source, target, tmp_path, layout, wrap):
    state = state_of(source)
    if layout == "1.x":
        state = old_layout(state, sparse_names(source))
    info = load_checkpoint(target, write(tmp_path / "a.pth", {"model_state": state, "epoch": 3} if wrap else state))
    assert same(source, target)
    assert (info.spconv_layout, info.tensors, info.cast) == (layout, len(state), 0)
    assert len(info.digest) == 64


def test_an_optimiser_state_with_numpy_numbers_does_not_matter(source, target, tmp_path):
    groups = [{"lr": np.float64(1e-3), "momentum": np.float32(0.9), "step": np.int64(4)}]
    content = {"epoch": 2, "it": 9, "model_state": state_of(source), "optimizer_state": {"param_groups": groups}}
    load_checkpoint(target, write(tmp_path / "a.pth", {**content, "version": "pcdet+0.6.0"}))
    assert same(source, target)


def test_the_old_file_format_of_torch_loads(source, target, tmp_path):
    torch.save({"model_state": state_of(source)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    load_checkpoint(target, tmp_path / "a.pth")
    assert same(source, target)


def test_half_precision_is_cast_up_and_counted(source, target, tmp_path):
    state = {name: v.half() if v.is_floating_point() else v for name, v in state_of(source).items()}
    info = load_checkpoint(target, write(tmp_path / "a.pth", state))
    name = "backbone_2d.blocks.0.1.weight"
    assert target.state_dict()[name].dtype == torch.float32
    assert torch.equal(target.state_dict()[name], state[name].float())
    assert info.cast == sum(value.dtype == torch.float16 for value in state.values())


def test_saved_weights_come_back_and_their_bytes_depend_on_the_weights_alone(source, target, tmp_path):
    save_weights(source, tmp_path / "a.safetensors")
    info = load_checkpoint(target, tmp_path / "a.safetensors")
    assert same(source, target)
    assert info.spconv_layout == "2.x"
    # A non-contiguous parameter has the same values in another order of memory.
    weight = target.backbone_2d.blocks[0][1].weight
    weight.data = weight.data.to(memory_format=torch.channels_last)
    save_weights(target, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_weights_that_cannot_be_written_say_so(source, tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(Dm3dError, match=r"could not be written: it is a folder"):
        save_weights(source, tmp_path / "a.safetensors")


def test_a_mixture_of_layouts_is_refused(source, target, tmp_path):
    state = old_layout(state_of(source), sparse_names(source)[:3])
    with pytest.raises(CheckpointError, match=r"mixes spconv's weight layouts: 3 layers fit 1\.x only .* 18 fit 2\.x"):
        load_checkpoint(target, write(tmp_path / "a.pth", state))


def test_a_layer_that_fits_both_layouts_follows_the_others(tmp_path):
    config = small_config(channels=(3, 3, 6, 8, 10, 12))
    source, target = build_detector(config), build_detector(config)
    seed_weights(source)
    state = old_layout(state_of(source), sparse_names(source))
    name = "backbone_3d.conv1.0.conv1.weight"
    assert state[name].shape == source.state_dict()[name].shape
    assert load_checkpoint(target, write(tmp_path / "a.pth", state)).spconv_layout == "1.x"
    assert same(source, target)


def test_a_layout_that_cannot_be_told_is_refused(tmp_path):
    detector = build_detector(small_config(channels=(3, 3, 6, 8, 10, 12)))
    name = "backbone_3d.conv1.0.conv1.weight"
    with pytest.raises(CheckpointError, match=r"layout of .* cannot be told from its shapes: backbone_3d\.conv1\.0"):
        load_checkpoint(detector, write(tmp_path / "a.pth", {name: torch.zeros(3, 3, 3, 3, 3)}))


def test_what_does_not_fit_is_counted_and_the_first_five_named(source, target, tmp_path):
    before = state_of(target)
    state = state_of(source)
    gone = [name for name in state if name.startswith("backbone_2d.")]
    for name in gone:
        del state[name]
    state |= {f"dense_head.x.{i}": torch.zeros(1) for i in range(7)}
    state["dense_head.shared_conv.0.weight"] = torch.zeros(8, 8, 3, 3)
    state["global_step"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(target, write(tmp_path / "a.pth", state))
    text = str(caught.value)
    assert "does not fit small" in text
    assert f"{len(gone)} missing: {', '.join(gone[:5])}, …" in text
    assert gone[5] not in text
    assert "7 unexpected: dense_head.x.0, dense_head.x.1, dense_head.x.2, dense_head.x.3, dense_head.x.4, …" in text
    assert "2 misshapen: global_step float (1,) for integer (1,)" in text
    assert "dense_head.shared_conv.0.weight float (8, 8, 3, 3) for float (8, 18, 3, 3)" in text
    assert "configuration" in caught.value.fix
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(source, target, tmp_path, value):
    state = state_of(source)
    state["backbone_3d.conv_out.0.weight"][0, 0, 0, 0, 0] = value
    with pytest.raises(CheckpointError, match=r"NaN or infinity in 1 tensors: backbone_3d\.conv_out\.0\.weight"):
        load_checkpoint(target, write(tmp_path / "a.pth", state))


def test_numbers_too_large_for_float32_are_refused(source, target, tmp_path):
    state = state_of(source)
    state["dense_head.shared_conv.0.bias"] = state["dense_head.shared_conv.0.bias"].double() + 1e300
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        load_checkpoint(target, write(tmp_path / "a.pth", state))


def test_negative_variances_are_refused(source, target, tmp_path):
    state = state_of(source)
    state["backbone_3d.conv_out.1.running_var"] -= 9
    with pytest.raises(CheckpointError, match="negative variances in 1 tensors"):
        load_checkpoint(target, write(tmp_path / "a.pth", state))


def test_a_path_that_is_no_file_is_refused(target, tmp_path):
    with pytest.raises(CheckpointError, match=r"is a folder.*name the \.pth or \.safetensors"):
        load_checkpoint(target, tmp_path)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(target, tmp_path / "absent.pth")


def test_a_file_that_cannot_be_read_is_refused(target, tmp_path, monkeypatch):
    (tmp_path / "a.pth").write_bytes(b"x")

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        load_checkpoint(target, tmp_path / "a.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_empty_file_is_refused(target, tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is empty.*download or copy it again"):
        load_checkpoint(target, tmp_path / f"a{suffix}")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([1, 2], "holds a list and no named weights"),
        ({}, "holds a dict and no named weights"),
        ({1: torch.zeros(1)}, "holds a dict and no named weights"),
        (torch.zeros(3), "holds a Tensor and no named weights"),
        ({"epoch": 3, "state_dict": {}}, "holds 2 entries that are not plain tensors: epoch, state_dict"),
        ({"model_state": {"a": torch.zeros(2, 2).to_sparse()}}, "holds 1 entries that are not plain tensors: a"),
        ({"model_state": {"a": torch.zeros(2, device="meta")}}, "holds 1 entries that are not plain tensors: a"),
    ],
)
def test_other_contents_are_refused(target, tmp_path, content, text):
    with pytest.raises(CheckpointError, match=text):
        load_checkpoint(target, write(tmp_path / "a.pth", content))


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_payload_does_not_run(target, tmp_path, zipped):
    content = {"model_state": {"a": torch.zeros(1)}, "optimizer_state": Hostile(tmp_path / "owned")}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="nothing in it was executed"):
        load_checkpoint(target, tmp_path / "a.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Hostile(tmp_path / "owned")))
    with pytest.raises(CheckpointError, match="Fix: "):
        load_checkpoint(target, tmp_path / "plain.pth")
    assert not (tmp_path / "owned").exists()


def test_text_is_not_a_checkpoint(target, tmp_path):
    (tmp_path / "a.pth").write_text("<!DOCTYPE html><html>Sign in</html>")
    with pytest.raises(CheckpointError, match="torch checkpoint"):
        load_checkpoint(target, tmp_path / "a.pth")
    (tmp_path / "a.safetensors").write_text("<!DOCTYPE html><html>Sign in</html>")
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        load_checkpoint(target, tmp_path / "a.safetensors")


@pytest.fixture(scope="module")
def files(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    torch.save({"model_state": state_of(source)}, folder / "zip.pth")
    torch.save({"model_state": state_of(source)}, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    save_weights(source, folder / "new.safetensors")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "new.safetensors"])
def test_a_truncated_file_is_refused(target, tmp_path, files, name, share):
    (tmp_path / name).write_bytes(files[name][: int(len(files[name]) * share)])
    with pytest.raises(CheckpointError, match="Fix: "):
        load_checkpoint(target, tmp_path / name)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["zip.pth", "legacy.pth", "new.safetensors"]),
    limit=st.sampled_from([64, 2000, 1 << 30]),
    changes=st.lists(st.tuples(st.integers(0, (1 << 30) - 1), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damaged_bytes_load_or_are_refused_in_one_sentence(target, tmp_path, files, name, limit, changes):
    damaged = bytearray(files[name])
    for place, byte in changes:
        damaged[place % min(limit, len(damaged))] = byte
    (tmp_path / name).write_bytes(bytes(damaged))
    try:
        load_checkpoint(target, tmp_path / name)
    except CheckpointError as error:
        assert "Fix: " in str(error)  # noqa: PT017 - a damage that does not matter may load


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(min_size=1, max_size=200), start=st.sampled_from([b"", b"\x80\x02", b"PK\x03\x04"]))
def test_random_bytes_are_refused_in_one_sentence(target, tmp_path, content, start):
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(start + content)
        with pytest.raises(CheckpointError, match="Fix: "):
            load_checkpoint(target, tmp_path / name)
