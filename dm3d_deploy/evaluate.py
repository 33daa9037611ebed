"""How well a run or a checkpoint detects: in labelled frames, or in simulated scenes that no training saw."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from calib.calibration_set import SENSOR_OF_DATASET
from calib.dataset import open_dataset
from calib.held_out import FIRST_SEED, FIRST_TRAINING_SEED
from calib.labelled_frames import labels_from_arrays, read_labelled
from calib.pool import FrameJob, FramePool
from calib.simulator.sensor import sensor_named
from dm3d_deploy.artifacts import MANIFEST_NAME, disk_errors, write_bytes, write_json
from dm3d_deploy.config import DetectorConfig, detector_names, load_config
from dm3d_deploy.detect import DeployedDetector, load_run
from dm3d_deploy.errors import UsageError, require
from dm3d_deploy.evaluation.benchmarks import benchmark_scores, scored_classes
from dm3d_deploy.evaluation.labels import FrameLabels
from dm3d_deploy.evaluation.rows import ApRow
from dm3d_deploy.held_out_score import detections_from_arrays
from dm3d_deploy.pointcloud import Detections
from dm3d_deploy.reporting.ap_tables import ap_text, draw_curves
from dm3d_deploy.reporting.facts import plural

Advanced = Callable[[int, int], None]
SIMULATED = "simulated"
DEFAULT_FRAMES = 100
MOST_PROCESSES = 8  # one a core: each holds torch and a detector
RESULT_NAME, TEXT_NAME, PICTURE_NAME = "evaluation.json", "evaluation.txt", "precision_recall.png"
SCHEMA = 1
SHOWN = {"kitti": "3d R40", "nuscenes": "centre distance", "once": "3d"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A row for each class, subset and measure, a summary, and what to know about them.

    The summary's values are in percent, errors in m, rad and m/s; None where nothing could be counted.
    """

    subject: str
    data: str
    metric: str
    frames: int
    rows: tuple[ApRow, ...]
    summary: Mapping[str, float | None]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "schema": SCHEMA,
            "subject": self.subject,
            "data": self.data,
            "metric": self.metric,
            "frames": self.frames,
            "summary": dict(self.summary),
            "notes": list(self.notes),
            "rows": [row.as_json() for row in self.rows],
        }

    def as_text(self) -> str:
        """What was evaluated, the summary, the tables and the notes."""
        values = ", ".join(f"{name} {'-' if value is None else f'{value:.2f}'}" for name, value in self.summary.items())
        head = f"{self.subject} on {self.data}: {plural(self.frames, 'frame')}, metric {self.metric}\n{values}\n\n"
        return head + ap_text(self.rows) + "\n" + "".join(f"* {note}\n" for note in self.notes)


def evaluate(
    run_or_checkpoint: Path | str,
    *,
    data: Path | str = SIMULATED,
    metric: str = "nuscenes",
    frames: int | Sequence[str] | None = None,
    out: Path | str | None = None,
    variant: str = "pruned",
    model: str | None = None,
    sensor: str | None = None,
    seed: int | None = None,
    advanced: Advanced | None = None,
) -> Evaluation:
    """AP by class, range and difficulty of a run's graphs (no torch) or of a checkpoint (torch, a process a core).

    `data` is a folder in KITTI's layout, or "simulated": the frames of `seed`, `seed` + 1, ... of `sensor`, by default
    from FIRST_SEED on and of the model's data set. `frames` is how many (default: all of a folder, 100 simulated) or,
    of a folder, their names. `variant` picks a run's graphs; `model` names a checkpoint's configuration where its
    weights fit no built-in model. With `out` that folder gets evaluation.json, evaluation.txt and precision_recall.png.
    `advanced(done, total)` is called after each frame.

    Raises UsageError for an unknown metric, unusable settings, a model that shares no class with the metric and frames
    that hold nothing to find, and what reading the run, the checkpoint and the data raises.
    """
    subject = _subject(Path(run_or_checkpoint), variant=variant, model=model)
    scored_classes(metric, subject.config.class_names)  # refuses before the first frame
    source = _source(data, frames, sensor=sensor, seed=seed, config=subject.config)
    if out is not None:
        with disk_errors(Path(out)):  # before the work, not after it
            Path(out).mkdir(parents=True, exist_ok=True)
    scores = benchmark_scores(metric, *subject.detected(source, advanced))
    result = Evaluation(
        subject=subject.label,
        data=source.label,
        metric=metric,
        frames=source.count,
        rows=scores.rows,
        summary=scores.summary,
        notes=scores.notes,
    )
    if out is not None:
        write_evaluation(Path(out), result)
    return result


def _detected_by_run(
    run: DeployedDetector, source: _Source, advanced: Advanced | None
) -> tuple[list[Detections], list[FrameLabels]]:
    """Detections and labels of every frame; points are let go."""
    found, labels = [], []
    for index in range(source.count):
        frame = read_labelled(source.frames, index)
        found.append(run.detect(frame.cloud))
        labels.append(frame.labels)
        if advanced is not None:
            advanced(index + 1, source.count)
    return found, labels


