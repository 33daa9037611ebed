"""The profile of this machine: every layer timed by itself in ONNX Runtime, the whole graphs timed beside them."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from dm3d_deploy.device import stamp_here
from dm3d_deploy.errors import UsageError
from dm3d_deploy.pointcloud import Voxels
from dm3d_deploy.pruning.contracts import Layer
from dm3d_deploy.pruning.profiles import FEWER_INPUTS, LayerTimes, Profile, TimeCurve, untimed
from dm3d_deploy.reporting.facts import machine_from_stamp
from engines.onnx_runtime import open_session, run_backbone
from exporters.micro_builds import dense_micro_build, sparse_micro_build

if TYPE_CHECKING:
    from dm3d_deploy.models.detector import Detector
    from dm3d_deploy.models.sparse import KernelMap

DENSE_SHARES = (0.25, 0.5, 0.75)
SPARSE_SHARES = (0.5,)
WARMUP = 1
ELEMENTS = {"float16": np.float16, "float32": np.float32}
Advanced = Callable[[int, int], None]


@dataclass(slots=True, kw_only=True)
class _Bench:
    """Times graphs and remembers those of equal layers."""

    folder: Path
    repeats: int
    precision: Literal["fp16", "fp32"]
    seen: dict[tuple[Any, ...], float] = field(default_factory=dict)
    spreads: list[float] = field(default_factory=list)

    def median_ms(self, run: Callable[[], object]) -> float:
        samples = []
        for index in range(WARMUP + self.repeats):
            begin = time.perf_counter_ns()
            run()
            if index >= WARMUP:
                samples.append((time.perf_counter_ns() - begin) / 1e6)
        middle = statistics.median(samples)
        self.spreads.append((max(samples) - min(samples)) / middle)
        return middle

    def graph_ms(self, digest: str, inputs: Mapping[str, np.ndarray] | None = None) -> float:
        session = open_session(self.folder / "layer.onnx", digest=digest, threads=None)
        if inputs is None:
            rng = np.random.default_rng(0)
            inputs = {n: rng.random(shape).astype(ELEMENTS[kind]) for n, (kind, shape) in session.inputs.items()}
        return self.median_ms(lambda: session.run(inputs))

    def dense_ms(self, layer: Layer, outputs: int, stride: int, *, two_four: bool = False) -> float:
        cells = float(layer.positions[0])
        key = (layer.kind, layer.inputs, outputs, layer.kernel, stride, cells, two_four)
        if key not in self.seen:
            digest = dense_micro_build(
                self.folder / "layer.onnx", layer, outputs=outputs, stride=stride, precision=self.precision,
                two_four=two_four,
            )  # fmt: skip
            self.seen[key] = self.graph_ms(digest)
        return self.seen[key]

    def sparse_ms(self, layer: Layer, outputs: int, key_map: str, kernel_map: KernelMap, sites_in: int) -> float:
        key = (key_map, layer.inputs, outputs)
        if key not in self.seen:
            taps = [tap for tap in range(kernel_map.taps) if tap != kernel_map.centre]
            inputs = {"features": np.random.default_rng(0).random((sites_in, layer.inputs), np.float32)}
            inputs["sites"] = np.ascontiguousarray(kernel_map.out_coords[:, 1:].numpy().T)
            inputs |= {f"in_{i}": kernel_map.in_rows[tap].numpy() for i, tap in enumerate(taps)}
            inputs |= {f"out_{i}": kernel_map.out_rows[tap].numpy()[:, None] for i, tap in enumerate(taps)}
            digest = sparse_micro_build(
                self.folder / "layer.onnx", layer, outputs=outputs, sites_in=sites_in,
                sites_out=len(kernel_map.out_coords), pairs=[len(kernel_map.in_rows[tap]) for tap in taps],
                centre=kernel_map.centre is not None,
            )  # fmt: skip
            self.seen[key] = self.graph_ms(digest, inputs)
        return self.seen[key]


def measured_profile(
    detector: Detector,
    layers: Sequence[Layer],
    frame: Voxels,
    *,
    model_name: str,
    precision: str,
    repeats: int,
    advanced: Advanced | None,
) -> Profile:
    """Times of every layer on this machine, dense and with fewer output channels, `frame` driving the sparse ones.

    Zeros among weights change no time in ONNX Runtime (the dearest layer is timed with and without, and both are
    noted), so 2:4 and tiles have no curves.
    """
    if precision not in ("fp16", "fp32"):
        raise UsageError(f"there is no precision '{precision}'.", fix="choose fp16 or fp32")
    tell = advanced if advanced is not None else lambda done, total: None
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(
            folder=Path(folder), repeats=repeats, precision=cast(Literal["fp16", "fp32"], precision)
        )  # fmt: skip
        maps = _kernel_maps(detector, frame)
        found = []
        for index, layer in enumerate(layers):
            if layer.kind == "linear":
                found.append(untimed(layer))
            else:
                found.append(_sparse(bench, layer, maps) if layer.kind == "sparse" else _dense(bench, detector, layer))
            tell(index + 1, len(layers) + 1)
        fixed, notes = _whole_graphs(bench, detector, frame, found)
        notes += [_zeros(bench, detector, layers, found), _steadiness(bench)]
        tell(len(layers) + 1, len(layers) + 1)
    stamp = machine_from_stamp(stamp_here().as_json(), ran_on="cpu")
    return Profile(
        standing="measured", device=stamp["device"], model=model_name, precision=precision, voxels=len(frame.coords),
        clock=f"perf_counter_ns, median of {repeats} runs of each layer alone in ONNX Runtime",
        band={"3d": None, "2d": None, "head": None}, fixed_ms=fixed, layers=tuple(found), stamp=stamp,
        notes=tuple(notes),
    )  # fmt: skip


def _kernel_maps(detector: Detector, frame: Voxels) -> dict[str, tuple[str, KernelMap, int]]:
    """Of every sparse layer: what its kernel map is shared by, the map, and the sites that it reads."""
    import torch

    from dm3d_deploy.models.sparse import SparseTensor

    if detector.over_pillars:
        return {}
    coords = torch.from_numpy(frame.coords.astype(np.int64))
    x = SparseTensor(torch.empty(len(coords), 0), coords, detector.backbone_3d.shape_zyx, 1)
    found = {}
    for name, conv in detector.backbone_3d.convolutions():
        kernel_map = conv.kernel_map(x)
        found[f"backbone_3d.{name}"] = (conv.indice_key, kernel_map, len(x.coords))
        x = x.at(kernel_map, torch.empty(len(kernel_map.out_coords), 0))
    return found


def _sparse(bench: _Bench, layer: Layer, maps: Mapping[str, tuple[str, KernelMap, int]]) -> LayerTimes:
    key, kernel_map, sites_in = maps[layer.name]
    return _times(layer, SPARSE_SHARES, lambda outputs: bench.sparse_ms(layer, outputs, key, kernel_map, sites_in))


def _dense(bench: _Bench, detector: Detector, layer: Layer) -> LayerTimes:
    stride = _stride(detector, layer)
    return _times(layer, DENSE_SHARES, lambda outputs: bench.dense_ms(layer, outputs, stride))


def _stride(detector: Detector, layer: Layer) -> int:
    from torch import nn

    module = detector.get_submodule(layer.name)
    return int(module.stride[0]) if isinstance(module, nn.Conv2d) else 1


def _times(layer: Layer, shares: Sequence[float], ms: Callable[[int], float]) -> LayerTimes:
    dense = ms(layer.outputs)
    widths = sorted({max(1, round(share * layer.outputs)) for share in shares} - {layer.outputs})
    curves = {}
    if widths and not layer.final:
        found = [*(ms(width) for width in widths), dense]
        share = np.array([*widths, layer.outputs]) / layer.outputs
        curves["channel"] = TimeCurve(share=share, ms=np.array(found))
    return LayerTimes(
        layer=layer.name, part=layer.part, kind=layer.kind, shape=layer.shape, dense_ms=dense, curves=curves
    )


def _whole_graphs(
    bench: _Bench, detector: Detector, frame: Voxels, layers: Sequence[LayerTimes]
) -> tuple[dict[str, float], list[str]]:
    """What the whole 3D graph takes beyond its layers, and both graphs beside the sums of their layers."""
    from exporters.backbone3d import export_backbone3d
    from exporters.bev_head import export_bev_head
    from exporters.pillars import export_pillars

    backbone, head = bench.folder / "backbone3d.onnx", bench.folder / "bev_head.onnx"
    if detector.over_pillars:
        to_bev, words = export_pillars(detector, backbone), "the pillars' graph"
    else:
        to_bev, words = export_backbone3d(detector, backbone, max_voxels=len(frame.coords)), "the 3D graph"
    session = open_session(backbone, digest=to_bev.artifact.digest, threads=None)
    whole = bench.median_ms(lambda: run_backbone(session, frame))
    graph = export_bev_head(detector, head, precision=bench.precision)
    session = open_session(head, digest=graph.artifact.digest, threads=None)
    inputs = {name: np.zeros(shape, ELEMENTS[kind]) for name, (kind, shape) in session.inputs.items()}
    flat = bench.median_ms(lambda: session.run(inputs))
    sparse = sum(layer.dense_ms for layer in layers if layer.kind == "sparse")
    dense = sum(layer.dense_ms for layer in layers if layer.kind != "sparse")
    return {"3d": max(0.0, whole - sparse)}, [
        f"{words} as a whole: {whole:.4g} ms; its layers alone: {sparse:.4g} ms; the rest counts as fixed",
        f"BEV and head as a whole: {flat:.4g} ms; its layers alone, which is what counts here: {dense:.4g} ms",
        "voxelisation, decoding and NMS are not in it",
        FEWER_INPUTS,
    ]


def _steadiness(bench: _Bench) -> str:
    if bench.repeats == 1:
        return "each layer was run once: how steady the times are is not known"
    middle, worst = statistics.median(bench.spreads), max(bench.spreads)
    return (
        f"runs of a layer spread over {middle:.0%} of their median, {worst:.0%} at worst: a busy machine spreads more"
    )


def _zeros(bench: _Bench, detector: Detector, layers: Sequence[Layer], times: Sequence[LayerTimes]) -> str:
    pairs = zip(layers, times, strict=True)
    flat = [(time.dense_ms, layer) for layer, time in pairs if layer.kind in ("conv2d", "deconv2d")]
    dense, dearest = max(flat, key=lambda pair: pair[0])
    zeros = bench.dense_ms(dearest, dearest.outputs, _stride(detector, dearest), two_four=True)
    return f"half of the weights of {dearest.name} zero as 2:4 leaves them: {zeros:.4g} ms, dense {dense:.4g} ms"
