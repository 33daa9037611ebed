"""Plan -> machine code for in-vehicle GPUs, on a machine without one: one child process per architecture.

The bytes depend on the plan, the kernels and the compiler alone: no line information, no cache, PTX versions pinned, no
environment variable of the compiler reaches a child, and addresses are fixed where the system allows it ("reproducible"
in the resource table), as the assembler for sm_100 and sm_110 orders symbols by them. A kernel that spills, wants
scratch memory, or wants more shared memory than the architecture has is refused. What was built here was not run here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dm3d_deploy.device import usable_cores
from dm3d_deploy.errors import EngineError, UsageError, require
from engines.sparse3d.plan import Cubin, Kernel, Plan, add_cubins

PACKAGE = "engines.sparse3d"
TIMEOUT_S = 900.0
SHARED_OF_LARGE_BYTES = 227 * 1024
SHARED_OF_ORIN_BYTES = 163 * 1024
SHARED_OF_SMALL_BYTES = 99 * 1024
_COMPILER_VARIABLES = ("TRITON_", "PTXAS_", "DISABLE_PTXAS", "LLVM_", "MLIR_", "NVPTX_", "PYTHONSAFEPATH")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The CUDA release and PTX version of the oldest platform of an architecture, and its shared memory per block.

    Images come from an assembler of that major release: a driver loads those of its own and of older major releases,
    and of a newer minor release (NVIDIA's minor version compatibility). Sources: CUDA Compatibility, section 2; the PTX
    ISA manual's release notes (first version of each target); the CUDA programming guide's table of compute
    capabilities (maximum shared memory per thread block).
    """

    ptx_version: int
    shared_limit_bytes: int
    cuda: str

    @property
    def assembler(self) -> str:
        """The program in Triton's wheel: ptxas is of CUDA 12 (12.8 in Triton 3.7.1), ptxas-blackwell of 13 (13.1)."""
        return "ptxas" if _major(self.cuda) == "12" else "ptxas-blackwell"


TARGETS: Mapping[int, Target] = {
    80: Target(ptx_version=85, shared_limit_bytes=SHARED_OF_ORIN_BYTES, cuda="12.6"),
    86: Target(ptx_version=85, shared_limit_bytes=SHARED_OF_SMALL_BYTES, cuda="12.6"),
    87: Target(ptx_version=85, shared_limit_bytes=SHARED_OF_ORIN_BYTES, cuda="12.6"),
    89: Target(ptx_version=85, shared_limit_bytes=SHARED_OF_SMALL_BYTES, cuda="12.6"),
    90: Target(ptx_version=85, shared_limit_bytes=SHARED_OF_LARGE_BYTES, cuda="12.6"),
    100: Target(ptx_version=86, shared_limit_bytes=SHARED_OF_LARGE_BYTES, cuda="12.8"),
    101: Target(ptx_version=86, shared_limit_bytes=SHARED_OF_LARGE_BYTES, cuda="12.8"),
    110: Target(ptx_version=90, shared_limit_bytes=SHARED_OF_LARGE_BYTES, cuda="13.0"),
    120: Target(ptx_version=87, shared_limit_bytes=SHARED_OF_SMALL_BYTES, cuda="12.8"),
    121: Target(ptx_version=90, shared_limit_bytes=SHARED_OF_SMALL_BYTES, cuda="13.0"),
}


def _major(release: str) -> str:
    return release.partition(".")[0]


def sms_of(names: Sequence[str]) -> tuple[int, ...]:
    """The numbers of architectures named "sm_87"; UsageError for one that is not compiled for."""
    numbers = {f"sm_{sm}": sm for sm in TARGETS}
    for name in names:
        if name not in numbers:
            raise UsageError(f"kernels are not compiled for {name}.", fix=f"choose of {', '.join(numbers)}")
    return tuple(dict.fromkeys(numbers[name] for name in names))


def compile_plan(
    plan: Plan, sms: Sequence[int], *, package: str = PACKAGE, timeout_s: float = TIMEOUT_S
) -> tuple[Plan, dict[str, Any]]:
    """The plan with cubins for each SM, and the resource table (plain data, one row per kernel and SM).

    MissingDependency without Triton, UsageError for an unknown SM, EngineError for a kernel that does not compile or
    breaks a limit. As many children work at once as this process has cores.
    """
    sms_of([f"sm_{sm}" for sm in sms])
    triton = require("triton", extra="sparse3d")
    with ThreadPoolExecutor(max_workers=usable_cores()) as pool:
        built = list(pool.map(lambda sm: _compiled(plan, sm, package, timeout_s), sms))
    rows = []
    for sm, (cubins, resources) in zip(sms, built, strict=True):
        plan = add_cubins(plan, sm, cubins)
        rows += resources
    assemblers = {row["sm"]: row["assembler"] for row in rows}
    targets = {
        name: {"ptx_version": TARGETS[sm].ptx_version, "platform_cuda": TARGETS[sm].cuda, "assembler": assemblers[name]}
        for sm, name in ((sm, f"sm_{sm}") for sm in sms)
    }
    known = {**plan.meta.get("assemblers", {}), **assemblers}
    return replace(plan, meta={**plan.meta, "assemblers": known}), {
        "triton": triton.__version__,
        "standing": "built, not run here",
        "reproducible": all(row["fixed_addresses"] for row in rows),
        "targets": targets,
        "kernels": rows,
    }


