"""Files that are written whole or not at all, and the manifest that is a build's only memory."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dm3d_deploy.errors import OutputError, StaleArtifact, UsageError

if TYPE_CHECKING:
    import numpy as np

SCHEMA = 1
HASH_CHUNK_BYTES = 1 << 20


def digest_of_bytes(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file, read in chunks."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            sha.update(chunk)
    return sha.hexdigest()


def canonical_json(value: Any) -> str:
    """JSON whose bytes depend on the value alone; NaN and infinities are refused."""
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk, or any other refusal of the file system, into one sentence."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: ("the disk is full", "free some space or choose another folder"),
            errno.EDQUOT: ("the disk quota is used up", "free some space or choose another folder"),
            errno.EROFS: ("the file system is read-only", "choose a folder that can be written"),
            errno.EACCES: ("permission was denied", "choose a folder that you may write to"),
            errno.EPERM: ("permission was denied", "choose a folder that you may write to"),
            errno.EFBIG: ("the limit on the size of a file was reached", "raise the limit (ulimit -f)"),
            errno.ENOTDIR: ("a parent is a file, not a folder", "choose another folder"),
            errno.EEXIST: ("a parent is a file, not a folder", "choose another folder"),
            errno.EISDIR: ("it is a folder", "choose another name"),
        }
        if error.errno is None:
            raise
        what, fix = reasons.get(error.errno, (os.strerror(error.errno).lower(), "choose another folder"))
        raise OutputError(f"{path} could not be written: {what}.", fix=fix) from error


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill `path.partial`, then make it `path` in one step: a reader sees the old file or the new one."""
    _write_together({path: write})


def _write_together(writes: Mapping[Path, Callable[[Path], None]]) -> None:
    partials = {path: path.with_name(path.name + ".partial") for path in writes}
    for path in writes:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
    try:
        for path, write in writes.items():
            with disk_errors(path):
                write(partials[path])
                with partials[path].open("rb+") as file:
                    os.fsync(file.fileno())
        for path, partial in partials.items():
            with disk_errors(path):
                partial.replace(path)
    except BaseException:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes whole."""
    write_all({path: data})


def write_all(contents: Mapping[Path, bytes]) -> None:
    """Write files that belong together: none takes its name before all are on the disk, so a full one keeps the old."""
    _write_together({path: _writer_of(data) for path, data in contents.items()})


def _writer_of(data: bytes) -> Callable[[Path], None]:
    return lambda partial: _write_bytes(partial, data)


def _write_bytes(partial: Path, data: bytes) -> None:
    partial.write_bytes(data)


def write_tensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as safetensors, whole.

    safetensors writes an array's memory as it lies under the array's shape: one in any other order than C's, as weights
    come from a training in channels_last, would be read back scrambled.
    """
    import numpy as np
    from safetensors.numpy import save

    write_bytes(path, save({name: np.asarray(array, order="C") for name, array in arrays.items()}))


def write_json(path: Path, value: Any) -> None:
    """Write canonical JSON whole."""
    write_bytes(path, canonical_json(value).encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """One file of a run: its path relative to the run, what it is, its SHA-256 and its size."""

    path: str
    kind: str
    digest: str
    bytes: int

    def __post_init__(self) -> None:
        if Path(self.path).is_absolute() or ".." in Path(self.path).parts:
            raise StaleArtifact(f"the manifest names a file outside its run: {self.path}.", fix="rebuild the run")

    def checked(self, root: Path) -> Path:
        """The file's path, after its bytes were found to be those recorded."""
        path = root / self.path
        if not path.is_file():
            raise StaleArtifact(f"{path} is missing.", fix="run the build again: it makes only what is missing")
        found = digest_of_file(path)
        if found != self.digest:
            raise StaleArtifact(
                f"{path} is not the file that was built: expected sha256 {self.digest[:12]}…, found {found[:12]}….",
                fix="run the build again, or restore the file",
            )
        return path


def artifact_of(root: Path, path: str, kind: str) -> Artifact:
    """Record a file that lies under `root`."""
    file = root / path
    return Artifact(path=path, kind=kind, digest=digest_of_file(file), bytes=file.stat().st_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """An ONNX file and its interface: tensor name -> (element type, shape).

    `rounded_to_zero` counts weights other than zero that became zero in the graph's precision.
    """

    artifact: Artifact
    inputs: Mapping[str, tuple[str, tuple[int, ...]]]
    outputs: Mapping[str, tuple[str, tuple[int, ...]]]
    opset: int
    rounded_to_zero: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A built engine. `ran_here` is false until a device of this machine executed it."""

    artifact: Artifact
    backend: str
    version: str
    built_for: tuple[str, ...]
    precision: str
    layers: int
    ran_here: bool

    @property
    def standing(self) -> str:
        """What may be said of it."""
        return "ran here" if self.ran_here else "built, not run here"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One finished stage: the key that decides freshness, and what it left."""

    name: str
    key: str
    outputs: tuple[Artifact, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        files = [{"path": a.path, "kind": a.kind, "sha256": a.digest, "bytes": a.bytes} for a in self.outputs]
        return {"name": self.name, "key": self.key, "outputs": files}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Step:
        """The inverse; KeyError and TypeError tell a broken record."""
        outputs = tuple(
            Artifact(path=str(a["path"]), kind=str(a["kind"]), digest=str(a["sha256"]), bytes=int(a["bytes"]))
            for a in data["outputs"]
        )
        return cls(name=str(data["name"]), key=str(data["key"]), outputs=outputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The reproducible identity of a run: recipe, tool versions, and every step's files. It holds no times."""

    recipe: Mapping[str, Any]
    tools: Mapping[str, str]
    steps: tuple[Step, ...]
    trained: bool
    schema: int = SCHEMA

    def step(self, name: str) -> Step | None:
        """A finished step by name."""
        return next((step for step in self.steps if step.name == name), None)

    def artifact(self, kind: str) -> Artifact:
        """The one file of a kind."""
        found = [artifact for step in self.steps for artifact in step.outputs if artifact.kind == kind]
        if len(found) != 1:
            raise StaleArtifact(
                f"the run holds {len(found)} files of the kind '{kind}' where one was expected.",
                fix="run the build to its end",
            )
        return found[0]

    def as_json(self) -> dict[str, Any]:
        """Plain data for manifest.json."""
        return {
            "schema": self.schema,
            "trained": self.trained,
            "recipe": dict(self.recipe),
            "tools": dict(self.tools),
            "steps": [step.as_json() for step in self.steps],
        }


MANIFEST_NAME = "manifest.json"


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write manifest.json whole."""
    write_json(root / MANIFEST_NAME, manifest.as_json())


def read_manifest(root: Path) -> Manifest:
    """Read manifest.json, refusing what this version cannot mean."""
    path = root / MANIFEST_NAME
    if not path.is_file():
        raise UsageError(
            f"{root} holds no {MANIFEST_NAME}: it is not a finished run.", fix="dm3d-deploy build ... --out DIR"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise StaleArtifact(
                f"{path} has schema {data['schema']}; this version reads {SCHEMA}.",
                fix="build with this version into another --out",
            )
        steps = tuple(Step.from_json(step) for step in data["steps"])
        return Manifest(recipe=data["recipe"], tools=data["tools"], steps=steps, trained=bool(data["trained"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__} {error}"
        raise StaleArtifact(
            f"{path} is not a manifest: {reason}.", fix="restore it, or delete the folder and build again"
        ) from None
