"""Profiles of a model: measured on this machine, or estimated for a device that is not here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calib.calibration_set import load_frame, plan_frames
from dm3d_deploy.artifacts import write_json
from dm3d_deploy.config import CenterHeadConfig, DetectorConfig, load_config
from dm3d_deploy.device import Device, device_named, devices_from
from dm3d_deploy.errors import FrameError, UsageError, require
from dm3d_deploy.geometry.voxelize import voxelize
from dm3d_deploy.pointcloud import Voxels
from dm3d_deploy.pruning.contracts import Layer
from dm3d_deploy.pruning.estimate import estimable, estimated_profile
from dm3d_deploy.pruning.profiles import Profile, check_model, profile_as_json, profile_from_text
from dm3d_deploy.recipe import Recipe

if TYPE_CHECKING:
    from dm3d_deploy.models.detector import Detector

HERE = "here"
FRAMES = 2
ESTIMATED = "fp16"  # estimates are of no other precision
Advanced = Callable[[int, int], None]


def read_profile(path: Path) -> Profile:
    """The profile of a file; see `profile_from_text` for what is refused."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UsageError(
            f"the profile {path} cannot be read: {reason}.",
            fix="dm3d-deploy profile --model MODEL --device here -o profile.json writes one",
        ) from None
    return profile_from_text(text, str(path))


def profile_for_build(
    recipe: Recipe, detector: Detector, layers: Sequence[Layer], *, voxels: int, model_name: str
) -> Profile:
    """The profile that a recipe's times are counted in: its file's, or the estimate for its device at `voxels`.

    UsageError where the device is not one, and where file and build differ in layers or precision.
    """
    given = _timed_by(recipe, detector, layers)
    if isinstance(given, Profile):
        return given
    return estimated_profile(layers, cells_read(detector, layers), given, voxels=voxels, model_name=model_name)


def refuse_time_goal(recipe: Recipe) -> None:
    """What `profile_for_build` refuses whatever the frames are, before there are any; nothing where no time counts."""
    if recipe.cost != "latency":
        return
    require("torch", extra="compile")
    from dm3d_deploy.models.detector import build_detector

    detector = build_detector(load_config(recipe.model))
    _timed_by(recipe, detector, bare_layers(detector))


def _timed_by(recipe: Recipe, detector: Detector, layers: Sequence[Layer]) -> Profile | Device:
    """The profile of the recipe's file, or the device to estimate for; UsageError where either does not fit."""
    check_profiled(detector.config)
    named = recipe.profile if recipe.profile is not None else _only_device(recipe.device)
    given: Profile | Device
    if Path(named).suffix == ".json":
        given = read_profile(Path(named))
        check_model(given, layers, recipe.model)
        precision = given.precision
    else:
        given = device_named(named)
        estimable(layers, given)
        precision = ESTIMATED
    if precision != recipe.precision:
        raise UsageError(
            f"the profile's times are {precision}, the build is {recipe.precision}.",
            fix=f"build with --precision {precision}, or profile in {recipe.precision}",
        )
    return given


def check_profiled(config: DetectorConfig) -> None:
    """UsageError for a detector whose layers have no times of their own."""
    if isinstance(config.head, CenterHeadConfig) and config.head.sparse:
        raise UsageError(
            f"there is no profile of {config.name}: nobody published times of a sparse head or of stages added up, and "
            "its layers are not timed one by one here.",
            fix="count multiplications (--cost macs or executed); bench times the whole",
        )


def _only_device(names: str) -> str:
    devices = devices_from(names)
    if len(devices) != 1:
        raise UsageError(
            f"a time is that of one device, and --device {names} means {', '.join(device.name for device in devices)}.",
            fix="name one by --profile NAME, or give a profile's file: --profile profile.json",
        )
    return devices[0].name


def bare_layers(detector: Detector) -> tuple[Layer, ...]:
    """A detector's layers where no frame has told what their taps multiply: each of a sparse layer once."""
    from dm3d_deploy.models.detector import prunable_layers
    from dm3d_deploy.steps.layers import layers_of

    once = {
        layer.name: np.ones(math.prod(layer.weight.shape[1:-1]) if layer.kind == "sparse" else 1)
        for layer in prunable_layers(detector)
    }
    return layers_of(detector, [once])


def cells_read(detector: Detector, layers: Sequence[Layer]) -> dict[str, int]:
    """Map cells that each 2D layer reads, by name: its positions, times its stride where it is a convolution."""
    from torch import nn

    found = {}
    for layer in layers:
        module = detector.get_submodule(layer.name)
        cells = round(float(layer.positions[0]))
        if isinstance(module, nn.Conv2d):
            found[layer.name] = cells * module.stride[0] * module.stride[1]
        elif layer.kind == "deconv2d":
            found[layer.name] = cells
    return found


def profile(
    model: str,
    *,
    device: str,
    out: Path,
    frames: str = "simulated",
    voxels: int | None = None,
    precision: str = "fp16",
    repeats: int = 5,
    seed: int = 0,
    advanced: Advanced | None = None,
) -> Profile:
    """Write the profile of `model` on this machine (`here`), or the estimate for a named device, and return it.

    `voxels` is what an estimate is for; without it, the mean of the frames'. UsageError where the estimate refuses.
    """
    from dm3d_deploy.models.detector import build_detector
    from dm3d_deploy.models.seeded import seed_weights

    if device != HERE:
        device_named(device)  # a mistyped name is told before the work
        if precision != ESTIMATED:
            raise UsageError(f"estimates are fp16, not {precision}.", fix="leave --precision out, or --device here")
    elif voxels is not None:
        raise UsageError("what is measured has the voxels of its frames.", fix="leave --voxels out")
    if repeats < 1:
        raise UsageError(f"--repeats is {repeats}.", fix="give at least 1")
    config = load_config(model)
    check_profiled(config)
    detector = build_detector(config)
    seed_weights(detector, seed)
    if device != HERE:
        estimable(bare_layers(detector), device_named(device))
    clouds = _frames(model, frames, seed)
    layers = _layers(detector, clouds)
    name = Path(model).stem
    if device == HERE:
        from dm3d_deploy.profiling_here import measured_profile

        found = measured_profile(
            detector, layers, clouds[0], model_name=name, precision=precision, repeats=repeats, advanced=advanced
        )
    else:
        count = voxels if voxels is not None else round(float(np.mean([cloud.cells for cloud in clouds])))
        cells = cells_read(detector, layers)
        found = estimated_profile(layers, cells, device_named(device), voxels=count, model_name=name)
    write_json(out, profile_as_json(found))
    return found


def _frames(model: str, source: str, seed: int) -> list[Voxels]:
    config = load_config(model)
    plan = plan_frames(source, dataset=config.dataset, calibration=FRAMES, selection=0, held_out=1, seed=seed)
    chosen = [ref for ref in plan.frames if ref.role == "calibration"]
    found = [voxelize(load_frame(ref), config) for ref in chosen]
    empty = [ref.label for ref, voxels in zip(chosen, found, strict=True) if not len(voxels.coords)]
    if empty:
        raise FrameError(f"{empty[0]} leaves no voxel.", fix="use frames that have points inside the model's range")
    return found


def _layers(detector: Detector, frames: Sequence[Voxels]) -> tuple[Layer, ...]:
    from dm3d_deploy.models.detector import sparse_pair_counts, tensors_from_voxels
    from dm3d_deploy.steps.layers import layers_of

    return layers_of(detector, [sparse_pair_counts(detector, tensors_from_voxels(frame)[1]) for frame in frames])