def compile_plans(plans: Sequence[Plan], sms: Sequence[int]) -> tuple[list[Plan], dict[str, Any]]:
    """What `compile_plan` does, for several plans: a kernel that they share is compiled once and has one row."""
    known: dict[str, Kernel] = {}
    for plan in plans:
        for kernel in plan.kernels:
            known.setdefault(_identity(kernel), kernel)
    # the first plan's kernels come first, so its launches still name theirs
    whole, table = compile_plan(replace(plans[0], kernels=tuple(known.values())), sms)
    place = {name: number for number, name in enumerate(known)}
    built = [
        replace(
            plan,
            cubins={
                sm: tuple(cubins[place[_identity(kernel)]] for kernel in plan.kernels)
                for sm, cubins in whole.cubins.items()
            },
            meta={**plan.meta, "assemblers": whole.meta["assemblers"]},
        )
        for plan in plans
    ]
    return built, table


def _identity(kernel: Kernel) -> str:
    """What its image depends on; the name does not count."""
    return repr(replace(kernel, name="", constexprs=dict(sorted(kernel.constexprs.items()))))


def _compiled(plan: Plan, sm: int, package: str, timeout_s: float) -> tuple[list[Cubin], list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        answers = _answers_of_child(plan, sm, package, Path(folder), timeout_s)
        images = [(Path(folder) / f"{index}.cubin").read_bytes() for index in range(len(answers))]
    check_assemblers({answer["assembler"] for answer in answers}, sm)
    rows = []
    cubins = []
    for kernel, answer, image in zip(plan.kernels, answers, images, strict=True):
        row = {
            "sm": f"sm_{sm}",
            "kernel": kernel.name,
            "function": kernel.function,
            "cubin_bytes": len(image),
            "spilled_bytes": answer["stack_bytes"] + answer["local_bytes"],
            **answer,
        }
        refusal = over_limit(row, sm)
        if refusal:
            raise EngineError(f"{kernel.name} cannot be used on sm_{sm}: {refusal}.", fix="choose smaller tiles")
        rows.append(row)
        cubins.append(
            Cubin(
                image=image, **{name: answer[name] for name in ("symbol", "shared_bytes", "threads", "hidden_params")}
            )
        )
    return cubins, rows


def check_assemblers(releases: Iterable[str], sm: int) -> None:
    """EngineError where another major release of CUDA than the platform's made the images."""
    cuda = TARGETS[sm].cuda
    other = [release for release in releases if _major(release) != _major(cuda)]
    if other:
        raise EngineError(
            f"the images for sm_{sm} are of CUDA {other[0]}, and a driver of CUDA {cuda} need not load them.",
            fix="install a Triton that brings both assemblers, as 3.7.1 does",
        )


def over_limit(row: Mapping[str, Any], sm: int) -> str:
    """Why a row of the resource table cannot be used on an architecture, or nothing."""
    if row["spilled_bytes"]:
        return f"it spills {row['spilled_bytes']} bytes per thread beside {row['registers']} registers"
    scratch = row["global_scratch_bytes"] + row["profile_scratch_bytes"]
    if scratch:
        return f"it wants {scratch} bytes of scratch memory, which nothing provides"
    shared, limit = row["shared_bytes"], TARGETS[sm].shared_limit_bytes
    if shared > limit:
        return f"it wants {shared} bytes of shared memory of {limit}"
    return ""


def _answers_of_child(plan: Plan, sm: int, package: str, folder: Path, timeout_s: float) -> list[dict[str, Any]]:
    fields = ("function", "signature", "constexprs", "num_warps", "num_stages")
    request = {
        "package": package,
        "sm": sm,
        "ptx_version": TARGETS[sm].ptx_version,
        "assembler": TARGETS[sm].assembler,
        "folder": str(folder),
        "kernels": [{name: getattr(kernel, name) for name in fields} for kernel in plan.kernels],
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_COMPILER_VARIABLES)}
    try:
        child = subprocess.run(
            [sys.executable, "-m", "engines.sparse3d.aot_worker"],
            input=json.dumps(request),
            cwd=Path(__file__).resolve().parents[2],  # -m looks there first: another package named engines loses
            env={**kept, "TRITON_DISABLE_LINE_INFO": "1", "TRITON_CACHE_DIR": str(folder / "cache")},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(
            f"{len(plan.kernels)} kernels were not compiled for sm_{sm} within {timeout_s:g} s.", fix="allow more time"
        ) from None
    path = folder / "answer.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if child.returncode or len(lines) != len(plan.kernels):
        raise EngineError(_death(child, plan, sm, len(lines)), fix="compile it alone, or report it with the plan")
    return [dict(json.loads(line)) for line in lines]


def _death(child: subprocess.CompletedProcess[str], plan: Plan, sm: int, done: int) -> str:
    last = (child.stderr.strip().splitlines()[-1:] or ["no message"])[0].rstrip(".")
    name = plan.kernels[done].name if done < len(plan.kernels) else "the plan"
    code = child.returncode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return f"{name} was not compiled for sm_{sm}: the compiler {how} ({last})."
