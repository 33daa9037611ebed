"""The runner: does what is not done yet, in the order of STAGES, and remembers it in the manifest alone."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from calib.pool import FramePool
from dm3d_deploy import __version__
from dm3d_deploy.artifacts import (
    MANIFEST_NAME,
    Manifest,
    Step,
    artifact_of,
    canonical_json,
    digest_of_bytes,
    digest_of_file,
    disk_errors,
    read_manifest,
    write_manifest,
)
from dm3d_deploy.beforehand import refuse_beforehand
from dm3d_deploy.errors import Dm3dError, InternalError, StaleArtifact, UsageError, VerificationFailed, nearest
from dm3d_deploy.measurements import MEASUREMENTS_NAME, Measurements, read_measurements, write_measurements
from dm3d_deploy.outside import outside_digest
from dm3d_deploy.progress import Silent, Watch
from dm3d_deploy.recipe import Recipe, recipe_from_mapping
from dm3d_deploy.stages import FILES, STAGE_NAMES, STAGES, RunContext, Stage

TOOLS = ("numpy", "torch", "onnx", "onnxruntime", "safetensors")
PACKAGES = ("calib", "dm3d_deploy", "engines", "exporters")


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What would happen to one stage, and why."""

    stage: str
    fresh: bool
    reason: str


def default_out(recipe: Recipe) -> Path:
    """Where a build goes when nobody says: runs/MODEL-GOAL."""
    return Path("runs") / f"{Path(recipe.model).stem}-{recipe.goal}"


def build(
    recipe: Recipe,
    out: Path | None = None,
    *,
    first: str | None = None,
    last: str | None = None,
    watch: Watch | None = None,
    pool: FramePool | None = None,
) -> Manifest:
    """Build `recipe` into the folder `out` and return its manifest.

    Stages whose inputs, recipe fields and tool versions are those of the last time are skipped; `first` forces that
    stage and all after it, `last` stops behind a stage, `pool` works for several builds in a row. Raises
    VerificationFailed when the comparison of the deployed pipeline with the detector failed (the report is written
    first), and the errors of each stage.
    """
    root = out if out is not None else default_out(recipe)
    wanted = _window(first, last)
    eye: Watch = watch if watch is not None else Silent()
    refuse_beforehand(recipe)  # told before minutes of work, and leaves no folder
    _refuse_foreign_folder(root, recipe)
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    with _locked(root), contextlib.nullcontext(pool) if pool is not None else FramePool() as workers:
        for leftover in list(root.rglob("*.partial")):
            _remove(leftover)
        book = _Book.open(root, recipe)
        try:
            _run_stages(book, wanted, first is not None, eye, workers)
        except Dm3dError:
            book.leave_no_trace()
            raise
        _raise_if_refuted(root, wanted[-1])
        return book.manifest


def _run_stages(book: _Book, wanted: tuple[str, ...], forced: bool, eye: Watch, pool: FramePool) -> None:
    for stage in STAGES[: STAGE_NAMES.index(wanted[-1]) + 1]:
        started = time.perf_counter()
        if not (forced and stage.name in wanted) and book.fresh(stage) is None:
            book.drop_consumed(stage)
            eye.finished(stage.name, 0.0, True)
            continue
        eye.started(stage.name, stage.says)
        book.run(stage, eye, pool)
        book.forget_stale_after(stage)
        seconds = time.perf_counter() - started
        book.record_seconds(stage.name, seconds)
        eye.finished(stage.name, seconds, False)


def plan(
    recipe: Recipe, out: Path | None = None, *, first: str | None = None, last: str | None = None
) -> list[Planned]:
    """What `build` would do, without doing it."""
    root = out if out is not None else default_out(recipe)
    wanted = _window(first, last)
    refuse_beforehand(recipe)
    for name in ("checkpoint", "frames"):  # a plan for what cannot start would be none
        outside_digest(name, recipe)
    _refuse_foreign_folder(root, recipe)
    book = _Book.open(root, recipe)
    rows: list[Planned] = []
    stale = False
    for stage in STAGES[: STAGE_NAMES.index(wanted[-1]) + 1]:
        if first is not None and stage.name in wanted:
            reason: str | None = "asked for by --from"
        elif stale:
            reason = "an earlier stage will run"
        else:
            reason = book.fresh(stage)
        stale = stale or reason is not None
        rows.append(Planned(stage=stage.name, fresh=reason is None, reason=reason or "up to date"))
    return rows


def _window(first: str | None, last: str | None) -> tuple[str, ...]:
    for name in (first, last):
        if name is not None and name not in STAGE_NAMES:
            raise UsageError(f"there is no stage '{name}'.", fix=nearest(name, STAGE_NAMES))
    begin = STAGE_NAMES.index(first) if first else 0
    end = STAGE_NAMES.index(last) if last else len(STAGE_NAMES) - 1
    if begin > end:
        raise UsageError(f"--from {first} comes after --to {last}.", fix="swap them")
    return STAGE_NAMES[begin : end + 1]


