"""Every launch of a plan against plain numpy and torch: from the arrays that a kernel was given, what it must leave.

The plan keeps all of its arrays, so one run has the inputs and outputs of every kernel. Any executor can have run it.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import engines
from benchmarks.sparse3d_gpu.cases import TOLERANCE, Feed, Precision
from benchmarks.sparse3d_gpu.findings import Finding, judged
from dm3d_deploy.errors import InternalError
from dm3d_deploy.models.sparse import KernelMap, cell_keys, cells_of, strided_map, submanifold_map
from engines.sparse3d.entry import Frame
from engines.sparse3d.interpreter import NUMPY_OF, PlanRun
from engines.sparse3d.onnx_reader import MERGED, Backbone, Convolution
from engines.sparse3d.plan import Launch, Plan, Pointer

SOURCES = Path(str(engines.__file__)).parent / "sparse3d"
FIXED_POINT = 2.0**24
GARBAGE = (InternalError, IndexError, ValueError, RuntimeError)  # what wrong arrays make numpy, torch and ours say
Comparison = tuple[str, np.ndarray, np.ndarray]


def every_array(backbone: Backbone, frame: Frame, capacity: int) -> list[str]:
    """The names of all arrays of a plan's workspace."""
    names = [
        f"{stage.name}.{part}" for stage in backbone.stages for part in ("bits", "prefix", "sums", "count", "sites")
    ]
    books = dict.fromkeys(layer.book for layer in backbone.layers)
    names += [f"{book}.{part}" for book in books for part in ("pairs", "taps", "list", "length")]
    names += ["report", "entry.keys", "entry.features", *(layer.name for layer in backbone.layers)]
    names += [f"{MERGED}.features"] if backbone.merged else []
    names += ["entry.rings", "entry.limit"] if frame.rings(capacity) else []
    return names + (["entry.sums", "entry.members"] if frame.points else [])


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A plan that kept every array, and what one run of it left."""

    backbone: Backbone
    plan: Plan
    feed: Feed
    run: PlanRun

    def arguments(self, launch: Launch) -> tuple[dict[str, Any], dict[str, str]]:
        """Values by parameter (arrays as they were left), and the names of the arrays."""
        kernel = self.plan.kernels[launch.kernel]
        parameters = [name for name in parameters_of(kernel.function) if name not in kernel.constexprs]
        values: dict[str, Any] = dict(kernel.constexprs)
        names: dict[str, str] = {}
        for parameter, arg, kind in zip(parameters, launch.args, kernel.signature, strict=True):
            short = parameter.removesuffix("_ptr")
            if isinstance(arg, Pointer):
                names[short], values[short] = self._array(arg, NUMPY_OF[kind[1:]])
            else:
                values[short] = arg.value
        return values, names

    def _array(self, pointer: Pointer, dtype: str) -> tuple[str, np.ndarray]:
        buffer = self.plan.buffers[pointer.buffer]
        if buffer.kind == "constant":
            data = self.plan.constants[buffer.offset : buffer.offset + buffer.bytes]
            return buffer.name, np.frombuffer(data, dtype)
        if buffer.kind == "input":
            return buffer.name, self.feed[buffer.name]
        if buffer.kind == "output":
            return buffer.name, self.run.outputs[buffer.name]
        kept = self.plan.meta["kept"]
        (name,) = [
            name for name, told in kept.items() if (told["buffer"], told["offset"]) == (pointer.buffer, pointer.offset)
        ]
        return name, self.run.kept[name]


def parameters_of(function: str) -> list[str]:
    """The parameters of a kernel, read off its source: its module is for children alone to import."""
    module, name = function.split(".")
    for node in ast.parse((SOURCES / f"{module}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return [argument.arg for argument in node.args.args]
    raise LookupError(f"{function} is no kernel of ours")


def check_kernels(evidence: Evidence, *, part: str, precision: Precision) -> list[Finding]:
    """One finding for each kernel of the plan; one of which nothing but zeros was expected has failed."""
    kernels = evidence.plan.kernels
    errors: list[list[Error]] = [[] for _ in kernels]
    for step in evidence.plan.steps:
        if isinstance(step, Launch):
            try:
                errors[step.kernel] += _errors(evidence, step)
            except GARBAGE as error:
                words = f"what it was given or left cannot be read: {error}"
                errors[step.kernel].append(Error(size=math.inf, substance=0, words=words))
    findings = []
    for kernel, own in zip(kernels, errors, strict=True):
        wrong = [error.words for error in own if not error.size <= TOLERANCE[precision]]
        substance = sum(error.substance for error in own)
        worst = max((error.size for error in own), default=0.0)
        right = f"{len(own)} arrays, {substance} values that are not zero, worst relative error {worst:.1e}"
        findings.append(judged(part, kernel.name, substance > 0 and not wrong, "; ".join(wrong[:3]) or right))
    return findings


@dataclass(frozen=True, kw_only=True)
class Error:
    """The worst error of one array, relative to its largest value, and how many values should not be zero."""

    size: float
    substance: int
    words: str


def _errors(evidence: Evidence, step: Launch) -> list[Error]:
    """Of each array that a launch left."""
    check = CHECKS[evidence.plan.kernels[step.kernel].function.partition(".")[2]]
    errors = []
    with np.errstate(all="ignore"):
        for what, found, expected in check(evidence, *evidence.arguments(step)):
            size, words = compared(found, expected)
            errors.append(Error(size=size, substance=int(np.count_nonzero(expected)), words=f"{what}: {words}"))
    return errors


def compared(found: np.ndarray, expected: np.ndarray) -> tuple[float, str]:
    """The worst difference over the largest value, in fact and in words; infinite where integers are not equal."""
    if found.shape != expected.shape:
        return math.inf, f"{found.shape} where {expected.shape} was expected"
    if expected.dtype.kind != "f":
        other = np.flatnonzero(found.ravel() != expected.ravel())
        if not len(other):
            return 0.0, "equal"
        pair = f"{found.ravel()[other[0]]} where {expected.ravel()[other[0]]} was expected"
        return math.inf, f"{len(other)} of {found.size} differ, first at {other[0]}: {pair}"
    if not expected.size:
        return 0.0, "equal"
    error = float(np.abs(found.astype(np.float64) - expected).max() / max(np.abs(expected).max(), 1e-30))
    return error, f"relative error {error:.1e}"


def exactly(array: np.ndarray) -> np.ndarray:
    """Floats as the integers of their bits: equal means every bit."""
    return np.ascontiguousarray(array).view(f"i{array.dtype.itemsize}")


def words_of(keys: np.ndarray, words: int) -> np.ndarray:
    """A bitmap i32[words] with the bits of these cells."""
    bits = np.zeros(words, np.uint32)
    np.bitwise_or.at(bits, keys >> 5, np.uint32(1) << (keys & 31).astype(np.uint32))
    return bits.view(np.int32)


def keys_in(bits: np.ndarray) -> np.ndarray:
    """The cells of a bitmap in raster order."""
    return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))


def rings_of(keys: np.ndarray, v: Mapping[str, Any]) -> np.ndarray:
    """The ring of each cell around the sensor."""
    dx = keys % v["width"] * 2 + 1 - v["sensor_x"]
    dy = keys // v["width"] % v["height"] * 2 + 1 - v["sensor_y"]
    return (dx * dx + dy * dy) >> v["ring_shift"]


def _entered(evidence: Evidence, v: Mapping[str, Any], keys: np.ndarray) -> Iterator[Comparison]:
    yield "keys", v["key"][: len(keys)], keys
    cells = np.unique(keys[keys >= 0])
    if v["RINGS"]:
        yield "rings", v["rings"], np.bincount(rings_of(cells, v), minlength=v["RINGS"])
        cells = cells[rings_of(cells, v) < evidence.run.kept["entry.limit"][0]]  # drop_far worked on the same bits
    yield "bits", v["bits"], words_of(cells, len(v["bits"]))


def enter_voxels(evidence: Evidence, v: dict[str, Any], names: Mapping[str, str]) -> Iterator[Comparison]:
    z, y, x = v["coords"][: v["count"][0], 1:].astype(np.int64).T
    inside = (z >= 0) & (z < v["depth"]) & (y >= 0) & (y < v["height"]) & (x >= 0) & (x < v["width"])
    yield from _entered(evidence, v, np.where(inside, (z * v["height"] + y) * v["width"] + x, -1))


def enter_points(evidence: Evidence, v: dict[str, Any], names: Mapping[str, str]) -> Iterator[Comparison]:
    points = v["points"][: v["count"][0]]
    sane = (np.abs(points) <= 2.0**20).all(axis=1)
    with np.errstate(invalid="ignore"):
        x, y, z = np.floor((points[:, :3] - v["grid"][:3]) / v["grid"][3:]).T
    inside = sane & (x >= 0) & (x < v["width"]) & (y >= 0) & (y < v["height"]) & (z >= 0) & (z < v["depth"])
    x, y, z = (np.where(inside, axis, 0).astype(np.int64) for axis in (x, y, z))
    yield from _entered(evidence, v, np.where(inside, (z * v["height"] + y) * v["width"] + x, -1))


def ring_cutoff(evidence: Evidence, v: dict[str, Any], names: Mapping[str, str]) -> Iterator[Comparison]:
    rings, total = v["rings"], 0
    limit = next((ring for ring in range(len(rings)) if (total := total + rings[ring]) > v["capacity"]), len(rings))
    if rings.any() and not rings[:limit].any():
        limit += 1  # the first ring with cells always stays
    yield "limit", v["limit"], np.array([limit])


def drop_far(evidence: Evidence, v: dict[str, Any], names: Mapping[str, str]) -> Iterator[Comparison]:
    keys = np.unique(v["key"][: v["count"][0]])
    keys = keys[keys >= 0].astype(np.int64)
    yield "bits", v["bits"], words_of(keys[rings_of(keys, v) < v["limit"][0]], len(v["bits"]))


def _ones(bits: np.ndarray, block: int) -> np.ndarray:
    """Set bits of each word, in blocks."""
    each = np.unpackbits(bits.view(np.uint8)).reshape(-1, 32).sum(axis=1)
    return np.pad(each, (0, -len(each) % block)).reshape(-1, block)


def rank_block_sums(evidence: Evidence, v: dict[str, Any], names: Mapping[str, str]) -> Iterator[Comparison]:
    yield "sums", v["sums"], _ones(v["bits"], v["BLOCK"]).sum(axis=1)


def rank_prefix(evidence: Evidence, v: dict[str, Any], names: Mapping[str, str]) -> Iterator[Comparison]:
    ones = _ones(v["bits"], v["BLOCK"]).ravel()[: v["words"]]
    used = ones > 0
    yield "prefix", v["prefix"][used], (np.cumsum(ones) - ones)[used]
    yield "count", v["count"], np.array([min(ones.sum(), v["capacity"])])


def _ranked(v: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of the frame that have a row in the first stage, that row, and the stage's cells."""
    keys, cells = v["key"][: v["count"][0]].astype(np.int64), keys_in(v["bits"])
    rank = np.minimum(np.searchsorted(cells, keys), max(len(cells) - 1, 0))
    rows = np.flatnonzero((keys >= 0) & (cells[rank] == keys) & (rank < v["capacity"])) if len(cells) else rank[:0]
    return rows, rank[rows], cells[: v["capacity"]]