def _detected_in_torch(
    weights: Path, config: DetectorConfig, source: _Source, advanced: Advanced | None
) -> tuple[list[Detections], list[FrameLabels]]:
    """As `_detected_by_run`, frames drawn and detected in processes of one thread each."""

    def told(done: int, total: int) -> None:
        if advanced is not None and done:
            advanced(done, total)

    with tempfile.TemporaryDirectory() as folder, FramePool(MOST_PROCESSES) as pool:
        job = FrameJob(
            kind="detections",
            config_text=config.text,
            weights=str(weights.resolve()),
            frames_file=None,
            frames=tuple(range(source.count)),
            out_dir=folder,
            settings={"drawn": dict(source.frames)},
        )
        left = [load_file(file) for file in pool.run(job, advanced=told)]
    return [detections_from_arrays(arrays, config) for arrays in left], [labels_from_arrays(arrays) for arrays in left]


def write_evaluation(out: Path, result: Evaluation) -> None:
    """Write evaluation.json, evaluation.txt and precision_recall.png into `out`, each whole."""
    measure = SHOWN[result.metric]
    shown = [row for row in result.rows if row.measure == measure]
    write_json(out / RESULT_NAME, result.as_json())
    write_bytes(out / TEXT_NAME, result.as_text().encode())
    draw_curves(out / PICTURE_NAME, shown, title=f"{result.subject} on {result.data}, {result.metric}, {measure}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
    """What is evaluated."""

    label: str
    config: DetectorConfig
    detected: Callable[[_Source, Advanced | None], tuple[list[Detections], list[FrameLabels]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where the frames come from: `frames` describes them for `read_labelled`."""

    label: str
    count: int
    frames: Mapping[str, Any]


def _subject(path: Path, *, variant: str, model: str | None) -> _Subject:
    if path.is_dir() or path.name == MANIFEST_NAME:
        root = path if path.is_dir() else path.parent
        run = load_run(root, variant=variant)
        trained = "" if run.manifest.trained else ", UNTRAINED"
        model = Path(str(run.manifest.recipe["model"])).stem  # a run's own copy is always model.yaml
        return _Subject(
            label=f"{root.name} ({model}, {variant}{trained})",
            config=run.config,
            detected=partial(_detected_by_run, run),
        )
    require("torch", extra="compile")
    from dm3d_deploy.models.checkpoints import load_checkpoint
    from dm3d_deploy.models.detector import build_detector

    config = load_config(model if model is not None else _fitting_model(path))
    load_checkpoint(build_detector(config), path)  # refuses here, not in every process
    return _Subject(
        label=f"{path.name} ({config.name})", config=config, detected=partial(_detected_in_torch, path, config)
    )


def _fitting_model(path: Path) -> str:
    """The one built-in model whose tensors have the checkpoint's names and numbers of values."""
    from dm3d_deploy.models.checkpoints import read_tensors
    from dm3d_deploy.models.detector import build_detector

    sizes = {name: tensor.numel() for name, tensor in read_tensors(path).items()}
    fits = []
    for name in detector_names():
        state = build_detector(load_config(name)).state_dict()
        if sizes == {key: tensor.numel() for key, tensor in state.items()}:
            fits.append(name)
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise UsageError(
            f"{path} fits {' and '.join(fits)}, which differ in their voxels only.", fix="name it: --model"
        )
    raise UsageError(
        f"{path} fits none of the models {', '.join(detector_names())}.",
        fix="name its configuration: --model NAME or a YAML file",
    )


def _source(
    data: Path | str,
    frames: int | Sequence[str] | None,
    *,
    sensor: str | None,
    seed: int | None,
    config: DetectorConfig,
) -> _Source:
    count = frames if isinstance(frames, int) else None
    if count is not None and count < 1:
        raise UsageError(f"{count} frames show nothing.", fix="use one frame or more")
    if str(data) == SIMULATED:
        if frames is not None and count is None:
            raise UsageError("simulated frames have no names.", fix="give --frames N, and --seed of the first")
        kind = sensor if sensor is not None else SENSOR_OF_DATASET.get(config.dataset, "nuscenes32")
        return _simulated(kind, count or DEFAULT_FRAMES, FIRST_SEED if seed is None else seed)
    for word, given in (("sensor", sensor), ("seed", seed)):
        if given is not None:
            raise UsageError(f"a {word} was given for frames that lie on disk.", fix=f"leave --{word} out")
    folder = open_dataset(data, None if frames is None or isinstance(frames, int) else tuple(frames))
    if count is not None and count > len(folder.names):
        raise UsageError(f"{data} holds {len(folder.names)} frames, not {count}.", fix="ask for fewer frames")
    names = folder.names[:count]
    label = str(data) if folder.info is None else f"{data} (simulated {folder.info.sensor})"
    return _Source(label=label, count=len(names), frames={"folder": str(data), "names": list(names)})


def _simulated(sensor: str, count: int, seed: int) -> _Source:
    sensor_named(sensor)
    if not 0 <= seed <= FIRST_TRAINING_SEED - count:
        raise UsageError(
            f"training may have seen the frames of seed {seed} and after.",
            fix=f"use seeds from 0 to {FIRST_TRAINING_SEED - count}",
        )
    seeds = f"seed {seed}" if count == 1 else f"seeds {seed} to {seed + count - 1}"
    return _Source(
        label=f"simulated {sensor} {seeds}",
        count=count,
        frames={"sensor": sensor, "seed": seed},
    )
