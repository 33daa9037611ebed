"""The plan file: nothing is lost, equal plans are equal bytes, and every damaged file is refused in one sentence."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_sample import sample_plan, sample_with_cubins

from dm3d_deploy.errors import EngineError, StaleArtifact
from engines.sparse3d import plan_file
from engines.sparse3d.plan_file import decode_plan, encode_plan, read_plan, write_plan

WHOLE = encode_plan(sample_with_cubins(87, 110))


def stamped(data: bytes) -> bytes:
    """The bytes with the digest and the size that they should have."""
    changed = bytearray(data)
    struct.pack_into("<Q", changed, 24, len(changed))
    changed[plan_file.DIGEST_AT : plan_file.HEADER.size] = bytes(32)
    changed[plan_file.DIGEST_AT : plan_file.HEADER.size] = hashlib.sha256(changed).digest()
    return bytes(changed)


def section(kind: int, data: bytes = WHOLE) -> tuple[int, int, int]:
    """Where the table entry of a section stands, where the section starts, and its length."""
    for index in range(struct.unpack_from("<I", data, 40)[0]):
        at = plan_file.HEADER.size + index * plan_file.SECTION.size
        found, _, offset, size = plan_file.SECTION.unpack_from(data, at)
        if found == kind:
            return at, offset, size
    raise KeyError(kind)


def changed(at: int, new: bytes, data: bytes = WHOLE) -> bytes:
    return stamped(data[:at] + new + data[at + len(new) :])


def test_a_plan_comes_back_as_it_was(tmp_path: Path) -> None:
    plan = sample_with_cubins(120, 87)
    write_plan(tmp_path / "backbone.plan", plan)
    assert read_plan(tmp_path / "backbone.plan") == plan


def test_the_neutral_part_does_not_depend_on_cubins() -> None:
    neutral, full = encode_plan(sample_plan()), encode_plan(sample_with_cubins(87))
    for kind in plan_file.NEUTRAL:
        _, start, size = section(kind, neutral)
        _, other, same = section(kind, full)
        assert size == same
        assert neutral[start : start + size] == full[other : other + size]
    assert encode_plan(sample_plan()) == neutral


def test_cubins_are_in_the_order_of_the_architectures() -> None:
    assert encode_plan(sample_with_cubins(110, 87)) == WHOLE


def test_constants_start_aligned() -> None:
    assert section(plan_file.CONSTANTS)[1] % 256 == 0


def test_every_flipped_byte_is_refused() -> None:
    for at in range(0, len(WHOLE), 7):
        data = WHOLE[:at] + bytes([WHOLE[at] ^ 0x10]) + WHOLE[at + 1 :]
        with pytest.raises(StaleArtifact):
            decode_plan(data)


def test_every_truncation_is_refused() -> None:
    for size in (*range(0, 400, 3), *range(400, len(WHOLE), 111), len(WHOLE) - 1):
        with pytest.raises(StaleArtifact, match=r"do not begin like a launch plan|should have \d+ bytes and has"):
            decode_plan(WHOLE[:size])
        with pytest.raises((StaleArtifact, EngineError)):
            decode_plan(stamped(WHOLE[: max(size, plan_file.HEADER.size)]))


def test_the_digest_is_told() -> None:
    at = section(plan_file.CONSTANTS)[1]
    flipped = WHOLE[:at] + bytes([WHOLE[at] ^ 1]) + WHOLE[at + 1 :]
    with pytest.raises(
        StaleArtifact, match=r"car\.plan is refused: its bytes have the digest .*…, not the .*… written"
    ):
        decode_plan(flipped, "car.plan")


def test_a_newer_plan_is_refused_and_a_newer_writer_is_not() -> None:
    with pytest.raises(StaleArtifact, match="version 9 and needs a reader of version 7; this one reads 1"):
        decode_plan(changed(8, struct.pack("<II", 9, 7)))
    assert decode_plan(changed(8, struct.pack("<II", 9, 1))) == sample_with_cubins(87, 110)


def test_unknown_and_wrong_features_are_refused() -> None:
    with pytest.raises(StaleArtifact, match="features that this version does not know: bits 0x100"):
        decode_plan(changed(16, struct.pack("<Q", 0x10F)))
    with pytest.raises(StaleArtifact, match="not in the one form that its plan has"):
        decode_plan(changed(16, struct.pack("<Q", 0x7)))


@pytest.mark.parametrize("shift", [-256, -1, 1, 256, 2**63])
def test_sections_that_overlap_or_leave_gaps_are_refused(shift: int) -> None:
    entry, start, _ = section(plan_file.STEPS)
    with pytest.raises(StaleArtifact, match="overlaps, repeats or leaves the file"):
        decode_plan(changed(entry + 8, struct.pack("<Q", (start + shift) % 2**64)))


def test_sections_that_leave_the_file_or_are_missing_are_refused() -> None:
    entry, _, _ = section(plan_file.CUBINS)
    with pytest.raises(StaleArtifact, match="overlaps, repeats or leaves the file"):
        decode_plan(changed(entry + 16, struct.pack("<Q", 2**64 - 1)))
    with pytest.raises(StaleArtifact, match=r"lacks the sections \[9\]"):
        decode_plan(changed(section(plan_file.CONSTANTS)[0], struct.pack("<I", 77)))
    with pytest.raises(StaleArtifact, match="has 5 bytes after its last one"):
        decode_plan(stamped(WHOLE + b"extra"))
    with pytest.raises(StaleArtifact, match="table of 65 sections does not fit"):
        decode_plan(changed(40, struct.pack("<I", 65)))


def test_bytes_hidden_between_sections_are_refused() -> None:
    _, start, size = section(plan_file.STEPS)
    assert (start + size) % 256
    with pytest.raises(StaleArtifact, match="overlaps, repeats or leaves the file"):
        decode_plan(changed(start + size, b"x"))


@pytest.mark.parametrize(
    ("kind", "at", "new", "sentence"),
    [
        (plan_file.BUFFERS, 12, struct.pack("<I", 9), "records cannot be read .IndexError"),
        (plan_file.BUFFERS, 16, struct.pack("<Q", 2**63), "has 80 bytes at offset"),
        (plan_file.STEPS, 0, struct.pack("<I", 3), "step of kind 3"),
        (plan_file.STEPS, 40 + 4, struct.pack("<I", 2), "launches kernel 2 of 2"),
        (plan_file.STEPS, 40 + 20, struct.pack("<I", 2**32 - 1), "arguments 0..4294967295 of 13"),
        (plan_file.ARGS, 8, struct.pack("<Q", 80), "points at byte 80 of 'weights'"),
        (plan_file.ARGS, 0, struct.pack("<I", 8), "argument of kind 8"),
        (plan_file.ARGS, 52, struct.pack("<I", 7), "not in the one form"),
        (plan_file.BINDINGS, 20, struct.pack("<I", 6), "fit|one form"),
        (plan_file.STATUS_WORDS, 8, struct.pack("<Q", 4), "4 words at byte 4 of 16"),
        (plan_file.STRINGS, 21, b"\xff", "UnicodeDecodeError|not in the one form"),
        (plan_file.NOTES, 0, b"[", "JSONDecodeError"),
        (plan_file.CUBINS, 16, struct.pack("<Q", 2**64 - 1), "bytes 256..1844674407370955187"),
    ],
)
def test_wrong_records_with_the_right_digest_are_refused(kind: int, at: int, new: bytes, sentence: str) -> None:
    with pytest.raises((StaleArtifact, EngineError), match=sentence):
        decode_plan(changed(section(kind)[1] + at, new))


@settings(max_examples=300)
@given(at=st.integers(0, len(WHOLE) - 1), new=st.binary(min_size=1, max_size=9))
def test_stamped_mutations_are_refused_or_give_a_plan_that_is_written_the_same(at: int, new: bytes) -> None:
    data = changed(min(at, len(WHOLE) - len(new)), new)
    try:
        plan = decode_plan(data)
    except (StaleArtifact, EngineError):
        return
    newer = data[8:16] != WHOLE[8:16]
    assert newer or encode_plan(plan) == data


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(StaleArtifact, match="cannot be read: No such file"):
        read_plan(tmp_path / "none.plan")


def test_too_many_dimensions_are_refused() -> None:
    plan = sample_plan()
    deep = replace(plan.inputs[0], shape=(1, 1, 1, 1, 1, 4, 3))
    with pytest.raises(EngineError, match="'features' has 7 dimensions; a plan file holds 6"):
        encode_plan(replace(plan, inputs=(deep,)))