def _refuse_foreign_folder(root: Path, recipe: Recipe) -> None:
    with disk_errors(root):
        if root.exists() and not root.is_dir():
            raise UsageError(f"{root} is a file.", fix="give a folder to --out")
        names = {path.name for path in root.iterdir()} if root.is_dir() else set()
    if names <= {".lock"}:
        return
    if MANIFEST_NAME not in names:
        raise UsageError(f"{root} holds files that are not a run.", fix="give an empty or new folder to --out")
    manifest = read_manifest(root)
    built = str(manifest.recipe.get("model", ""))
    if manifest.steps and Path(built).stem != Path(recipe.model).stem:
        raise UsageError(f"{root} holds a build of '{built}', not of '{recipe.model}'.", fix="give another --out")


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    with disk_errors(root / ".lock"):
        handle = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another build is running in {root}.", fix="wait for it, or give another --out") from None
        yield
    finally:
        os.close(handle)


def tool_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Installed versions by package name; 'absent' where there is none."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def source_digest() -> str:
    """SHA-256 over our own source files: a build made by other code is not up to date, whatever its version says."""
    lines = []
    for package in PACKAGES:
        folder = Path(str(importlib.import_module(package).__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            lines.append(f"{package}/{path.relative_to(folder).as_posix()} {digest_of_file(path)}")
    return digest_of_bytes("\n".join(lines).encode())


def _raise_if_refuted(root: Path, last: str) -> None:
    if STAGE_NAMES.index(last) < STAGE_NAMES.index("verify"):
        return
    parity = json.loads((root / FILES["verification"]).read_text(encoding="utf-8"))["parity"]
    failed = [row for row in parity if not row["passed"]]
    if failed or not parity:
        names = ", ".join(f"{row['output']} ({row['candidate']})" for row in failed[:5]) or "nothing was compared"
        raise VerificationFailed(
            f"{len(failed)} of {len(parity)} comparisons of the deployed pipeline with the detector failed: {names}.",
            fix=f"see the parity table in {root / FILES['report_page']}; --precision fp32 tells rounding from error",
        )


@dataclass(slots=True)
class _Book:
    """The run's two ledgers: manifest.json (reproducible) and measurements.json (what varies)."""

    root: Path
    recipe: Recipe
    manifest: Manifest
    measurements: Measurements

    @classmethod
    def open(cls, root: Path, recipe: Recipe) -> _Book:
        tools = {"dm3d-deploy": f"{__version__}+{source_digest()[:12]}", **tool_versions(TOOLS)}
        steps: tuple[Step, ...] = ()
        if (root / MANIFEST_NAME).is_file():
            steps = read_manifest(root).steps
        manifest = Manifest(recipe=recipe.as_json(), tools=tools, steps=steps, trained=_trained(root))
        return cls(root=root, recipe=recipe, manifest=manifest, measurements=read_measurements(root))

    def step(self, name: str) -> Step | None:
        return self.manifest.step(name) or self.measurements.step(name)

    def key(self, stage: Stage) -> str:
        """Digest of everything the stage's result depends on."""
        inputs = {}
        for kind in stage.reads:
            step = self.step(_producer(kind).name)
            inputs[kind] = [a.digest for a in step.outputs if a.kind == kind] if step else []
        recipe = self.recipe.as_json()
        content: Mapping[str, Any] = {
            "stage": stage.name,
            "inputs": inputs,
            "recipe": {name: recipe[name] for name in stage.recipe},
            "outside": {name: outside_digest(name, self.recipe) for name in stage.outside},
            "tools": {**self.manifest.tools, **tool_versions(stage.tools)},
        }
        return digest_of_bytes(canonical_json(content).encode())

    def fresh(self, stage: Stage) -> str | None:
        """None when nothing has to be done, else the reason to run."""
        step = self.step(stage.name)
        if step is None:
            return "not done yet"
        if step.key != self.key(stage):
            return "an input, a setting or a tool changed"
        for artifact in step.outputs:
            path = self.root / artifact.path
            if not path.is_file():
                if stage.transient and self._consumed(stage):
                    continue
                return f"{artifact.path} is missing"
            if path.stat().st_size != artifact.bytes or digest_of_file(path) != artifact.digest:
                return f"{artifact.path} was changed"
        return None

    def _consumed(self, stage: Stage) -> bool:
        consumer = STAGES[STAGE_NAMES.index(stage.name) + 1]
        return self.fresh(consumer) is None

    def run(self, stage: Stage, watch: Watch, pool: FramePool) -> None:
        context = RunContext(root=self.root, recipe=self.recipe, watch=watch, pool=pool)
        self._forget(stage)
        for kind in (*stage.writes, *stage.optional):
            path = self.root / FILES[kind]
            if kind in stage.optional or path.is_dir():  # what an earlier recipe left must not count as made now
                _remove(path)
        _entry(stage)(context)
        outputs = []
        for kind in (*stage.writes, *stage.optional):
            path = self.root / FILES[kind]
            files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
            if not files and kind in stage.writes:
                raise InternalError(f"the stage '{stage.name}' left no {FILES[kind]}")
            outputs += [artifact_of(self.root, str(file.relative_to(self.root)), kind) for file in files]
        self._remember(stage, Step(name=stage.name, key=self.key(stage), outputs=tuple(outputs)))
        self.drop_consumed(stage)

    def forget_stale_after(self, stage: Stage) -> None:
        """Forget later steps that do not follow from this one any more: their files are another recipe's."""
        for later in STAGES[STAGE_NAMES.index(stage.name) + 1 :]:
            step = self.step(later.name)
            if step is not None and "frames" not in later.outside and step.key != self.key(later):
                self._forget(later)

    def leave_no_trace(self) -> None:
        """Take back a folder in which no stage was ever finished."""
        if self.manifest.steps:
            return
        for name in (MANIFEST_NAME, MEASUREMENTS_NAME, ".lock"):
            _remove(self.root / name)
        with contextlib.suppress(OSError):  # whatever else lies there stays
            self.root.rmdir()

    def check_inputs(self, stage: Stage) -> None:
        """StaleArtifact unless every file that the stage reads is there and is the one recorded."""
        for kind in stage.reads:
            producer = _producer(kind)
            step = self.step(producer.name)
            if step is None:
                raise StaleArtifact(
                    f"{self.root} has not finished the stage '{producer.name}'.", fix="run the build to its end"
                )
            for artifact in step.outputs:
                if artifact.kind == kind:
                    artifact.checked(self.root)

    def _forget(self, stage: Stage) -> None:
        self._write(stage, tuple(s for s in self._steps(stage) if s.name != stage.name))

    def _remember(self, stage: Stage, step: Step) -> None:
        order = {name: index for index, name in enumerate(STAGE_NAMES)}
        self._write(stage, tuple(sorted((*self._steps(stage), step), key=lambda s: order[s.name])))

    def _steps(self, stage: Stage) -> tuple[Step, ...]:
        return self.manifest.steps if stage.reproducible else self.measurements.steps

    def _write(self, stage: Stage, steps: tuple[Step, ...]) -> None:
        if stage.reproducible:
            old = self.manifest
            self.manifest = Manifest(recipe=old.recipe, tools=old.tools, steps=steps, trained=_trained(self.root))
        else:
            self.measurements = self.measurements.with_steps(steps)
            write_measurements(self.root, self.measurements)
        write_manifest(self.root, self.manifest)

    def drop_consumed(self, stage: Stage) -> None:
        """Delete the transient files that this finished stage was the last to read."""
        index = STAGE_NAMES.index(stage.name)
        if index and STAGES[index - 1].transient:
            for kind in STAGES[index - 1].writes:
                path = self.root / FILES[kind]
                if path.is_dir():
                    _remove(path)

    def record_seconds(self, name: str, seconds: float) -> None:
        self.measurements = self.measurements.with_seconds(name, seconds)
        write_measurements(self.root, self.measurements)


def _producer(kind: str) -> Stage:
    return next(stage for stage in STAGES if kind in stage.writes or kind in stage.optional)


def _trained(root: Path) -> bool:
    """What model.json says; a damaged one is written again by its stage, so here it says no."""
    path = root / FILES["model_info"]
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["trained"]) if path.is_file() else False
    except (ValueError, KeyError, TypeError):
        return False


def _remove(path: Path) -> None:
    with disk_errors(path):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _entry(stage: Stage) -> Callable[[RunContext], None]:
    module, function = stage.run.split(":")
    entry: Callable[[RunContext], None] = getattr(importlib.import_module(module), function)
    return entry


def rerun(
    root: Path, names: tuple[str, ...], *, changes: Mapping[str, Any] | None = None, watch: Watch | None = None
) -> Manifest:
    """Run single stages of a finished run again, without looking at what lies outside it (so: on the vehicle too).

    `changes` are recipe fields that no stage's freshness depends on, such as `bench_repeats`.
    """
    manifest = read_manifest(root)
    recipe = recipe_from_mapping({**manifest.recipe, **(changes or {})})
    eye: Watch = watch if watch is not None else Silent()
    with _locked(root), FramePool() as pool:
        # The manifest stays as it was built: neither this machine's packages nor the changes are part of its identity.
        book = _Book(root=root, recipe=recipe, manifest=manifest, measurements=read_measurements(root))
        for name in names:
            stage = STAGES[STAGE_NAMES.index(name)]
            book.check_inputs(stage)
            started = time.perf_counter()
            eye.started(stage.name, stage.says)
            book.run(stage, eye, pool)
            seconds = time.perf_counter() - started
            book.record_seconds(stage.name, seconds)
            eye.finished(stage.name, seconds, False)
        return book.manifest
