"""The plan file: a checked, digest-stamped binary form of a Plan that Python and the C++ runtime read alike.

Little endian. A header (magic, version, lowest reader, required features, sizes, SHA-256 of everything else), a table,
then the sections, each at the first multiple of 256 after the one before: nothing overlaps and nothing hides in a gap.
Every plan has exactly one form; any other bytes are refused. Records are of fixed size and are read by dm3d_plan.cpp as
they stand here. The neutral part of a plan depends on the plan alone; one section of cubins follows for each SM. What
only Python needs is one JSON section.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dm3d_deploy.artifacts import canonical_json, write_bytes
from dm3d_deploy.errors import EngineError, StaleArtifact
from engines.sparse3d.plan import (
    BUFFER_KINDS,
    ELEMENT_BYTES,
    F32,
    FEATURES,
    I32,
    I64,
    STATUS_KINDS,
    Arg,
    Binding,
    Buffer,
    Cubin,
    Kernel,
    Launch,
    Memset,
    Plan,
    PlanLayer,
    Pointer,
    Status,
    StatusWord,
    Step,
)

MAKE_ANEW = "restore the file, or build its run again with --from plan"
MAGIC = b"DM3DPLAN"
VERSION = 1
MIN_READER = 1
SECTION_ALIGNMENT_BYTES = 256
MAX_SECTIONS = 64
MAX_RANK = 6
DTYPES = tuple(ELEMENT_BYTES)

HEADER = struct.Struct("<8sIIQQQII32s")  # magic version min_reader features file_bytes workspace sections zero digest
DIGEST_AT = HEADER.size - 32
SECTION = struct.Struct("<IIQQ")  # kind sm offset bytes
KERNEL = struct.Struct("<QQII")  # name_at kinds_at name_bytes kinds_bytes
BUFFER = struct.Struct("<QIIQQ")  # name_at name_bytes kind offset bytes
STEP = struct.Struct("<IIIIIIQQ")  # op index gx gy gz args|word first_arg|offset bytes
ARG = struct.Struct("<IIQ")  # kind buffer value|offset
BINDING = struct.Struct("<QIIIIII6Q")  # name_at name_bytes buffer dtype output rank zero shape
STATUS = struct.Struct("<IIQ")  # buffer words offset
WORD = struct.Struct("<QIIQ")  # name_at name_bytes kind capacity
CUBIN = struct.Struct("<QQQIIII")  # symbol_at image_at image_bytes symbol_bytes shared threads hidden

KERNELS, BUFFERS, STEPS, ARGS, BINDINGS, STATUS_WORDS, STRINGS, NOTES, CONSTANTS, CUBINS = range(1, 11)
NEUTRAL = (KERNELS, BUFFERS, STEPS, ARGS, BINDINGS, STATUS_WORDS, STRINGS, NOTES, CONSTANTS)
LAUNCH_OP, MEMSET_OP = 0, 1
KIND_OF_ARG: Mapping[type, int] = {Pointer: 0, I32: 1, I64: 2, F32: 3}
LETTER_OF_TYPE = {"i32": "i", "i64": "l", "fp32": "f"}  # every pointer is "p"


class _Strings:
    """The string section; equal strings are written once."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.places: dict[bytes, int] = {}

    def add(self, text: str) -> tuple[int, int]:
        raw = text.encode()
        if raw not in self.places:
            self.places[raw] = len(self.data)
            self.data += raw
        return self.places[raw], len(raw)


def encode_plan(plan: Plan) -> bytes:
    """The plan as bytes; they depend on the plan alone."""
    sections = [(kind, 0, data) for kind, data in zip(NEUTRAL, _neutral(plan), strict=True)]
    sections += [(CUBINS, sm, _cubin_section(plan.cubins[sm])) for sm in sorted(plan.cubins)]
    body = bytearray()
    table = bytearray()
    start = HEADER.size + SECTION.size * len(sections)
    for kind, sm, data in sections:
        body += bytes(-(start + len(body)) % SECTION_ALIGNMENT_BYTES)
        table += SECTION.pack(kind, sm, start + len(body), len(data))
        body += data
    fields = (MAGIC, VERSION, MIN_READER, plan.features, start + len(body), plan.workspace_bytes, len(sections), 0)
    whole = bytearray(HEADER.pack(*fields, bytes(32)) + table + body)
    whole[DIGEST_AT : HEADER.size] = hashlib.sha256(whole).digest()
    return bytes(whole)