def canonicalise(evidence: Evidence, v: dict[str, Any], names: Mapping[str, str]) -> Iterator[Comparison]:
    rows, rank, cells = _ranked(v)
    yield "sites", v["site"][: len(cells)], cells
    expected = np.zeros((len(cells), v["PITCH"]), v["out"].dtype)
    expected[rank, : v["columns"]] = v["features"][rows]
    yield "features", exactly(v["out"][: len(cells)]), exactly(expected)


def sum_points(evidence: Evidence, v: dict[str, Any], names: Mapping[str, str]) -> Iterator[Comparison]:
    rows, rank, cells = _ranked(v)
    yield "sites", v["site"][: len(cells)], cells
    sums = np.zeros((len(cells), v["columns"]), np.int64)
    np.add.at(sums, rank, np.trunc(v["points"][rows].astype(np.float64) * FIXED_POINT).astype(np.int64))
    yield "sums", v["sums"][: len(cells)], sums
    yield "members", v["members"][: len(cells)], np.bincount(rank, minlength=len(cells))


def mean_features(evidence: Evidence, v: dict[str, Any], names: Mapping[str, str]) -> Iterator[Comparison]:
    count = int(v["count"][0])
    sums = v["sums"][:count].astype(np.float32) * np.float32(1 / FIXED_POINT)
    expected = np.zeros((count, v["PITCH"]), v["out"].dtype)
    expected[:, : v["columns"]] = sums / v["members"][:count, None].astype(np.float32)
    yield "features", exactly(v["out"][:count]), exactly(expected)


