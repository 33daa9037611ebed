"""Profiles: the time of every layer in every form that changes it, on one device, measured there or estimated."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from dm3d_deploy.artifacts import canonical_json, digest_of_bytes
from dm3d_deploy.errors import InternalError, StaleArtifact, UsageError, nearest
from dm3d_deploy.pruning.contracts import Layer

SCHEMA = 1
STANDINGS = ("measured", "estimated")
TIMED_PATTERNS = ("2:4", "tile", "channel")
AGAIN = "write it again: dm3d-deploy profile --model MODEL --device here -o profile.json"
FEWER_INPUTS = "fewer inputs count as the same share of fewer outputs: only those were timed or estimated"
PART_WORDS = {"3d": "3D backbone", "2d": "2D backbone", "head": "head"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeCurve:
    """Milliseconds at rising shares of a layer's multiplications; straight lines in between, level outside."""

    share: Float64[np.ndarray, " points"]
    ms: Float64[np.ndarray, " points"]

    def __post_init__(self) -> None:
        if self.share.ndim != 1 or len(self.share) < 1 or self.share.shape != self.ms.shape:
            raise InternalError(f"a time curve of {self.share.shape} shares and {self.ms.shape} times")
        if not np.isfinite(self.ms).all() or (self.ms < 0).any() or (np.diff(self.share) <= 0).any():
            raise InternalError("a time curve needs rising shares, and times that are finite and not negative")

    def at(self, share: float) -> float:
        """Milliseconds at a share of the multiplications."""
        return float(np.interp(share, self.share, self.ms))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """One layer: its dense time, and a curve for each pattern that changes it. Any other pattern takes `dense_ms`.

    A layer of a block that goes ("depth") is in no graph and takes none: the block's identity is its input as it came,
    without norm and ReLU.
    """

    layer: str
    part: str
    kind: str
    shape: tuple[int, ...]
    dense_ms: float
    curves: Mapping[str, TimeCurve]

    def __post_init__(self) -> None:
        if not 0 <= self.dense_ms < math.inf:
            raise InternalError(f"{self.layer}: {self.dense_ms} ms is no time")
        for pattern in self.curves:
            if pattern not in TIMED_PATTERNS:
                raise InternalError(f"{self.layer}: no time is kept for the pattern '{pattern}'")

    def ms(self, pattern: str, share: float) -> float:
        """Milliseconds of the layer in a pattern that runs `share` of its multiplications."""
        if pattern == "depth":
            return 0.0
        curve = self.curves.get(pattern)
        return self.dense_ms if curve is None or share >= 1 else curve.at(share)


