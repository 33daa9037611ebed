"""A profile of a device that is not here: the latency model over a detector's layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from dm3d_deploy.device import Device
from dm3d_deploy.errors import InternalError
from dm3d_deploy.pruning import latency_model as model
from dm3d_deploy.pruning.contracts import Layer
from dm3d_deploy.pruning.profiles import FEWER_INPUTS, LayerTimes, Profile, TimeCurve, untimed

WIDTH_SHARES = tuple(k / 16 for k in range(1, 17))
CLOCK = "roofline with wave quantisation (docs/measurements/latency-model.md)"
NOTES = (
    "voxelisation, decoding and NMS are not in it: 1.36 and 4.4 ms were published for CenterPoint on a DRIVE Orin",
    "that a skipped tile saves its share of the 3D stage's time has been measured by nobody",
    FEWER_INPUTS,
)
OF_THE_3D_STAGE = (
    "the 3D stage's time is a curve of nuScenes frames in 0.075 m voxels on an Orin; no other voxels were compared",
    f"its fixed {model.SPARSE_FIXED_MS} ms (rulebooks, launches) are scaled to no device; fits of the curve say "
    f"{model.SPARSE_FIXED_RANGE_MS[0]:g} to {model.SPARSE_FIXED_RANGE_MS[1]:g}",
)
UNTIMED = {  # what the linear layers of a part are
    "3d": "the point network of the pillars and their scatter are not in it: nobody published their time alone",
    "head": "the second stage, its keypoints and its pooling are not in it: nobody published their time alone",
}


def estimable(layers: Sequence[Layer], device: Device) -> model.Figures:
    """The figures that these layers' times on a device can be estimated from; UsageError where there are none."""
    model.check_layers(layers)
    return model.figures_of(device)


def estimated_profile(
    layers: Sequence[Layer], cells_in: Mapping[str, int], device: Device, *, voxels: int, model_name: str
) -> Profile:
    """The fp16 profile of `device` from published figures; `cells_in` holds the map cells that each 2D layer reads.

    UsageError where the model refuses: see `latency_model`.
    """
    figures = estimable(layers, device)
    untold = {(layer.kind, layer.part) for layer in layers}
    sparse_macs = math.fsum(layer.macs for layer in layers if layer.kind == "sparse")
    variable, fixed = model.sparse_stage_ms(voxels / 1e3, figures) if sparse_macs else (0.0, 0.0)
    dense_band, sparse_band = model.bands_of(figures)
    return Profile(
        standing="estimated",
        device=device.name,
        model=model_name,
        precision="fp16",
        voxels=voxels,
        clock=CLOCK,
        band={"3d": sparse_band, "2d": dense_band, "head": dense_band},
        fixed_ms={"3d": fixed},
        layers=tuple(
            untimed(layer)
            if layer.kind == "linear"
            else _sparse_times(layer, variable * layer.macs / sparse_macs)
            if layer.kind == "sparse"
            else _dense_times(layer, cells_in[layer.name], figures)
            for layer in layers
        ),
        stamp={
            "device": device.platform,
            "clock": "not reported" if device.clock_ghz is None else f"{device.clock_ghz:g} GHz",
            "figures": f"{figures.multiprocessors} SM, {figures.tflops['fp16']:g} TFLOPS, {figures.gb_per_s:g} GB/s",
            "standing of the figures": str(device.standing),
        },
        notes=(
            *_uncompared(device, figures),
            *(OF_THE_3D_STAGE if sparse_macs else ()),
            *NOTES,
            *(note for part, note in UNTIMED.items() if ("linear", part) in untold),
        ),
    )


def _uncompared(device: Device, figures: model.Figures) -> tuple[str, ...]:
    if any(band is not None for band in model.bands_of(figures)):
        return ()
    return (f"the figures of {device.name} are {device.standing}: no time on it was ever compared with an estimate",)


def _sparse_times(layer: Layer, ms: float) -> LayerTimes:
    """A sparse layer's part of its stage; tiles and channels that are left out take their share with them."""
    line = TimeCurve(share=np.array([0.0, 1.0]), ms=np.array([0.0, ms]))
    return LayerTimes(
        layer=layer.name,
        part=layer.part,
        kind=layer.kind,
        shape=layer.shape,
        dense_ms=ms,
        curves={"tile": line, "channel": line},
    )


def _dense_times(layer: Layer, cells_in: int, figures: model.Figures) -> LayerTimes:
    dense = model.dense_ms(_gemm(layer, cells_in, layer.outputs), figures)
    two_four = model.two_four_ms(dense, inputs=layer.inputs, outputs=layer.outputs)
    widths = [max(1, round(share * layer.outputs)) for share in WIDTH_SHARES]
    found = {width / layer.outputs: model.dense_ms(_gemm(layer, cells_in, width), figures) for width in widths}
    shares = np.array(sorted(found))
    curves = {
        "2:4": TimeCurve(share=np.array([0.5]), ms=np.array([two_four])),
        "channel": TimeCurve(share=shares, ms=np.array([found[share] for share in shares])),
    }
    return LayerTimes(
        layer=layer.name, part=layer.part, kind=layer.kind, shape=layer.shape, dense_ms=dense, curves=curves
    )


def _gemm(layer: Layer, cells_in: int, outputs: int) -> model.Gemm:
    cells = round(float(layer.positions[0]))
    if layer.kind == "conv2d":
        return model.convolution(
            inputs=layer.inputs, outputs=outputs, taps=layer.taps, cells_in=cells_in, cells_out=cells
        )
    if layer.kind == "deconv2d":
        return model.deconvolution(inputs=layer.inputs, outputs=outputs, taps=layer.taps, cells_in=cells)
    raise InternalError(f"{layer.name}: no estimate for a layer of the kind '{layer.kind}'")
