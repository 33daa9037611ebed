"""Child process of aot.py: the kernels of a plan for one architecture. A target that Triton mishandles aborts it alone.

It reads a request as JSON on standard input: package (of the kernels), sm, ptx_version, assembler, kernels, folder. It
leaves `<index>.cubin` of each kernel in the folder, and a line of JSON in `answer.jsonl`: a death tells which it was.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dm3d_deploy.errors import require

ADDR_NO_RANDOMIZE = 0x0040000  # <sys/personality.h>
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_ENTRY = re.compile(r"\.visible \.entry \w+\((.*?)\)", re.DOTALL)


def main() -> None:
    """Serve one request."""
    request = json.load(sys.stdin)
    folder = Path(request["folder"])
    tools = _tools()
    # Triton would choose by architecture, and take one of CUDA 13 for platforms of CUDA 12.
    os.environ["TRITON_PTXAS_PATH"] = os.environ["TRITON_PTXAS_BLACKWELL_PATH"] = str(tools / request["assembler"])
    # ptxas of CUDA 13.1 orders symbols of sm_100 and sm_110 by their addresses; a sandbox may forbid to fix these.
    fixed = ctypes.CDLL(None).personality(ADDR_NO_RANDOMIZE) != -1
    with (folder / "answer.jsonl").open("w", encoding="utf-8", buffering=1) as answer:
        for index, kernel in enumerate(request["kernels"]):
            cubin = folder / f"{index}.cubin"
            answer.write(json.dumps({**_compile(request, kernel, cubin), "fixed_addresses": fixed}) + "\n")


def _compile(request: Mapping[str, Any], kernel: Mapping[str, Any], cubin: Path) -> dict[str, Any]:
    """One kernel: its image on disk, and what it takes of a multiprocessor."""
    triton = require("triton", extra="sparse3d")
    compiler = require("triton.compiler", extra="sparse3d")
    backends = require("triton.backends.compiler", extra="sparse3d")
    module, name = kernel["function"].split(".")
    function = getattr(importlib.import_module(f"{request['package']}.{module}"), name)
    constexprs = kernel["constexprs"]
    parameters = [name for name in function.arg_names if name not in constexprs]
    types = dict(zip(parameters, kernel["signature"], strict=True))
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(signature) if signature[name].startswith("*")
    }
    source = compiler.ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=aligned)
    options = {name: kernel[name] for name in ("num_warps", "num_stages")}
    done = triton.compile(
        source,
        target=backends.GPUTarget("cuda", request["sm"], 32),
        options={**options, "ptx_version": request["ptx_version"], "enable_fp_fusion": True},
    )
    cubin.write_bytes(done.asm["cubin"])
    metadata = done.metadata
    return {
        "symbol": metadata.name,
        "threads": metadata.num_warps * 32,
        "shared_bytes": metadata.shared,
        "global_scratch_bytes": metadata.global_scratch_size,
        "profile_scratch_bytes": getattr(metadata, "profile_scratch_size", 0),
        "hidden_params": _parameters(done.asm["ptx"]) - len(parameters),
        "assembler": triton.knobs.nvidia.ptxas.version,
        "async_copies": len(re.findall(r"cp\.async\.c[ag]|cp\.async\.bulk\.tensor", done.asm["ptx"])),
        "matrix_products": len(re.findall(r"\bmma\.sync|wgmma\.mma_async|tcgen05\.mma", done.asm["ptx"])),
        **_resources(_tools() / "cuobjdump", cubin),
    }


def _tools() -> Path:
    """The folder of NVIDIA's programs in Triton's wheel."""
    return Path(str(require("triton", extra="sparse3d").__file__)).parent / "backends" / "nvidia" / "bin"


def _parameters(ptx: str) -> int:
    """Parameters of the one entry of a PTX text."""
    (entry,) = _ENTRY.findall(ptx)
    return len(re.findall(r"\.param ", entry))


def _resources(cuobjdump: Path, cubin: Path) -> dict[str, int]:
    """Registers per thread, bytes of stack (spills), of reserved shared and of local memory, from the image."""
    command = [str(cuobjdump), "--dump-resource-usage", str(cubin)]
    (numbers,) = _USAGE.findall(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    names = ("registers", "stack_bytes", "reserved_shared_bytes", "local_bytes")
    return dict(zip(names, map(int, numbers), strict=True))


if __name__ == "__main__":
    main()
