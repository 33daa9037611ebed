"""What a run, an ONNX file or a checkpoint holds, as plain data and in the terminal."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dm3d_deploy.artifacts import MANIFEST_NAME, Artifact, Manifest, digest_of_file, read_manifest
from dm3d_deploy.config import VOXELNEXT, CenterHeadConfig, DetectorConfig, detector_names, load_config
from dm3d_deploy.errors import CheckpointError, UsageError, require
from dm3d_deploy.measurements import Measurements, read_measurements
from dm3d_deploy.models.naming import classes_per_task, made_of
from dm3d_deploy.stages import STAGE_NAMES, STAGES

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from exporters.graph_checks import SparsityVerdict

TORCH_ENDINGS = (".pth", ".pt", ".ckpt")
RECIPE_SHOWN = ("model", "checkpoint", "target", "scope", "patterns", "device", "precision", "frames", "seed")
TRANSIENT_KINDS = frozenset(kind for stage in STAGES if stage.transient for kind in stage.writes)
SAFETENSORS_TYPES = {"F16": "float16", "F32": "float32", "F64": "float64"}
NON_FINITE_BFLOAT16 = 0x7F80
NARROW_COLUMN, TEXT_COLUMN = 16, 18
NOTHING = "-"


def describe_path(path: Path) -> dict[str, Any]:
    """Plain data about a run's folder, an .onnx file, a .safetensors file or a torch checkpoint.

    Raises UsageError for anything else, and StaleArtifact, ExportError or CheckpointError for a broken one.
    """
    if path.is_dir():
        return _describe_run(path)
    if not path.is_file():
        raise UsageError(f"there is no file or folder {path}.", fix="check the path")
    if path.name == MANIFEST_NAME:
        return _describe_run(path.parent)
    ending = path.suffix.lower()
    if ending == ".onnx":
        return _describe_onnx(path)
    if ending == ".safetensors":
        return _describe_tensors(path, _safetensors(path))
    if ending in TORCH_ENDINGS:
        return _describe_tensors(path, _torch_tensors(path))
    raise UsageError(
        f"{path} is neither a run's folder nor a file that ends in .onnx, .safetensors, {', '.join(TORCH_ENDINGS)}.",
        fix="give one of these",
    )


def _describe_run(root: Path) -> dict[str, Any]:
    manifest, measurements = read_manifest(root), read_measurements(root)
    steps = {step.name: step for step in (*manifest.steps, *measurements.steps)}
    files = [_file_row(root, step.name, file) for step in steps.values() for file in step.outputs]
    order = {name: index for index, name in enumerate(STAGE_NAMES)}
    files.sort(key=lambda row: (order.get(row["stage"], len(order)), row["file"]))
    recipe = {name: manifest.recipe.get(name) for name in RECIPE_SHOWN}
    return {
        "what": "run",
        "path": str(root),
        "weights": "trained, or said to be" if manifest.trained else "UNTRAINED",
        "verification": _verification(root, manifest, files),
        "recipe": recipe,
        "kept": _kept(root, manifest, files),
        "tools": dict(manifest.tools),
        "files_changed_or_missing": sum(row["check"] in ("changed", "missing") for row in files),
        "stages": [_stage_row(name, files, measurements, name in steps) for name in STAGE_NAMES],
        "files": files,
    }


def _verification(root: Path, manifest: Manifest, files: Iterable[Mapping[str, Any]]) -> str:
    """Of the deployed graphs against the detector, in words."""
    from dm3d_deploy.detect import refuted_outputs

    if any(row["stage"] == "verify" and row["check"] in ("changed", "missing") for row in files):
        return "unknown: its files changed"
    refuted = refuted_outputs(root, manifest)
    if refuted is None:
        return "not run"
    return f"NOT PASSED: {', '.join(refuted)}" if refuted else "passed"


def _file_row(root: Path, stage: str, file: Artifact) -> dict[str, Any]:
    path = root / file.path
    if path.is_file():
        check = "ok" if path.stat().st_size == file.bytes and digest_of_file(path) == file.digest else "changed"
    else:
        check = "removed after use" if file.kind in TRANSIENT_KINDS else "missing"
    return {"stage": stage, "file": file.path, "bytes": file.bytes, "sha256": file.digest, "check": check}


def _stage_row(name: str, files: Iterable[Mapping[str, Any]], times: Measurements, done: bool) -> dict[str, Any]:
    own = [row for row in files if row["stage"] == name]
    return {
        "stage": name,
        "state": "done" if done else "not done",
        "files": len(own),
        "bytes": sum(row["bytes"] for row in own),
        "seconds": times.seconds.get(name),
    }


def _kept(root: Path, manifest: Manifest, files: Iterable[Mapping[str, Any]]) -> dict[str, float | str] | None:
    """Shares of the dense MACs, from masks.json and the allocation; None before there are masks."""
    whole = {row["file"] for row in files if row["check"] == "ok"}
    found = {a.kind: a for step in manifest.steps for a in step.outputs if a.path in whole}
    if "masks_info" not in found or "allocation" not in found:
        return None
    rows = json.loads((root / found["masks_info"].path).read_text(encoding="utf-8"))
    allocation = json.loads((root / found["allocation"].path).read_text(encoding="utf-8"))
    dense = sum(row["dense_macs"] for row in rows)
    return {
        "of scope": allocation["share"],
        "of model": sum(row["kept_macs"] for row in rows) / dense,
        "executed of model": sum(row["executed_macs"] for row in rows) / dense,
    }


def _describe_onnx(path: Path) -> dict[str, Any]:
    from exporters.graph_checks import sparsity_of
    from exporters.graph_files import safe_load

    model = safe_load(path)
    body = Counter(_called(node) for function in model.functions for node in function.node)
    verdicts = sparsity_of(model)
    return {
        "what": "ONNX file",
        "path": str(path),
        "bytes": path.stat().st_size,
        "sha256": digest_of_file(path),
        "producer": " ".join(filter(None, [model.producer_name, model.producer_version])) or None,
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "nodes": dict(Counter(_called(node) for node in model.graph.node).most_common()),
        "nodes_in_function_bodies": dict(body.most_common()),
        "metadata": {entry.key: entry.value for entry in model.metadata_props},
        "two_four_convolutions": f"{sum(v.legal for v in verdicts)} of {len(verdicts)}" if verdicts else None,
        "inputs": [_tensor_row(value) for value in model.graph.input],
        "outputs": [_tensor_row(value) for value in model.graph.output],
        "convolutions": [
            {
                "weight": v.weight,
                "shape": "x".join(map(str, v.shape)),
                "type": v.precision,
                "zeros": round(v.zeros, 4),
                "2:4": _two_four(v),
                "reason": v.reason.split(", first:")[0],
            }
            for v in verdicts
        ],
    }


def _two_four(verdict: SparsityVerdict) -> str:
    steps = (("gain expected", verdict.expected_gain), ("eligible", verdict.eligible), ("legal", verdict.legal))
    return next((word for word, reached in steps if reached), "no")


def _called(node: Any) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else str(node.op_type)


def _tensor_row(value: Any) -> dict[str, Any]:
    from onnx import TensorProto

    tensor = value.type.tensor_type
    sizes = [str(dim.dim_value or dim.dim_param or "?") for dim in tensor.shape.dim]
    known = TensorProto.DataType.items()
    kind = next((name.lower() for name, number in known if number == tensor.elem_type), "unknown")
    return {"name": value.name, "type": kind, "shape": "x".join(sizes) or "scalar"}


def _describe_tensors(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    shapes = {row["name"]: row["shape"] for row in rows}
    unchecked = [row["name"] for row in rows if row["non_finite"] is None]
    return {
        "what": "checkpoint",
        "path": str(path),
        "bytes": path.stat().st_size,
        "sha256": digest_of_file(path),
        "looks_like": _guess(shapes),
        "tensors_total": len(rows),
        "numbers_total": sum(row["numbers"] for row in rows),
        "non_finite_total": sum(row["non_finite"] or 0 for row in rows),
        "types_not_checked_for_non_finite": len(unchecked) or None,
        "tensors": [{**row, "shape": "x".join(map(str, row["shape"])) or "scalar"} for row in rows],
    }


def _safetensors(path: Path) -> list[dict[str, Any]]:
    import numpy as np
    from safetensors import SafetensorError, deserialize

    try:
        found = deserialize(path.read_bytes())
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file: {error}.", fix="download or copy it again"
        ) from None
    rows = []
    for name, tensor in sorted(found):
        bad: int | None = None
        if tensor["dtype"] in SAFETENSORS_TYPES:
            bad = _non_finite(np.frombuffer(tensor["data"], dtype=SAFETENSORS_TYPES[tensor["dtype"]]))
        elif tensor["dtype"] == "BF16":
            bits = np.frombuffer(tensor["data"], dtype="<u2")
            bad = int(np.count_nonzero((bits & NON_FINITE_BFLOAT16) == NON_FINITE_BFLOAT16))
        elif tensor["dtype"][:1] in "IUB":
            bad = 0
        rows.append(_weights_row(name, tensor["dtype"].lower(), tuple(tensor["shape"]), bad))
    return rows


def _non_finite(values: np.ndarray) -> int:
    import numpy as np

    return int(np.count_nonzero(~np.isfinite(values)))


def _torch_tensors(path: Path) -> list[dict[str, Any]]:
    torch = require("torch", extra="compile")
    from dm3d_deploy.models.checkpoints import read_tensors

    return [
        _weights_row(
            name, str(t.dtype).removeprefix("torch."), tuple(t.shape), int(torch.count_nonzero(~torch.isfinite(t)))
        )
        for name, t in sorted(read_tensors(path).items())
    ]


def _weights_row(name: str, kind: str, shape: tuple[int, ...], non_finite: int | None) -> dict[str, Any]:
    return {"name": name, "type": kind, "shape": shape, "numbers": math.prod(shape), "non_finite": non_finite}


def _guess(shapes: Mapping[str, Sequence[int]]) -> str:
    """The known model whose classes per task and widths these names and shapes have; names alone prove nothing."""
    tasks = classes_per_task(shapes)
    anchors = next(iter(shapes.get("dense_head.conv_cls.weight", ())), 0)
    if not tasks and not anchors:
        parts = sorted({name.split(".")[0] for name in shapes})
        return f"no model known here (parts: {', '.join(parts[:5])})"
    fits = [name for name in detector_names() if _looks_like(load_config(name), shapes, tasks, anchors)]
    if fits:
        return f"{' or '.join(fits)}, by its classes per task and its width (not loaded)"
    return f"{made_of(shapes)}; of no configuration known here"


def _looks_like(
    config: DetectorConfig, shapes: Mapping[str, Sequence[int]], tasks: Sequence[int], anchors: int
) -> bool:
    """Whether head, width and kind of the part before the bird's-eye view are those of a configuration."""
    if isinstance(config.head, CenterHeadConfig):
        same_head = [len(task) for task in config.head.classes_by_task] == tasks
    else:
        same_head = config.head.per_cell * len(config.class_names) == anchors
    second = next((part for part in ("pfe.", "roi_head.") if any(name.startswith(part) for name in shapes)), "")
    if second != ("" if config.second_stage is None else "pfe." if config.second_stage.keypoints else "roi_head."):
        return False
    if config.backbone_3d is None:
        return same_head and any(name.startswith("vfe.") for name in shapes)
    width = max(shapes.get("backbone_3d.conv_out.0.weight", (0,)), default=0)
    residual = "backbone_3d.conv1.0.conv1.weight" in shapes
    merges = any(name.startswith("backbone_3d.conv6.") for name in shapes)
    plain = config.backbone_3d.name == "VoxelBackBone8x"
    same_kind = residual != plain and merges == (config.backbone_3d.name == VOXELNEXT)
    return same_head and same_kind and width == max(config.backbone_3d.channels[-2:])


