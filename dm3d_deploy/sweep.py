"""Several methods at several targets from the same frames and gradients, each held against frames that chose nothing.

Every point is a run like any other, built up to its recovery: `build` goes on from there. The points share what does
not differ between them as hard links; what one of them writes, it writes as a file of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from calib.pool import FramePool
from dm3d_deploy.artifacts import (
    canonical_json,
    digest_of_bytes,
    digest_of_file,
    disk_errors,
    write_json,
    write_tensors,
)
from dm3d_deploy.build import build
from dm3d_deploy.errors import UsageError, nearest
from dm3d_deploy.progress import Silent, Watch
from dm3d_deploy.recipe import METHODS, Recipe
from dm3d_deploy.stages import RunContext
from dm3d_deploy.steps.frame_work import Maps, distortions, frames_of, outputs_of
from dm3d_deploy.steps.recover import masked_weights

HELD_OUT_NAME = "held_out.json"
SWEPT = tuple(method for method in METHODS if method != "paper-eq13")


def sweep(
    recipe: Recipe,
    *,
    targets: Sequence[float],
    methods: Sequence[str],
    out: Path,
    watch: Watch | None = None,
) -> list[Path]:
    """Build every method at every target below `out` and return the points' folders, methods first.

    `recipe` gives all but the method and the target. Each folder gains held_out.json: the true distortion of each
    held-out frame with the masked and with the recovered weights. The same call goes on with what was interrupted.
    Raises UsageError for methods or targets that are none or double, and what `build` raises.
    """
    _check(targets, methods)
    eye = watch if watch is not None else Silent()
    base = out / "base"
    recipe = replace(recipe, patterns="unstructured", candidates=1)  # others choose among none
    with FramePool() as pool:
        build(replace(recipe, method=methods[0], target=targets[0]), base, last="gradients", watch=eye, pool=pool)
        judge = _Judge(pool)
        points = []
        for method in methods:
            source = base
            for target in targets:
                point = replace(recipe, method=method, target=target)
                folder = out / f"{method}-{target:g}"
                if not (folder / "manifest.json").is_file():
                    share_run(source, folder)
                build(point, folder, last="recover", watch=eye, pool=pool)
                judge.measure(RunContext(root=folder, recipe=point, watch=eye, pool=pool), eye)
                points.append(folder)
                source = folder
    return points


def _check(targets: Sequence[float], methods: Sequence[str]) -> None:
    for name in methods:
        if name not in SWEPT:
            raise UsageError(f"a sweep knows no method '{name}'.", fix=nearest(name, SWEPT))
    for words, values in (("targets", list(targets)), ("methods", list(methods))):
        if not values or len(set(values)) != len(values):
            raise UsageError(f"the {words} {values} are none, or one of them is double.", fix="name each once")


def share_run(source: Path, folder: Path) -> None:
    """The same run in another folder, without copying a byte; files are replaced whole, so links stay apart."""
    partial = folder.with_name(folder.name + ".partial")
    with disk_errors(folder):
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        ignored = shutil.ignore_patterns(".*", HELD_OUT_NAME)
        shutil.copytree(source, partial, copy_function=os.link, ignore=ignored)
        partial.rename(folder)


class _Judge:
    """True distortions on the held-out frames; the dense outputs are computed once for all points."""

    def __init__(self, pool: FramePool) -> None:
        self._pool = pool
        self._dense: list[Maps] | None = None

    def measure(self, run: RunContext, watch: Watch) -> None:
        """Write held_out.json, unless it is of these very weights and frames."""
        kinds = ("dense_weights", "masks", "pruned_weights", "frames", "output_scale")
        content = {kind: digest_of_file(run.path(kind)) for kind in kinds}
        weights = {name: run.recipe.as_json()[name] for name in ("lambda_box", "lambda_score")}
        key = digest_of_bytes(canonical_json({**content, **weights}).encode())
        path = run.root / HELD_OUT_NAME
        if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["key"] == key:
            return
        watch.started("held out", "hold it against frames that chose nothing")
        began = time.perf_counter()
        frames = frames_of(run, "held_out")
        if self._dense is None:
            self._dense = outputs_of(run, run.path("dense_weights"), frames, lambda _: None)
        masked = run.root / "work" / ".masked.safetensors"
        write_tensors(masked, masked_weights(run))
        before = self._distortions(run, masked, frames)
        masked.unlink()
        recovered = json.loads(run.path("recovery").read_text(encoding="utf-8"))["accepted"]
        after = self._distortions(run, run.path("pruned_weights"), frames) if recovered else None
        info = json.loads(run.path("frames_info").read_text(encoding="utf-8"))["frames"]
        labels = [info[frame]["label"] for frame in frames]
        simulated = all(info[frame]["path"] is None for frame in frames)
        row = {"key": key, "frames": labels, "simulated": simulated, "masked": before, "recovered": after}
        write_json(path, row)
        watch.finished("held out", time.perf_counter() - began, False)

    def _distortions(self, run: RunContext, weights: Path, frames: tuple[int, ...]) -> list[float]:
        total = len(frames)
        found = outputs_of(run, weights, frames, lambda done: run.watch.advanced(done, total))
        return distortions(run, self._dense or [], found)
