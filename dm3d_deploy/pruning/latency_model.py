"""Time of a detector's layers on a device that is not here: estimates from published measurements, with their limits.

A roofline with wave quantisation for dense layers, fitted on NVIDIA's per-layer log of an A100 PCIe 40 GB (TensorRT
8.2.3, FP16) and checked on stage totals only: no per-layer profile of an Orin is public. For the sparse 3D stage the
totals of 6,019 nuScenes frames on an Orin. docs/measurements/latency-model.md holds formulas and checks.
Every number that comes from here is an estimate and is called so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from dm3d_deploy.device import DEVICES, Device
from dm3d_deploy.errors import InternalError, UsageError
from dm3d_deploy.pruning.contracts import Layer

Precision = Literal["fp16", "int8"]
COMPUTE_EFFICIENCY, BANDWIDTH_EFFICIENCY, LAUNCH_MS = 0.634, 0.673, 4.7e-3
INT8_COMPUTE = 0.83  # of the fp16 efficiency
BYTES = {"fp16": 2, "int8": 1}
TILES = ((256, 128, 1.0), (128, 128, 1.0), (128, 64, 1.0), (64, 64, 1.12), (128, 32, 2.5))  # rows, columns, penalty
CORRECTION = {"sm_87": 0.88}  # the uncorrected model is 18.6 % above CUDA-CenterPoint's BEV + head on an Orin
CHANNELS = (64, 512)
KILOVOXELS = (15.0, 135.0)
# Taps and output channels, layer by layer, of the backbone whose totals were published: VoxelResBackBone8x.
SPARSE_LAYERS = (*((27, outputs) for outputs in (16, 32, 64, 128) for _ in range(5)), (3, 128))
SPARSE_CURVE: dict[Precision, tuple[float, float, float]] = {
    "fp16": (10.36, -0.0465, 0.001751),
    "int8": (6.78, -0.01755, 0.0011556),
}
SPARSE_FIXED_MS, SPARSE_FIXED_RANGE_MS = 6.3, (3.0, 10.0)
SPARSE_SOURCE_GB_PER_S = 204.8
WIDE = 256  # no gain from 2:4 below so many input or output channels
TWO_FOUR_GAIN: dict[Precision, float] = {"fp16": 1.17, "int8": 1.24}
BANDS = {"sm_87": (0.2, 0.34), "sm_80": (0.14, None)}  # relative, of dense layers and of the 3D stage
MEASURE = "measure it there: dm3d-deploy profile --model MODEL --device here -o profile.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """A device's row of the table with every number that the model needs."""

    name: str
    sm: str
    multiprocessors: int
    tflops: dict[Precision, float]
    gb_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemm:
    """A dense layer as one matrix product: [rows, depth] x [depth, columns]; `elements` it reads and writes."""

    rows: int
    columns: int
    depth: int
    elements: int

    def __post_init__(self) -> None:
        if min(self.rows, self.columns, self.depth, self.elements) < 1:
            raise InternalError(f"no matrix product: {self.rows} x {self.columns} x {self.depth}")


def figures_of(device: Device) -> Figures:
    """The numbers of a device; UsageError where the table has none, as for most of them nobody published any."""
    fp16, int8, memory = device.fp16_tflops, device.int8_tops, device.gb_per_s
    if device.sm is None or device.multiprocessors is None or fp16 is None or int8 is None or memory is None:
        raise UsageError(
            f"there are no figures to estimate times on '{device.name}' from.",
            fix=f"{MEASURE}, or name one of {', '.join(row.name for row in DEVICES if row.standing)}",
        )
    return Figures(
        name=device.name, sm=device.sm, multiprocessors=device.multiprocessors, tflops={"fp16": fp16, "int8": int8},
        gb_per_s=memory,
    )  # fmt: skip


def convolution(*, inputs: int, outputs: int, taps: int, cells_in: int, cells_out: int) -> Gemm:
    """A 2D convolution: rows are output cells, columns output channels."""
    elements = cells_in * inputs + cells_out * outputs + inputs * outputs * taps
    return Gemm(rows=cells_out, columns=outputs, depth=inputs * taps, elements=elements)


def deconvolution(*, inputs: int, outputs: int, taps: int, cells_in: int) -> Gemm:
    """A transposed convolution whose kernel is its stride: rows are input cells, columns outputs times taps."""
    elements = cells_in * inputs + cells_in * taps * outputs + inputs * outputs * taps
    return Gemm(rows=cells_in, columns=outputs * taps, depth=inputs, elements=elements)