def untimed(layer: Layer) -> LayerTimes:
    """A layer that no time is counted for, so that pruning it saves none."""
    return LayerTimes(
        layer=layer.name, part=layer.part, kind=layer.kind, shape=layer.shape, dense_ms=0.0, curves={}
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A device's times for one model at one count of voxels.

    `fixed_ms`, by part, is what no pruning changes: rulebooks, launches. `band` is relative, by part, None where
    nothing says how far the times are off. `stamp` says what they were measured on or computed from.
    """

    standing: str
    device: str
    model: str
    precision: str
    voxels: int
    clock: str
    band: Mapping[str, float | None]
    fixed_ms: Mapping[str, float]
    layers: tuple[LayerTimes, ...]
    stamp: Mapping[str, str]
    notes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.standing not in STANDINGS:
            raise InternalError(f"a profile is {' or '.join(STANDINGS)}, not '{self.standing}'")
        if not self.layers or not all(0 <= ms < math.inf for ms in self.fixed_ms.values()):
            raise InternalError("a profile needs layers, and fixed times that are finite and not negative")
        strange = {*self.fixed_ms, *(layer.part for layer in self.layers)} - PART_WORDS.keys()
        if strange:
            raise InternalError(f"a profile has no part '{min(strange)}'")

    @property
    def label(self) -> str:
        """What must stand beside each of its numbers."""
        if self.standing == "measured":
            return f"measured on {self.device}"
        return f"estimated for {self.device}, not measured"

    @property
    def dense_ms(self) -> float:
        """Milliseconds of the dense network: 3D backbone, 2D backbone and head."""
        return math.fsum([*self.fixed_ms.values(), *(layer.dense_ms for layer in self.layers)])

    def band_words(self, part: str) -> str:
        """How far a part's time may be off, as it must stand behind each estimate; nothing where it was measured."""
        if self.standing == "measured":
            return ""
        band = self.band.get(part)
        return "no band: never compared" if band is None else f"+-{band * 100:.0f} %"

    @property
    def words(self) -> str:
        """The label, and behind it the band of each part that takes time."""
        bands = {part: self.band_words(part) for part in self.part_ms()}
        told = ", ".join(f"{PART_WORDS[part]} {band}" for part, band in bands.items() if band)
        return f"{self.label} ({told})" if told else self.label

    def part_ms(self) -> dict[str, float]:
        """Milliseconds of each part that takes any, what is fixed among them."""
        found = dict(self.fixed_ms)
        for layer in self.layers:
            found[layer.part] = found.get(layer.part, 0.0) + layer.dense_ms
        return {part: ms for part, ms in found.items() if ms > 0}

    def part_lines(self) -> list[str]:
        """Each part in a line: its time, how much of it nothing changes, its band."""
        lines = []
        for part, ms in self.part_ms().items():
            fixed = self.fixed_ms.get(part, 0.0)
            told = [f"{ms:.4g} ms", f"{fixed:.4g} ms of it fixed" if fixed else "", self.band_words(part)]
            lines.append(f"{PART_WORDS[part]}: {', '.join(filter(None, told))}")
        return lines

    def times(self) -> dict[str, LayerTimes]:
        """The layers by name."""
        return {layer.layer: layer for layer in self.layers}

    def digest(self) -> str:
        """SHA-256 of everything it says."""
        return digest_of_bytes(canonical_json(_content(self)).encode())


def profile_as_json(profile: Profile) -> dict[str, Any]:
    """Plain data with its digest."""
    return {**_content(profile), "sha256": profile.digest()}


def profile_from_text(text: str, source: str) -> Profile:
    """The profile that `profile_as_json` wrote.

    UsageError for what is no profile of this version or holds unknown keys, StaleArtifact for one that was changed
    since it was written.
    """
    data = _parsed(text, source)
    try:
        profile = _profile(data)
    except (KeyError, TypeError, ValueError, InternalError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"{source} is no profile that can be used ({reason}).", fix=AGAIN) from None
    _strict(data, profile_as_json(profile), source)
    found = profile.digest()
    if data["sha256"] != found:
        raise StaleArtifact(
            f"{source} was changed since it was written: its sha256 should be {str(data['sha256'])[:12]}…, it is "
            f"{found[:12]}….",
            fix=AGAIN,
        )
    return profile


def check_model(profile: Profile, layers: Sequence[Layer], model: str) -> None:
    """UsageError unless the profile is of exactly these layers; both sides are named."""
    theirs = {layer.layer: (layer.kind, layer.shape) for layer in profile.layers}
    ours = {layer.name: (layer.kind, layer.shape) for layer in layers}
    for name in (*ours, *theirs):
        if ours.get(name) != theirs.get(name):
            here, there = (_shown(side.get(name)) for side in (ours, theirs))
            raise UsageError(
                f"the profile is of '{profile.model}', the build of '{model}': {name} is {there} there, {here} here.",
                fix=f"dm3d-deploy profile --model {model} --device {_where(profile)} writes one that fits",
            )


def _where(profile: Profile) -> str:
    return profile.device if profile.standing == "estimated" else "here"


def _shown(side: tuple[str, tuple[int, ...]] | None) -> str:
    return "absent" if side is None else f"{side[0]} {'x'.join(map(str, side[1]))}"


def _content(profile: Profile) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "standing": profile.standing,
        "device": profile.device,
        "model": profile.model,
        "precision": profile.precision,
        "voxels": profile.voxels,
        "clock": profile.clock,
        "band": dict(profile.band),
        "fixed_ms": dict(profile.fixed_ms),
        "stamp": dict(profile.stamp),
        "notes": list(profile.notes),
        "layers": [
            {
                "layer": layer.layer,
                "part": layer.part,
                "kind": layer.kind,
                "shape": list(layer.shape),
                "dense_ms": layer.dense_ms,
                "curves": {
                    pattern: {"share": curve.share.tolist(), "ms": curve.ms.tolist()}
                    for pattern, curve in layer.curves.items()
                },
            }
            for layer in profile.layers
        ],
    }


def _parsed(text: str, source: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{source} is no JSON: {error}.", fix=AGAIN) from None
    if not isinstance(data, dict) or "schema" not in data:
        raise UsageError(f"{source} is no profile.", fix=AGAIN)
    if data["schema"] != SCHEMA:
        raise UsageError(f"{source} has schema {data['schema']}; this version reads {SCHEMA}.", fix=AGAIN)
    return data


def _profile(data: Mapping[str, Any]) -> Profile:
    return Profile(
        standing=data["standing"],
        device=str(data["device"]),
        model=str(data["model"]),
        precision=str(data["precision"]),
        voxels=int(data["voxels"]),
        clock=str(data["clock"]),
        band={str(part): None if band is None else float(band) for part, band in data["band"].items()},
        fixed_ms={str(part): float(ms) for part, ms in data["fixed_ms"].items()},
        stamp={str(key): str(value) for key, value in data["stamp"].items()},
        notes=tuple(str(note) for note in data["notes"]),
        layers=tuple(_layer(row) for row in data["layers"]),
    )


def _layer(row: Mapping[str, Any]) -> LayerTimes:
    curves = {
        str(pattern): TimeCurve(share=np.array(curve["share"], np.float64), ms=np.array(curve["ms"], np.float64))
        for pattern, curve in row["curves"].items()
    }
    return LayerTimes(
        layer=str(row["layer"]), part=str(row["part"]), kind=str(row["kind"]),
        shape=tuple(int(size) for size in row["shape"]), dense_ms=float(row["dense_ms"]), curves=curves,
    )  # fmt: skip


def _strict(found: Any, known: Any, source: str) -> None:
    """Refuse keys that were read over: a profile with a word we do not know means something we did not do."""
    if isinstance(found, dict) and isinstance(known, dict):
        for key in found:
            if key not in known:
                raise UsageError(f"{source} has an unknown key '{key}'.", fix=nearest(key, known))
            _strict(found[key], known[key], source)
    elif isinstance(found, list) and isinstance(known, list):
        for one, other in zip(found, known, strict=True):
            _strict(one, other, source)