def print_description(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what `describe_path` found: its plain values in lines, its lists as tables."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console if console is not None else Console()
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    lists = {key: value for key, value in found.items() if isinstance(value, list)}
    for key, value in found.items():
        if key not in lists and value not in (None, {}):
            facts.add_row(key.replace("_", " "), escape(_words(value)))
    console.print(facts)
    for key, rows in lists.items():
        if rows:
            print_rows(key, [{k: v for k, v in row.items() if k != "sha256"} for row in rows], console)


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return NOTHING if value is None else str(value)


def print_rows(title: str, rows: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Print rows of equal keys as a table, or as a block of lines each where the terminal is too narrow for columns."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console if console is not None else Console()
    console.print(f"\n[bold]{escape(title)}[/] [dim]({len(rows)})[/]", highlight=False)
    cells = [{key: _words(value) for key, value in row.items()} for row in rows]
    columns = [key for key in (rows[0] if rows else {}) if any(row[key] not in (None, "") for row in rows)]
    widths = {key: max(len(key), *(len(row[key]) for row in cells)) for key in columns}
    least = sum(min(width, NARROW_COLUMN if width <= NARROW_COLUMN else TEXT_COLUMN) + 2 for width in widths.values())
    if least > console.width:
        _print_blocks(cells, columns, console)
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for key in columns:
        number = all(row[key] is None or isinstance(row[key], int | float) for row in rows)
        narrow = widths[key] <= NARROW_COLUMN
        table.add_column(key, justify="right" if number else "left", no_wrap=narrow, overflow="fold")
    for row in cells:
        table.add_row(*(escape(row[key]) for key in columns))
    console.print(table)


def _print_blocks(cells: Sequence[Mapping[str, str]], columns: Sequence[str], console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    for row in cells:
        console.print(f"[bold]{escape(row[columns[0]])}[/]", highlight=False)
        block = Table(box=None, show_header=False, pad_edge=False)
        block.add_column(style="dim", no_wrap=True)
        block.add_column(overflow="fold")
        for key in columns[1:]:
            if row[key] not in ("", NOTHING):
                block.add_row(f"  {key}", escape(row[key]))
        console.print(block)
