"""The ahead-of-time compiler: reproducible images, and one sentence for every kernel that cannot be used."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from dm3d_deploy.errors import EngineError, UsageError
from engines.sparse3d.aot import TARGETS, check_assemblers, compile_plan, over_limit, sms_of
from engines.sparse3d.describe import describe
from engines.sparse3d.plan import Kernel, Plan
from engines.sparse3d.plan_file import decode_plan, encode_plan

SCALE = Kernel(
    name="scale/128",
    function="kernels_sample.scale",
    signature=("*fp16", "*fp16", "i32", "fp32"),
    constexprs={"BLOCK": 128, "SHIFT": 0.5},
    num_warps=2,
)
PRODUCT = Kernel(
    name="product",
    function="kernels_sample.product",
    signature=("*fp16", "*fp16", "*fp16", "i32"),
    constexprs={"SIZE": 64},
)
CROWDED = Kernel(
    name="crowded",
    function="kernels_sample.crowded",
    signature=("*fp32", "*fp32"),
    constexprs={"BLOCK": 16384},
    num_warps=1,
)
GOOD_ROW = {
    "registers": 40,
    "spilled_bytes": 0,
    "global_scratch_bytes": 0,
    "profile_scratch_bytes": 0,
    "shared_bytes": 101376,
}


def plan_with(*kernels: Kernel) -> Plan:
    return Plan(
        kernels=kernels, buffers=(), constants=b"", steps=(), capacities={}, workspace_bytes=0, inputs=(), outputs=()
    )


@pytest.fixture(autouse=True)
def sample_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child finds the sample kernels beside this file; options of the caller do not reach the compiler."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PTXAS_OPTIONS", "--no-such-option")


def test_images_are_elf_files_that_two_runs_agree_on() -> None:
    pytest.importorskip("triton")
    plan = plan_with(SCALE, replace(SCALE, name="scale/256", constexprs={"BLOCK": 256, "SHIFT": 0.5}), PRODUCT)
    first, table = compile_plan(plan, (87, 110), package="aot_sample")
    second, again = compile_plan(plan, (110, 87), package="aot_sample")
    assert decode_plan(encode_plan(first)) == first
    for sm in (87, 110):
        for cubin in first.cubins[sm]:
            assert cubin.image[:4] == b"\x7fELF"
            assert cubin.hidden_params == 2
        assert [(cubin.symbol, cubin.threads) for cubin in first.cubins[sm][:2]] == [("scale", 64), ("scale", 64)]
    assert first.cubins[87][0].image != first.cubins[87][1].image
    assert sorted(map(str, table["kernels"])) == sorted(map(str, again["kernels"]))
    assert [row["matrix_products"] > 0 for row in table["kernels"]] == [False, False, True] * 2
    assert first.cubins[87] == second.cubins[87]
    if not table["reproducible"]:
        pytest.skip("this sandbox lets no process fix its addresses, which ptxas for sm_110 needs for equal bytes")
    assert encode_plan(first) == encode_plan(second)


def test_the_resource_table_is_plain_data_with_a_row_for_each_kernel() -> None:
    pytest.importorskip("triton")
    plan, table = compile_plan(plan_with(SCALE), (80,), package="aot_sample")
    (row,) = json.loads(json.dumps(table))["kernels"]
    assert (row["sm"], row["kernel"], row["function"]) == ("sm_80", "scale/128", "kernels_sample.scale")
    assert 0 < row["registers"] < 256
    assert row["spilled_bytes"] == row["stack_bytes"] == row["local_bytes"] == row["global_scratch_bytes"] == 0
    assert row["cubin_bytes"] == len(plan.cubins[80][0].image)
    assert table["standing"] == "built, not run here"
    assert table["targets"] == {"sm_80": {"ptx_version": 85, "platform_cuda": "12.6", "assembler": row["assembler"]}}


def test_images_are_of_their_platforms_major_release_of_cuda() -> None:
    """ELF's ABI version is 7 for CUDA 12's sm_80 to sm_90, 8 since; from 8 on the image itself names its assembler."""
    pytest.importorskip("triton")
    sms = (87, 101, 110, 120)
    plan, table = compile_plan(plan_with(SCALE), sms, package="aot_sample")
    told = {sm: table["targets"][f"sm_{sm}"]["assembler"] for sm in sms}
    assert {sm: release.partition(".")[0] for sm, release in told.items()} == {
        87: "12",
        101: "12",
        110: "13",
        120: "12",
    }
    images = {sm: plan.cubins[sm][0].image for sm in sms}
    assert {sm: image[8] for sm, image in images.items()} == {87: 7, 101: 8, 110: 8, 120: 8}
    for sm in sms[1:]:
        (release,) = re.findall(rb"tools, release (\d+\.\d+),", images[sm])
        assert release.decode() == told[sm]
    assert plan.meta["assemblers"] == {f"sm_{sm}": release for sm, release in told.items()}
    made_by = {row["sm"]: row["made_by"] for row in describe(plan)["images"]}
    assert made_by == {name: f"CUDA {release}" for name, release in plan.meta["assemblers"].items()}


def test_an_assembler_of_another_major_release_is_refused() -> None:
    check_assemblers({"12.9"}, 87)
    with pytest.raises(EngineError, match=r"sm_120 are of CUDA 13\.1, and a driver of CUDA 12\.8 need not"):
        check_assemblers({"13.1"}, 120)


def test_a_kernel_that_spills_is_refused() -> None:
    pytest.importorskip("triton")
    with pytest.raises(EngineError, match=r"crowded cannot be used on sm_86: it spills \d+ bytes per thread"):
        compile_plan(plan_with(CROWDED), (86,), package="aot_sample")


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("wrong", r"bad was not compiled for sm_87: the compiler ended with code 1 \(.*no_such_name"),
        ("absent", r"bad was not compiled for sm_87: the compiler ended with code 1 \(AttributeError: absent\)"),
        ("aborting", "bad was not compiled for sm_87: the compiler was killed by SIGABRT"),
    ],
)
def test_a_kernel_that_does_not_compile_is_named(function: str, sentence: str) -> None:
    pytest.importorskip("triton")
    bad = Kernel(name="bad", function=f"kernels_sample.{function}", signature=("*fp32", "*fp32"), constexprs={})
    with pytest.raises(EngineError, match=sentence):
        compile_plan(plan_with(bad), (87,), package="aot_sample")


def test_a_signature_of_another_length_is_told() -> None:
    pytest.importorskip("triton")
    with pytest.raises(EngineError, match=r"scale/128 was not compiled .* zip"):
        compile_plan(plan_with(replace(SCALE, signature=("*fp16",))), (87,), package="aot_sample")


def test_a_compiler_that_takes_too_long_is_stopped() -> None:
    pytest.importorskip("triton")
    with pytest.raises(EngineError, match=r"1 kernels were not compiled for sm_87 within 0\.01 s"):
        compile_plan(plan_with(SCALE), (87,), package="aot_sample", timeout_s=0.01)


@pytest.mark.parametrize(
    ("change", "sm", "sentence"),
    [
        ({}, 86, ""),
        ({"spilled_bytes": 8}, 86, "it spills 8 bytes per thread beside 40 registers"),
        ({"global_scratch_bytes": 128}, 86, "it wants 128 bytes of scratch memory, which nothing provides"),
        ({"profile_scratch_bytes": 1}, 86, "it wants 1 bytes of scratch memory"),
        ({"shared_bytes": 101377}, 86, "it wants 101377 bytes of shared memory of 101376"),
        ({"shared_bytes": 166912}, 87, ""),
        ({"shared_bytes": 166913}, 87, "166913 bytes of shared memory of 166912"),
        ({"shared_bytes": 232449}, 110, "of 232448"),
        ({"shared_bytes": 101377}, 120, "of 101376"),
    ],
)
def test_limits(change: dict[str, int], sm: int, sentence: str) -> None:
    told = over_limit({**GOOD_ROW, **change}, sm)
    assert sentence in told
    assert bool(told) == bool(sentence)


def test_architectures_are_named() -> None:
    assert sms_of(["sm_87", "sm_110", "sm_87"]) == (87, 110)
    assert {80, 86, 87, 89, 90, 100, 101, 110, 120} <= set(TARGETS)
    with pytest.raises(UsageError, match=r"not compiled for sm_75\. Fix: choose of sm_80, sm_86"):
        compile_plan(plan_with(SCALE), (75,), package="aot_sample")