def _cells(evidence: Evidence, stage: str) -> torch.Tensor:
    """(batch, z, y, x) of a stage's rows."""
    count = int(evidence.run.kept[f"{stage}.count"][0])
    keys = torch.from_numpy(evidence.run.kept[f"{stage}.sites"][:count].astype(np.int64))
    return cells_of(keys, evidence.backbone.stage(stage).grid)


def _strided(evidence: Evidence, stage: str) -> KernelMap:
    to = evidence.backbone.stage(stage)
    source = evidence.backbone.stage(to.source)
    return strided_map(_cells(evidence, to.source), source.grid, to.kernel, to.stride, to.padding)


def _reached(evidence: Evidence, stage: str) -> np.ndarray:
    keys: np.ndarray = cell_keys(_strided(evidence, stage).out_coords, evidence.backbone.stage(stage).grid).numpy()
    return keys


def bitmap_set_strided(evidence: Evidence, v: dict[str, Any], names: Mapping[str, str]) -> Iterator[Comparison]:
    keys = _reached(evidence, names["bits"].removesuffix(".bits"))
    yield "bits", v["bits"], words_of(keys, len(v["bits"]))


def emit_strided_sites(evidence: Evidence, v: dict[str, Any], names: Mapping[str, str]) -> Iterator[Comparison]:
    keys = _reached(evidence, names["bits"].removesuffix(".bits"))[: v["out_capacity"]]
    yield "sites", v["out_site"][: len(keys)], keys


