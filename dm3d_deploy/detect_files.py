"""Detection over files: every frame gets NAME.json, NAME.txt and NAME.png. It imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from calib.readers import describe, list_frames, read_points
from dm3d_deploy.artifacts import MANIFEST_NAME
from dm3d_deploy.detect import DeployedDetector, detect_timed, load_run, refuted_outputs
from dm3d_deploy.errors import UsageError
from dm3d_deploy.measurements import MEASUREMENTS_NAME
from dm3d_deploy.pointcloud import Boxes3D, Detections
from dm3d_deploy.reporting.bev_picture import draw_bev
from dm3d_deploy.reporting.detection_files import write_detections, write_kitti_text
from dm3d_deploy.stages import FILES

ENDINGS = {"json": ".json", "text": ".txt", "picture": ".png"}
UNTRAINED = "UNTRAINED weights: these detections mean nothing"
UNVERIFIED = "NOT VERIFIED: this build has not compared its graphs with the detector; run it to its end"


def detect_files(
    run: Path,
    frames: Sequence[Path],
    *,
    out: Path,
    variant: str = "pruned",
    min_score: float = 0.0,
    say: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Detect in every frame of `frames` (files and folders) and write each one's results into `out`.

    Returns one row per frame: counts, milliseconds, the cut-off range in metres if the model's cap dropped voxels, and
    the files. `say` gets the same in words. Before the first frame is read it raises UsageError for two frames that
    would share their results' name or results that would replace the run's own files, and what `load_run` raises.
    A FrameError ends the work and leaves the results of the frames before it.
    """
    if not 0 <= min_score <= 1:
        raise UsageError(f"the least score {min_score} is not in [0, 1].", fix="for example --min-score 0.3")
    targets = _targets(run, [path for given in frames for path in list_frames(given)], out)
    detector = load_run(run, variant=variant)
    tell = say if say is not None else _silent
    if not detector.manifest.trained:
        tell(UNTRAINED)
    refuted = refuted_outputs(run, detector.manifest)
    if refuted is None:
        tell(UNVERIFIED)
    elif refuted:
        tell(f"NOT PASSED: this run's graphs do not compute what its detector computes: {', '.join(refuted)}")
    rows = []
    for path, stem in targets:
        row = _detect_one(detector, path, stem, min_score, tell)
        rows.append(row)
        tell(_sentence(row))
    return rows


def _silent(text: str) -> None:
    pass


def _targets(run: Path, frames: Sequence[Path], out: Path) -> list[tuple[Path, Path]]:
    """Each frame with its results' path up to the ending; a frame given twice is detected once."""
    of_run = {(run / name).resolve() for name in (*FILES.values(), MANIFEST_NAME, MEASUREMENTS_NAME)}
    owners: dict[Path, Path] = {}
    for path in frames:
        target = out / path.stem
        owner = owners.setdefault(target, path)
        if owner.resolve() != path.resolve():
            raise UsageError(
                f"{owner} and {path} would both be written as {target}{ENDINGS['json']}.",
                fix="detect them one after the other, each with its own --out",
            )
        for ending in ENDINGS.values():
            if _with_ending(target, ending).resolve() in of_run:
                raise UsageError(
                    f"the results of {path} would replace {target}{ending}, a file of the run.",
                    fix="give an --out outside the run",
                )
    return [(path, target) for target, path in owners.items()]


def _with_ending(target: Path, ending: str) -> Path:
    return target.with_name(target.name + ending)  # with_suffix would eat the end of a name such as LIDAR_TOP.pcd


def _detect_one(
    detector: DeployedDetector, path: Path, target: Path, min_score: float, tell: Callable[[str], None]
) -> dict[str, Any]:
    cloud = read_points(path)
    tell(describe(cloud))
    found, voxels, ms = detect_timed(detector, cloud)
    found = _at_least(found, min_score)
    files = {kind: _with_ending(target, ending) for kind, ending in ENDINGS.items()}
    title = f"{path.name}: {Path(str(detector.manifest.recipe['model'])).stem}, {detector.variant}"
    write_detections(files["json"], found, frame=path.name, moving=detector.config.estimates_velocity)
    write_kitti_text(files["text"], found)
    draw_bev(
        files["picture"],
        cloud,
        found,
        title=title if detector.manifest.trained else f"{title}, UNTRAINED",
        range_m=_view_m(detector),
    )
    return {
        "frame": str(path),
        "points": len(cloud.points),
        "columns": list(cloud.columns),
        "voxels": voxels.cells,
        "dropped_voxels": voxels.dropped,
        "cutoff_m": voxels.cutoff_m if math.isfinite(voxels.cutoff_m) else None,
        "detections": len(found),
        "ms": round(ms, 3),
        "trained": detector.manifest.trained,
        "files": {kind: str(file) for kind, file in files.items()},
    }


def _at_least(found: Detections, min_score: float) -> Detections:
    kept = found.scores >= min_score
    boxes = found.boxes
    return Detections(
        boxes=Boxes3D(
            centre=boxes.centre[kept], size=boxes.size[kept], yaw=boxes.yaw[kept], velocity=boxes.velocity[kept]
        ),
        scores=found.scores[kept],
        labels=found.labels[kept],
        class_names=found.class_names,
    )


def _view_m(detector: DeployedDetector) -> float:
    """The half side of a square that holds the model's range."""
    limits = detector.config.voxels.point_range_m
    return max(abs(limits[axis]) for axis in (0, 1, 3, 4))


def _sentence(row: dict[str, Any]) -> str:
    boxes = f"{row['detections']} {'box' if row['detections'] == 1 else 'boxes'}"
    text = f"  {boxes} from {row['voxels']} voxels in {row['ms']:.0f} ms -> {', '.join(row['files'].values())}"
    if row["cutoff_m"] is not None:
        text += f"\n  ! {row['dropped_voxels']} voxels beyond {row['cutoff_m']:.1f} m were dropped: the model's cap"
    return text