def _neutral(plan: Plan) -> list[bytes]:
    strings = _Strings()
    kernels = b"".join(_kernel_record(kernel, strings) for kernel in plan.kernels)
    buffers = b"".join(
        BUFFER.pack(*strings.add(b.name), BUFFER_KINDS.index(b.kind), b.offset, b.bytes) for b in plan.buffers
    )
    steps, args = _step_sections(plan.steps)
    bound = [(binding, output) for output, group in enumerate((plan.inputs, plan.outputs)) for binding in group]
    bindings = b"".join(_binding_record(binding, output, strings) for binding, output in bound)
    status = _status_section(plan, strings)
    notes = {
        "kernels": [
            {
                "name": kernel.name,
                "function": kernel.function,
                "signature": list(kernel.signature),
                "constexprs": dict(kernel.constexprs),
                "num_warps": kernel.num_warps,
                "num_stages": kernel.num_stages,
            }
            for kernel in plan.kernels
        ],
        "layers": [{name: getattr(layer, name) for name in PlanLayer.__slots__} for layer in plan.layers],
        "capacities": dict(plan.capacities),
        "meta": dict(plan.meta),
    }
    text = canonical_json(notes).encode()
    return [kernels, buffers, steps, args, bindings, status, bytes(strings.data), text, plan.constants]


def _kernel_record(kernel: Kernel, strings: _Strings) -> bytes:
    letters = "".join("p" if name.startswith("*") else LETTER_OF_TYPE[name] for name in kernel.signature)
    (name_at, name_bytes), (kinds_at, kinds_bytes) = strings.add(kernel.name), strings.add(letters)
    return KERNEL.pack(name_at, kinds_at, name_bytes, kinds_bytes)


def _binding_record(binding: Binding, output: int, strings: _Strings) -> bytes:
    rank = len(binding.shape)
    if rank > MAX_RANK:
        raise EngineError(
            f"'{binding.name}' has {rank} dimensions; a plan file holds {MAX_RANK}.", fix="flatten some of them"
        )
    shape = (*binding.shape, *[0] * (MAX_RANK - rank))
    dtype = DTYPES.index(binding.dtype)
    return BINDING.pack(*strings.add(binding.name), binding.buffer, dtype, output, rank, 0, *shape)