def rulebook(evidence: Evidence, v: dict[str, Any], names: Mapping[str, str]) -> Iterator[Comparison]:
    layer = _layer_of(evidence, names["book"])
    if layer.submanifold:
        cells, grid = _cells(evidence, layer.stage_out), evidence.backbone.stage(layer.stage_out).grid
        met = submanifold_map(cells, grid, layer.kernel)
    else:
        met = _strided(evidence, layer.stage_out)
    count = int(v["count"][0])
    pairs = np.full((met.taps, count), -1)
    for tap, (rows_in, rows_out) in enumerate(zip(met.in_rows, met.out_rows, strict=True)):
        there = rows_out.numpy() < count
        pairs[tap, rows_out.numpy()[there]] = rows_in.numpy()[there]
    yield "pairs", v["book"][:, :count], pairs
    blocks = np.pad(pairs >= 0, ((0, 0), (0, -count % v["ROWS"]))).reshape(met.taps, -1, v["ROWS"]).any(axis=2)
    yield "taps", v["taps"][: blocks.shape[1]], (blocks << np.arange(met.taps)[:, None]).sum(axis=0)


def _layer_of(evidence: Evidence, pairs: str) -> Convolution:
    return next(layer for layer in evidence.backbone.layers if f"{layer.book}.pairs" == pairs)