def wave_quantisation(rows: int, columns: int, multiprocessors: int) -> float:
    """How much more than its products a matrix product takes: padding to tiles times the last wave's idle share.

    The least over the tile shapes of padding * ceil(T / S) / (T / S), T tiles on S multiprocessors; at least 1.
    """
    found = math.inf
    for tile_rows, tile_columns, penalty in TILES:
        tiles = math.ceil(rows / tile_rows) * math.ceil(columns / tile_columns)
        padding = tiles * tile_rows * tile_columns / (rows * columns)
        waves = math.ceil(tiles / multiprocessors) / (tiles / multiprocessors)
        found = min(found, penalty * padding * waves)
    return found


def dense_ms(gemm: Gemm, device: Figures, precision: Precision = "fp16") -> float:
    """Estimated ms of a dense layer: the larger of its products and its bytes at their efficiencies, and a launch."""
    efficiency = COMPUTE_EFFICIENCY * (INT8_COMPUTE if precision == "int8" else 1.0)
    waste = wave_quantisation(gemm.rows, gemm.columns, device.multiprocessors)
    products = 2 * gemm.rows * gemm.columns * gemm.depth * waste
    compute_ms = products / (device.tflops[precision] * 1e9 * efficiency)
    memory_ms = gemm.elements * BYTES[precision] / (device.gb_per_s * 1e6 * BANDWIDTH_EFFICIENCY)
    return CORRECTION.get(device.sm, 1.0) * (max(compute_ms, memory_ms) + LAUNCH_MS)


def two_four_ms(dense: float, *, inputs: int, outputs: int, precision: Precision = "fp16") -> float:
    """Estimated ms of a dense layer of `dense` ms under 2:4: nothing gained below 256 channels on either side.

    1.17x and 1.24x were published end to end, for one network on an Orin at MAXN: no layer's own gain is known.
    """
    return dense / TWO_FOUR_GAIN[precision] if min(inputs, outputs) >= WIDE else dense


def sparse_stage_ms(kilovoxels: float, device: Figures, precision: Precision = "fp16") -> tuple[float, float]:
    """Estimated ms of the unpruned 3D stage: what multiplications can change, and the fixed rest of it.

    On an Orin the total is the curve of 6,019 frames (mean error 9 %, 34 % at the 99th percentile). Rulebooks and
    launches are fixed: 6.3 ms is what carries DRIVE Orin's published 22.3 ms over to A30's 9.8 ms when all else scales
    with memory bandwidth; fits of the curve alone say 3 to 10. That one scaling serves all other devices.
    """
    check_voxels(kilovoxels)
    constant, linear, square = SPARSE_CURVE[precision]
    total = constant + linear * kilovoxels + square * kilovoxels**2
    return (total - SPARSE_FIXED_MS) * SPARSE_SOURCE_GB_PER_S / device.gb_per_s, SPARSE_FIXED_MS


def bands_of(device: Figures) -> tuple[float | None, float | None]:
    """Relative bands of the dense layers and of the 3D stage; None where nothing was ever compared."""
    return BANDS.get(device.sm, (None, None))


def check_voxels(kilovoxels: float) -> None:
    """UsageError outside 15,000 to 135,000 voxels, which the published frames span."""
    low, high = KILOVOXELS
    if not low <= kilovoxels <= high:
        raise UsageError(
            f"a frame of {kilovoxels * 1e3:,.0f} voxels lies outside the {low * 1e3:,.0f} to {high * 1e3:,.0f} that "
            "the published times of the 3D stage span.",
            fix=f"estimate for a count within (profile --voxels), calibrate on denser frames, or {MEASURE}",
        )


def check_layers(layers: Iterable[Layer]) -> None:
    """UsageError for layers that no published time speaks for: another 3D backbone, 2D inputs outside 64 to 512.

    Linear layers are those of pillars, which the estimate leaves out.
    """
    all_layers = tuple(layers)
    sparse = tuple((layer.taps, layer.outputs) for layer in all_layers if layer.kind == "sparse")
    if sparse and sparse != SPARSE_LAYERS:
        raise UsageError(
            f"the published times of the 3D stage are of CenterPoint's residual backbone, {_words(SPARSE_LAYERS)}; "
            f"this one has {_words(sparse)}.",
            fix=MEASURE,
        )
    low, high = CHANNELS
    for layer in all_layers:
        if layer.kind in ("conv2d", "deconv2d") and not low <= layer.inputs <= high:
            raise UsageError(
                f"{layer.name} has {layer.inputs} input channels; the estimate was checked for {low} to {high}.",
                fix=MEASURE,
            )


def _words(layers: Sequence[tuple[int, int]]) -> str:
    widths = (f"{sum(own == width for _, own in layers)} of {width}" for width in sorted({own for _, own in layers}))
    return f"{len(layers)} layers ({', '.join(widths)} channels)"
