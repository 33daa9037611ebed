"""A plan refuses to be born wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from plan_sample import sample_plan, sample_with_cubins

from dm3d_deploy.errors import EngineError
from engines.sparse3d.plan import F32, FEATURES, I32, I64, Launch, Memset, PlanLayer, Pointer, packed_constants

PLAN = sample_plan()
GOOD = PLAN.steps[1]
assert isinstance(GOOD, Launch)


def with_arg(position: int, arg: Any) -> Launch:
    args = (*GOOD.args[:position], arg, *GOOD.args[position + 1 :])
    return replace(GOOD, args=args)


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        (replace(GOOD, kernel=2), "launches kernel 2 of 2"),
        (replace(GOOD, grid=(0, 1, 1)), r"has the grid \(0, 1, 1\)"),
        (replace(GOOD, grid=(1, 65536, 1)), r"has the grid \(1, 65536, 1\)"),
        (replace(GOOD, args=GOOD.args[:5]), "passes 5 arguments to kernels.scale, which takes 6"),
        (with_arg(3, I64(1)), "argument 3 of kernels.scale is i64, not i32"),
        (with_arg(0, I32(1)), "argument 0 of kernels.scale is i32, not \\*fp16"),
        (with_arg(3, Pointer(0)), "argument 3 of kernels.scale is a pointer, not i32"),
        (with_arg(3, I32(2**31)), "is 2147483648, more than 32 bits"),
        (with_arg(4, I64(-(2**63) - 1)), "more than 64 bits"),
        (with_arg(5, F32(1e39)), "is inf, no 32-bit number"),
        (with_arg(0, Pointer(6)), "names buffer 6 of 6"),
        (with_arg(0, Pointer(0, 8)), "points at byte 8 of 'weights'"),
        (with_arg(0, Pointer(0, 80)), "points at byte 80 of 'weights', outside its 80 bytes"),
        (Memset(buffer=0, offset=0, bytes=4), "fills the constant 'weights'"),
        (Memset(buffer=2, offset=2, bytes=4), "no words of 32 bits"),
        (Memset(buffer=2, offset=0, bytes=4, value=-1), "no words of 32 bits"),
        (Memset(buffer=2, offset=0, bytes=1004), "fills bytes 0..1004 of 1000"),
        (Memset(buffer=2, offset=0, bytes=0), "fills bytes 0..0 of 1000"),
    ],
)
def test_wrong_steps_are_refused(step: Launch | Memset, sentence: str) -> None:
    with pytest.raises(EngineError, match=sentence):
        replace(PLAN, steps=(step,))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"offset": 128}, "starts at 128, no multiple of 256"),
        ({"bytes": 1300}, "ends at byte 1556 of 1500"),
        ({"bytes": 0}, "has 0 bytes"),
        ({"offset": -256}, "at offset -256"),
        ({"kind": "host"}, "unknown kind 'host'"),
        ({"kind": "input"}, "ends at byte 1256 of 1000"),
    ],
)
def test_wrong_buffers_are_refused(change: dict[str, Any], sentence: str) -> None:
    buffers = list(PLAN.buffers)
    buffers[2] = replace(buffers[2], **change)
    with pytest.raises(EngineError, match=sentence):
        replace(PLAN, buffers=tuple(buffers))


def test_wrong_bindings_are_refused() -> None:
    (features,) = PLAN.inputs
    for change, sentence in (
        ({"shape": (4, 4)}, r"fp32\[4, 4\] does not fit the input buffer 'features' of 48 bytes"),
        ({"buffer": 4}, "does not fit the output buffer 'bev'"),
        ({"dtype": "fp8"}, "unknown type 'fp8'"),
        ({"shape": (-4, -3)}, "does not fit"),
    ):
        with pytest.raises(EngineError, match=sentence):
            replace(PLAN, inputs=(replace(features, **change),))
    with pytest.raises(EngineError, match=r"bindings name the buffers \[4, 5\]"):
        replace(PLAN, inputs=())


def test_wrong_kernels_are_refused() -> None:
    scale = PLAN.kernels[0]
    for change, sentence in (
        ({"function": "os.system"}, "'os.system' names no kernel of ours"),
        ({"function": "kernels.os.system"}, "names no kernel of ours"),
        ({"signature": ("*fp8",)}, r"unknown types: \['\*fp8'\]"),
        ({"constexprs": {"B": "x"}}, "constexprs that are no numbers"),
        ({"num_warps": 3}, "asks for 3 warps"),
        ({"num_stages": 9}, "9 stages"),
    ):
        with pytest.raises(EngineError, match=sentence):
            replace(PLAN, kernels=(replace(scale, **change), PLAN.kernels[1]))


def test_a_wrong_status_and_wrong_layers_are_refused() -> None:
    assert PLAN.status is not None
    with pytest.raises(EngineError, match="4 words at byte 4 of 16"):
        replace(PLAN, status=replace(PLAN.status, offset=4))
    with pytest.raises(EngineError, match="counts a stage without capacity"):
        replace(PLAN, capacities={})
    with pytest.raises(EngineError, match="status lies in the constant"):
        replace(PLAN, status=replace(PLAN.status, buffer=1, words=PLAN.status.words[:1]))
    with pytest.raises(EngineError, match="the layer 'a' has the tiles"):
        PlanLayer(name="a", tiles_kept=3, tiles_total=2, taps=27, in_channels=1, out_channels=1)


def test_wrong_images_are_refused() -> None:
    plan = sample_with_cubins(87)
    scale, count = plan.cubins[87]
    with pytest.raises(EngineError, match="sm_87 has 1 images for 2 kernels"):
        replace(plan, cubins={87: (scale,)})
    for change in ({"threads": 100}, {"threads": 2048}, {"image": b""}, {"shared_bytes": -1}, {"hidden_params": 9}):
        with pytest.raises(EngineError, match="the image of 'scale' for sm_87 has"):
            replace(plan, cubins={87: (replace(scale, **change), count)})


def test_features_follow_from_what_is_used() -> None:
    assert PLAN.features == sum(FEATURES.values())
    assert replace(PLAN, steps=PLAN.steps[2:3], status=None).features == 0


def test_floats_are_those_that_the_kernel_sees() -> None:
    assert F32(0.1).value == float(np.float32(0.1)) != 0.1


def test_buffers_are_found_by_name() -> None:
    assert PLAN.buffer_index("bits") == 2
    with pytest.raises(EngineError, match="0 buffers are named 'bots'"):
        PLAN.buffer_index("bots")


def test_constants_are_packed_aligned_and_little_endian() -> None:
    blob, (first, second) = packed_constants({"a": np.array([1], ">i4"), "b": np.array([2], "<i2")})
    assert (first.offset, first.bytes, second.offset, second.bytes) == (0, 4, 256, 2)
    assert blob[:4] == b"\x01\0\0\0"
    assert blob[256:258] == b"\x02\0"
    assert len(blob) == 512