def _step_sections(steps: Sequence[Step]) -> tuple[bytes, bytes]:
    records, args = bytearray(), bytearray()
    for step in steps:
        if isinstance(step, Memset):
            records += STEP.pack(MEMSET_OP, step.buffer, 0, 0, 0, step.value, step.offset, step.bytes)
        else:
            records += STEP.pack(LAUNCH_OP, step.kernel, *step.grid, len(step.args), len(args) // ARG.size, 0)
            args += b"".join(map(_arg_record, step.args))
    return bytes(records), bytes(args)


def _arg_record(arg: Arg) -> bytes:
    kind = KIND_OF_ARG[type(arg)]
    if isinstance(arg, Pointer):
        return ARG.pack(kind, arg.buffer, arg.offset)
    value = struct.unpack("<I", struct.pack("<f", arg.value))[0] if isinstance(arg, F32) else arg.value % 2**64
    return ARG.pack(kind, 0, value)


def _status_section(plan: Plan, strings: _Strings) -> bytes:
    if plan.status is None:
        return b""
    words = plan.status.words
    data = STATUS.pack(plan.status.buffer, len(words), plan.status.offset)
    for word in words:
        capacity = plan.capacities[word.name] if word.kind == "count" else 0
        data += WORD.pack(*strings.add(word.name), STATUS_KINDS.index(word.kind), capacity)
    return data


def _cubin_section(cubins: Sequence[Cubin]) -> bytes:
    records, symbols, images = bytearray(), bytearray(), bytearray()
    symbols_at = CUBIN.size * len(cubins)
    names = b"".join(cubin.symbol.encode() for cubin in cubins)
    images_at = symbols_at + len(names) + -(symbols_at + len(names)) % SECTION_ALIGNMENT_BYTES
    for cubin in cubins:
        symbol = cubin.symbol.encode()
        images += bytes(-len(images) % SECTION_ALIGNMENT_BYTES)
        place = (symbols_at + len(symbols), images_at + len(images), len(cubin.image), len(symbol))
        records += CUBIN.pack(*place, cubin.shared_bytes, cubin.threads, cubin.hidden_params)
        symbols += symbol
        images += cubin.image
    return bytes(records + symbols + bytes(images_at - symbols_at - len(names)) + images)


def decode_plan(data: bytes, origin: str = "the plan") -> Plan:
    """The plan that the bytes hold; StaleArtifact or EngineError in one sentence for anything else."""
    sections, version, workspace_bytes = _checked_sections(data, origin)
    try:
        plan = _plan_of(sections, workspace_bytes)
        same = version > VERSION or encode_plan(plan) == data
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        _stale(origin, f"its records cannot be read ({type(error).__name__}: {error})")
    except struct.error as error:
        _stale(origin, f"its records cannot be read ({error})")
    if not same:
        _stale(origin, "it is not in the one form that its plan has")
    return plan


def _checked_sections(data: bytes, origin: str) -> tuple[dict[tuple[int, int], bytes], int, int]:
    if len(data) < HEADER.size or data[: len(MAGIC)] != MAGIC:
        _stale(origin, f"its {len(data)} bytes do not begin like a launch plan")
    _, version, reader, features, size, workspace_bytes, count, zero, digest = HEADER.unpack_from(data)
    if reader > VERSION:
        _stale(origin, f"it is of version {version} and needs a reader of version {reader}; this one reads {VERSION}")
    if size != len(data):
        _stale(origin, f"it should have {size} bytes and has {len(data)}")
    found = hashlib.sha256(data[:DIGEST_AT] + bytes(32))
    found.update(memoryview(data)[HEADER.size :])
    if found.digest() != digest:
        _stale(
            origin, f"its bytes have the digest {found.hexdigest()[:12]}…, not the {digest.hex()[:12]}… written in it"
        )
    unknown = features & ~sum(FEATURES.values())
    if unknown:
        _stale(origin, f"it needs features that this version does not know: bits {unknown:#x}")
    end = HEADER.size + SECTION.size * count
    if zero or count > MAX_SECTIONS or end > len(data):
        _stale(origin, f"its table of {count} sections does not fit")
    sections: dict[tuple[int, int], bytes] = {}
    for kind, sm, offset, length in SECTION.iter_unpack(data[HEADER.size : end]):
        padding = -end % SECTION_ALIGNMENT_BYTES
        if offset != end + padding or length > size - offset or any(data[end:offset]) or (kind, sm) in sections:
            _stale(origin, f"its section {kind} at {offset} of {length} bytes overlaps, repeats or leaves the file")
        sections[kind, sm] = data[offset : offset + length]
        end = offset + length
    missing = [kind for kind in NEUTRAL if (kind, 0) not in sections]
    if missing or end != size:
        _stale(origin, f"it lacks the sections {missing} or has {size - end} bytes after its last one")
    return sections, version, workspace_bytes


def _plan_of(sections: Mapping[tuple[int, int], bytes], workspace_bytes: int) -> Plan:
    strings = sections[STRINGS, 0]
    notes = json.loads(sections[NOTES, 0])
    bindings = [_binding_of(row, strings) for row in BINDING.iter_unpack(sections[BINDINGS, 0])]
    args = [_arg_of(*row) for row in ARG.iter_unpack(sections[ARGS, 0])]
    return Plan(
        kernels=tuple(_kernel_of(entry) for entry in notes["kernels"]),
        buffers=tuple(
            Buffer(name=_text(strings, at, size), kind=BUFFER_KINDS[kind], offset=offset, bytes=length)
            for at, size, kind, offset, length in BUFFER.iter_unpack(sections[BUFFERS, 0])
        ),
        constants=sections[CONSTANTS, 0],
        steps=tuple(_step_of(row, args) for row in STEP.iter_unpack(sections[STEPS, 0])),
        capacities={str(name): int(rows) for name, rows in notes["capacities"].items()},
        workspace_bytes=workspace_bytes,
        inputs=tuple(binding for binding, output in bindings if not output),
        outputs=tuple(binding for binding, output in bindings if output),
        layers=tuple(PlanLayer(**layer) for layer in notes["layers"]),
        status=_status_of(sections[STATUS_WORDS, 0], strings),
        meta=dict(notes["meta"]),
        cubins={sm: _cubins_of(data, len(notes["kernels"])) for (kind, sm), data in sections.items() if kind == CUBINS},
    )


def _kernel_of(entry: Mapping[str, Any]) -> Kernel:
    return Kernel(**{**entry, "signature": tuple(entry["signature"])})


def _step_of(row: tuple[int, ...], args: Sequence[Arg]) -> Step:
    op, index, x, y, z, count, first, length = row
    if op == MEMSET_OP:
        return Memset(buffer=index, offset=first, bytes=length, value=count)
    if op != LAUNCH_OP or first + count > len(args):
        raise ValueError(f"step of kind {op} with arguments {first}..{first + count} of {len(args)}")
    return Launch(kernel=index, grid=(x, y, z), args=tuple(args[first : first + count]))


def _arg_of(kind: int, buffer: int, value: int) -> Arg:
    if kind == KIND_OF_ARG[Pointer]:
        return Pointer(buffer, value)
    if kind == KIND_OF_ARG[F32]:
        return F32(struct.unpack("<f", struct.pack("<I", value))[0])
    signed = value - 2**64 if value >= 2**63 else value
    if kind == KIND_OF_ARG[I32]:
        return I32(signed)
    if kind != KIND_OF_ARG[I64]:
        raise ValueError(f"argument of kind {kind}")
    return I64(signed)


def _binding_of(row: tuple[int, ...], strings: bytes) -> tuple[Binding, int]:
    at, size, buffer, dtype, output, rank, _, *shape = row
    shaped = tuple(shape[:rank])
    return Binding(name=_text(strings, at, size), dtype=DTYPES[dtype], shape=shaped, buffer=buffer), output


def _status_of(data: bytes, strings: bytes) -> Status | None:
    if not data:
        return None
    buffer, _, offset = STATUS.unpack_from(data)
    words = tuple(
        StatusWord(name=_text(strings, at, size), kind=STATUS_KINDS[kind])
        for at, size, kind, _ in WORD.iter_unpack(data[STATUS.size :])
    )
    return Status(buffer=buffer, offset=offset, words=words)


def _cubins_of(data: bytes, kernels: int) -> tuple[Cubin, ...]:
    cubins = []
    for row in CUBIN.iter_unpack(data[: CUBIN.size * kernels]):
        symbol_at, image_at, image_bytes, symbol_bytes, shared, threads, hidden = row
        cubins.append(
            Cubin(
                symbol=_text(data, symbol_at, symbol_bytes),
                image=_slice(data, image_at, image_bytes),
                shared_bytes=shared,
                threads=threads,
                hidden_params=hidden,
            )
        )
    return tuple(cubins)


def _slice(data: bytes, at: int, size: int) -> bytes:
    if at > len(data) or size > len(data) - at:
        raise ValueError(f"bytes {at}..{at + size} of {len(data)}")
    return data[at : at + size]


def _text(data: bytes, at: int, size: int) -> str:
    return _slice(data, at, size).decode()


def write_plan(path: Path, plan: Plan) -> None:
    """Write the plan file whole."""
    write_bytes(path, encode_plan(plan))


def read_plan(path: Path) -> Plan:
    """Read a plan file; StaleArtifact where it is missing, damaged or newer, EngineError where its plan is wrong."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StaleArtifact(f"{path} cannot be read: {error.strerror}.", fix=MAKE_ANEW) from None
    return decode_plan(data, str(path))


def _stale(origin: str, what: str) -> NoReturn:
    raise StaleArtifact(f"{origin} is refused: {what}.", fix=MAKE_ANEW) from None
