"""Weights for runs without training: a pure function of (seed, parameter name, shape), the same on every machine."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from jaxtyping import Float64

from dm3d_deploy.models.detector import Detector

OCCUPANCY = 0.4  # share of a sparse kernel's taps that meet an active cell, roughly, over the stages of real frames
INPUT_GAIN = 0.04  # points come in raw metres and intensities
RESIDUAL_GAIN = 0.3
OUTPUT_GAIN = 0.5
HEAT_MAP_GAIN = 1.0
HEAT_MAP_BIAS = -3.7
JITTER = 0.1


def seed_weights(detector: Detector, seed: int = 0) -> None:
    """Fill every parameter and buffer in place. Such a detector finds nothing real: it is for untrained runs only."""
    with torch.no_grad():
        for name, value in detector.state_dict().items():
            value.copy_(torch.from_numpy(seeded_values(seed, name, tuple(value.shape))))


def seeded_values(seed: int, name: str, shape: tuple[int, ...]) -> Float64[np.ndarray, ...]:
    """The values of one parameter or buffer; counters are zero.

    Convolutions keep the variance through a ReLU (He et al. 2015), over the taps that a sparse kernel really meets;
    the second convolution of a residual block and the outputs are damped; norms are close to the identity.
    """
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("num_batches_tracked", "global_step"):
        return np.zeros(shape)
    noise = _uniform(seed, name, shape)
    if leaf == "running_mean":
        return JITTER * noise
    if leaf == "running_var" or (leaf == "weight" and len(shape) == 1):
        return 1.0 + JITTER * noise
    if leaf == "bias":
        return JITTER * noise + (HEAT_MAP_BIAS if _is_output(name) and _is_score(name) else 0.0)
    return noise * math.sqrt(3.0) * _deviation(name, shape)


def _uniform(seed: int, name: str, shape: tuple[int, ...]) -> Float64[np.ndarray, ...]:
    """Numbers in [-1, 1) from the bits of a counter-based generator: no library function that may round differently."""
    key = hashlib.sha256(f"{seed}/{name}/{shape}".encode()).digest()[:16]
    bits = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(math.prod(shape))
    uniform: np.ndarray = (np.asarray(bits, dtype=np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0
    return uniform.reshape(shape)


def _deviation(name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of a convolution's weights."""
    fan_in = float(shape[0]) if ".deblocks." in name else float(math.prod(shape[1:]))
    gain = math.sqrt(2.0)
    if len(shape) == 5:
        fan_in *= OCCUPANCY
    if name.startswith(("backbone_3d.conv_input.", "vfe.pfn_layers.0.")):
        gain *= INPUT_GAIN
    if name.endswith(".conv2.weight"):
        gain *= RESIDUAL_GAIN
    if _is_output(name):
        gain *= HEAT_MAP_GAIN if _is_score(name) else OUTPUT_GAIN
    return gain / math.sqrt(fan_in)


def _is_score(name: str) -> bool:
    return ".hm." in name or ".conv_cls." in name


def _is_output(name: str) -> bool:
    """Whether this belongs to a last convolution: heads_list.TASK.BRANCH.INDEX.weight, dense_head.conv_cls.weight."""
    parts = name.split(".")
    if "heads_list" not in parts:
        return name.startswith("dense_head.conv_")
    return len(parts) - parts.index("heads_list") == 5
