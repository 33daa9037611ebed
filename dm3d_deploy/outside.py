"""Digests of what lies outside a run and yet decides it: the model's YAML, weights, frames, times, training data."""

from __future__ import annotations

from pathlib import Path

from calib.calibration_set import FramePlan, plan_frames
from dm3d_deploy.artifacts import canonical_json, digest_of_bytes, digest_of_file
from dm3d_deploy.config import DetectorConfig, load_config
from dm3d_deploy.errors import CheckpointError, FrameError, InternalError
from dm3d_deploy.models.bundled import bundled_weights
from dm3d_deploy.profiling import read_profile
from dm3d_deploy.recipe import Recipe


def frame_plan(recipe: Recipe, config: DetectorConfig) -> FramePlan:
    """The frames that a recipe asks for."""
    return plan_frames(
        recipe.frames,
        dataset=config.dataset,
        calibration=recipe.calibration_frames,
        selection=recipe.selection_frames,
        held_out=recipe.held_out_frames,
        seed=recipe.seed,
    )


def outside_digest(name: str, recipe: Recipe) -> str:
    """SHA-256 of one outside input; raises the error of whatever cannot be read."""
    if name == "model":
        return digest_of_bytes(load_config(recipe.model).text.encode())
    if name == "checkpoint":
        if recipe.checkpoint is None:
            bundled = bundled_weights(recipe.model)
            return digest_of_file(bundled) if bundled is not None else "none"
        path = Path(recipe.checkpoint)
        if not path.is_file():
            raise CheckpointError(f"there is no checkpoint {path}.", fix="give the path of a .pth or .safetensors file")
        return digest_of_file(path)
    if name == "start":
        if recipe.start is None:
            return "none"
        if not Path(recipe.start).is_file():
            raise CheckpointError(f"there are no weights {recipe.start} to start from.", fix="build the earlier round")
        return digest_of_file(Path(recipe.start))
    if name == "frames":
        plan = frame_plan(recipe, load_config(recipe.model))
        files = sorted({ref.path for ref in plan.frames if ref.path is not None})
        content = {
            "frames": [ref.as_json() for ref in plan.frames],
            "files": {path: digest_of_file(Path(path)) for path in files},
        }
        return digest_of_bytes(canonical_json(content).encode())
    if name == "recover_data":
        return _training_files(Path(recipe.recover_data)) if recipe.recover_data != "simulated" else "none"
    if name == "profile":
        if recipe.cost != "latency":
            return "none"
        named = recipe.profile or recipe.device
        times = read_profile(Path(named)).digest() if Path(named).suffix == ".json" else named
        return f"{times} {recipe.precision}"  # times of one precision serve no other
    raise InternalError(f"no outside input is called '{name}'")


def _training_files(folder: Path) -> str:
    """By what labels say and by names and sizes of all else: a data set's points take minutes to read."""
    if not folder.is_dir():
        raise FrameError(f"there is no folder {folder} to learn from.", fix="give a folder to --recover-data")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    told = {
        path.relative_to(folder).as_posix(): digest_of_file(path) if path.suffix == ".txt" else path.stat().st_size
        for path in files
    }
    return digest_of_bytes(canonical_json(told).encode())