def tile_lists(evidence: Evidence, v: dict[str, Any], names: Mapping[str, str]) -> Iterator[Comparison]:
    blocks = -(-int(v["count"][0]) // v["ROWS"])
    for column in range(v["columns"]):
        tiles = v["tiles"][v["starts"][column] : v["starts"][column + 1]]
        used = (v["taps"][:blocks, None] >> (tiles & 31)[None]) & 1 == 1
        yield "lengths", v["length"][:blocks, column], used.sum(axis=1)
        listed = np.arange(v["LONGEST"])[None] < used.sum(axis=1)[:, None]
        yield "lists", v["list"][:blocks, column][listed], np.broadcast_to(tiles, used.shape)[used]


def conv_tile_list(evidence: Evidence, v: dict[str, Any], names: Mapping[str, str]) -> Iterator[Comparison]:
    """By torch, in fp32 from the rows, rulebook and weights as the kernel has them."""
    layer, count = evidence.backbone.layers[v["layer"]], int(v["count"][0])
    inputs, outputs = layer.weight.shape[1:]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = torch.from_numpy(v["features"][:, :inputs].astype(np.float32)).to(device)
    total = torch.from_numpy(np.repeat(layer.bias[None], count, axis=0)).to(device)
    for tap, matrix in zip(layer.taps, layer.weight.astype(v["weight"].dtype).astype(np.float32), strict=True):
        source = torch.from_numpy(v["book"][tap, :count].astype(np.int64)).to(device)
        met = (source >= 0).nonzero().squeeze(1)
        total.index_add_(0, met, rows[source[met]] @ torch.from_numpy(matrix).to(device))
    if layer.adds:
        total += torch.from_numpy(v["residual"][:count, :outputs].astype(np.float32)).to(device)
    yield layer.name, v["out"][:count, :outputs], total.relu().cpu().numpy()
    padding = v["out"][:count, outputs:]
    yield f"{layer.name}, channels of padding", exactly(padding), np.zeros(padding.shape, exactly(padding).dtype)
    column, blocks = v["first_column"], -(-count // v["ROWS"])
    lengths = v["length"][:blocks, column : column + v["COUT"] // v["TILE_OUT"]]
    yield f"{layer.name}, tiles", v["executed"][[v["layer"]]], np.array([lengths.sum()])


def to_bev(evidence: Evidence, v: dict[str, Any], names: Mapping[str, str]) -> Iterator[Comparison]:
    cells = keys_in(v["bits"])[: v["capacity"]]
    dense = np.zeros((v["channels"] + v["ACTIVE"], v["depth"] * v["plane"]), v["bev"].dtype)
    dense[: v["channels"], cells] = v["features"][: len(cells), : v["channels"]].T
    dense[v["channels"] :, cells] = 1
    yield "map", exactly(v["bev"]).reshape(dense.shape), exactly(dense)


def _flat(evidence: Evidence) -> list[np.ndarray]:
    """The flat cell of each row of the stages that are merged."""
    flat = evidence.backbone.stage(MERGED)
    width, cells = flat.grid[2], [_cells(evidence, name).numpy() for name in flat.merges]
    return [(rows[:, 2] << shift) * width + (rows[:, 3] << shift) for shift, rows in enumerate(cells)]


def bitmap_set_flat(evidence: Evidence, v: dict[str, Any], names: Mapping[str, str]) -> Iterator[Comparison]:
    yield "bits", v["bits"], words_of(np.concatenate(_flat(evidence)), len(v["bits"]))  # one array of three launches


def emit_flat_sites(evidence: Evidence, v: dict[str, Any], names: Mapping[str, str]) -> Iterator[Comparison]:
    cells = np.unique(np.concatenate(_flat(evidence)))[: v["out_capacity"]]
    yield "sites", v["out_site"][: len(cells)], cells


def sum_flat(evidence: Evidence, v: dict[str, Any], names: Mapping[str, str]) -> Iterator[Comparison]:
    flat, count = _flat(evidence), int(v["count"][0])
    cells = np.unique(np.concatenate(flat))
    total = np.zeros((len(cells), v["PITCH"]))
    for stage, keys in enumerate(flat):
        np.add.at(total, np.searchsorted(cells, keys), v[f"features_{stage}"][: len(keys)].astype(np.float64))
    yield "sums", v["out"][:count], total[:count]


def give_rows(evidence: Evidence, v: dict[str, Any], names: Mapping[str, str]) -> Iterator[Comparison]:
    count = int(v["count"][0])
    rows, cells = np.zeros(v["out"].shape, np.float32), np.full(v["cell"].shape, -1)
    rows[:count] = v["features"][:count, : v["channels"]]
    key = v["site"][:count]
    cells[:, :count] = key // v["width"] // v["height"], key // v["width"] % v["height"], key % v["width"]
    yield "rows", exactly(v["out"]), exactly(rows)
    yield "cells", v["cell"], cells


CHECKS: Mapping[str, Callable[..., Iterator[Comparison]]] = {
    check.__name__: check
    for check in (
        enter_voxels, enter_points, ring_cutoff, drop_far, rank_block_sums, rank_prefix, canonicalise, sum_points,
        mean_features, bitmap_set_strided, emit_strided_sites, rulebook, tile_lists, conv_tile_list, to_bev, give_rows,
        bitmap_set_flat, emit_flat_sites, sum_flat,
    )
}  # fmt: skip
