"""Time the stages of several variants side by side, so that a drift of the machine meets all of them alike."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dm3d_deploy.errors import InternalError, UsageError
from dm3d_deploy.evidence import Latency

TOTAL = "total"
CV_LIMIT = 0.025  # trtexec warns of an unstable measurement above this coefficient of variation
P99_SAMPLES = 1000

Stages = Mapping[str, Callable[[Any], Any]]


def sample(
    variants: Mapping[str, Stages],
    frames: Sequence[Any],
    *,
    warmup: int,
    repeats: int,
    backend: str,
    clock: str = "perf_counter_ns",
    voxels: Sequence[int] = (),
    now_ns: Callable[[], int] = time.perf_counter_ns,
) -> list[Latency]:
    """Milliseconds of each (variant, stage) and of the whole, `repeats` times over every frame.

    The first stage takes a frame, every other one what the stage before it returned. Variants alternate frame by frame
    (A B A B ...) after `warmup` rounds that are not counted. One clock reading ends a stage and starts the next, so the
    stages of a sample sum to its total. `voxels[i]`, where given, is the size of `frames[i]`; `clock` names `now_ns`.
    UsageError where nothing would be measured.
    """
    if not frames or not variants or repeats < 1 or warmup < 0:
        raise UsageError(
            f"nothing to measure: {len(variants)} variants, {len(frames)} frames, {repeats} repeats, {warmup} warm-up.",
            fix="give at least one frame and one repeat, and no negative warm-up",
        )
    for variant, stages in variants.items():
        if not stages or TOTAL in stages:
            raise InternalError(f"{variant}: stages {list(stages)} are empty or named '{TOTAL}'")
    if voxels and len(voxels) != len(frames):
        raise InternalError(f"{len(voxels)} voxel counts for {len(frames)} frames")
    samples: dict[tuple[str, str], list[float]] = {
        (variant, stage): [] for variant, stages in variants.items() for stage in (*stages, TOTAL)
    }
    order = [index % len(frames) for index in range(-warmup, repeats * len(frames))]
    for round_, index in enumerate(order):
        for variant, stages in variants.items():
            times_ms = _run_once(stages, frames[index], now_ns)
            if round_ >= warmup:
                for stage, time_ms in times_ms.items():
                    samples[variant, stage].append(time_ms)
    sizes = tuple(int(voxels[index]) for index in order[warmup:]) if voxels else ()
    return [
        Latency(
            stage=stage, variant=variant, samples_ms=tuple(times), clock=clock, backend=backend, voxels=sizes,
            measured=True,
        )
        for (variant, stage), times in samples.items()
    ]  # fmt: skip


def _run_once(stages: Stages, frame: Any, now_ns: Callable[[], int]) -> dict[str, float]:
    marks = [now_ns()]
    value = frame
    for run in stages.values():
        value = run(value)
        marks.append(now_ns())
    times = {name: (end - start) / 1e6 for name, start, end in zip(stages, marks[:-1], marks[1:], strict=True)}
    return {**times, TOTAL: (marks[-1] - marks[0]) / 1e6}


def latency_warnings(latency: Latency) -> tuple[str, ...]:
    """What a reader must know before using these samples; empty where they are sound.

    The coefficient of variation is taken at equal voxel counts: a stage whose time follows the scene is not unstable.
    """
    warnings = []
    n = len(latency.samples_ms)
    where = f"{latency.variant} {latency.stage}"
    cv = _variation_at_equal_size(latency)
    if math.isnan(cv):
        warnings.append(f"{where}: no input was timed twice, so the noise is unknown")
    elif cv > CV_LIMIT:
        warnings.append(f"{where}: coefficient of variation {cv:.1%} exceeds {CV_LIMIT:.1%}: the machine was not quiet")
    if n < P99_SAMPLES:
        warnings.append(f"{where}: p99 of {n} samples is indicative; it needs {P99_SAMPLES}")
    return tuple(warnings)


def _variation_at_equal_size(latency: Latency) -> float:
    """Pooled standard deviation within groups of equal voxel count, over the mean of all samples."""
    sizes = latency.voxels or (0,) * len(latency.samples_ms)
    groups: dict[int, list[float]] = defaultdict(list)
    for size, time_ms in zip(sizes, latency.samples_ms, strict=True):
        groups[size].append(time_ms)
    squares = sum(float(np.square(np.asarray(group) - np.mean(group)).sum()) for group in groups.values())
    freedom = len(latency.samples_ms) - len(groups)
    mean = float(np.mean(latency.samples_ms))
    if freedom == 0 or mean == 0:
        return math.nan
    return math.sqrt(squares / freedom) / mean
