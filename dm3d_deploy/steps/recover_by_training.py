"""The steps of recovery that train: distillation without labels, fine-tuning with them, zeros held by the masks.

In one thread, so that a recipe gives the same bits on any number of cores; with the statistics of batch norms as they
are, since those of a few crops would be worse.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load_file

from dm3d_deploy.config import DetectorConfig, load_config
from dm3d_deploy.pruning.masks import masked_state
from dm3d_deploy.recipe import Recipe
from dm3d_deploy.stages import RunContext
from dm3d_deploy.train_plan import MASKED_SHARE, PEAK_RATE, SIMULATED

if TYPE_CHECKING:
    from dm3d_deploy.models.detector import Detector
    from dm3d_deploy.training.batch import Batch, BatchSource
    from dm3d_deploy.training.loop import TrainSettings

# Adam's steps do not shrink with the gradient, and behind a refit little is left to learn: ten times this undid the
# refit of centerpoint at 0.3 (distortion .0045 to .036 in 400 steps).
DISTILL_RATE = 2e-5
CROPS = 2
JUDGING = 8  # batches
JUDGE = 1  # the rank whose scenes no training in one process draws


def distilled(run: RunContext, weights: Path, advanced: Callable[[int], None]) -> dict[str, np.ndarray]:
    """The masked weights of a file behind `recover_steps` of distillation from the dense detector."""
    from dm3d_deploy.training.distill import distil

    config = load_config(run.path("model_config"))
    student, teacher = _detector(config, weights), _detector(config, run.path("dense_weights"))
    batches, masks = _told(_unlabelled(run.recipe, config), advanced, run), load_file(run.path("masks"))
    with _alone(run) as folder:
        distil(student, teacher, batches, _settings(run, DISTILL_RATE), out=folder, masks=masks)
    return _state(student, masks)


def fine_tuned(
    run: RunContext, weights: Path, advanced: Callable[[int], None]
) -> tuple[dict[str, np.ndarray], list[float], list[float]]:
    """The masked weights of a file behind `recover_steps` with labels, and their losses on other scenes' crops.

    Those come first before, then after: a loss each of the same few batches, of scenes or frames not trained on.
    """
    from dm3d_deploy.training.distill import zeros_held
    from dm3d_deploy.training.loop import train_detector

    config = load_config(run.path("model_config"))
    detector, masks = _detector(config, weights), load_file(run.path("masks"))
    teaching, judging = _labelled(run.recipe, config)
    with _alone(run) as folder:
        before = _losses(detector, judging)
        train_detector(
            detector, _told(teaching, advanced, run), _settings(run, PEAK_RATE * MASKED_SHARE), out=folder,
            after_step=zeros_held(detector, masks),
        )  # fmt: skip
        after = _losses(detector, judging)
    return _state(detector, masks), before, after


def _detector(config: DetectorConfig, weights: Path) -> Detector:
    from dm3d_deploy.models.checkpoints import load_checkpoint
    from dm3d_deploy.models.detector import build_detector

    detector = build_detector(config)
    load_checkpoint(detector, weights)
    return detector


def _settings(run: RunContext, peak_rate: float) -> TrainSettings:
    from dm3d_deploy.training.loop import TrainSettings
    from dm3d_deploy.training.schedule import OneCycle

    cycle = OneCycle(peak_rate=peak_rate)
    return TrainSettings(steps=run.recipe.recover_steps, cycle=cycle, half_2d=False, frozen_norms=True)


def _unlabelled(recipe: Recipe, config: DetectorConfig) -> BatchSource:
    from calib.folder_crops import FolderCrops
    from calib.training_folder import open_unlabelled
    from calib.training_frames import SimulatedCrops

    if recipe.recover_data == SIMULATED:
        return SimulatedCrops(config, seed=recipe.seed, crops=CROPS)
    folder = open_unlabelled(recipe.recover_data, config)
    return FolderCrops(folder, tuple(folder.paths), seed=recipe.seed, crops=CROPS)


def _labelled(recipe: Recipe, config: DetectorConfig) -> tuple[BatchSource, BatchSource]:
    """What teaches, and what judges: other simulated scenes, or the frames that the folder holds back."""
    from calib.folder_crops import FolderCrops
    from calib.training_folder import open_labelled
    from calib.training_frames import SimulatedCrops
    from dm3d_deploy.live_score import split_names

    if recipe.recover_data == SIMULATED:
        teaching, judging = (SimulatedCrops(config, seed=recipe.seed, rank=rank, crops=CROPS) for rank in (0, JUDGE))
        return teaching, judging
    folder = open_labelled(recipe.recover_data, config)
    taught, judged = (
        FolderCrops(folder, names, seed=recipe.seed, crops=CROPS) for names in split_names(tuple(folder.paths))
    )
    return taught, judged


def _losses(detector: Detector, batches: BatchSource) -> list[float]:
    import torch

    from dm3d_deploy.training.loop import labelled_losses

    losses = labelled_losses(detector.eval(), half_2d=False)
    with torch.no_grad():
        return [float(torch.stack(list(losses(batches(step)).values())).sum()) for step in range(JUDGING)]


def _told(batches: BatchSource, advanced: Callable[[int], None], run: RunContext) -> BatchSource:
    def batch_of(step: int) -> Batch:
        advanced(min(step, run.recipe.recover_steps))
        return batches(step)

    return batch_of


@contextlib.contextmanager
def _alone(run: RunContext) -> Iterator[Path]:
    """One thread, and a folder for the training's state that is gone behind it."""
    import torch

    from dm3d_deploy.training.loop import TrainingDiverged

    folder, threads = run.root / "work" / ".training", torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield folder
    except TrainingDiverged as error:  # its own fix is of settings that a build does not have
        fix = "recover without training (--recover reconstruct), or check the frames"
        raise TrainingDiverged(error.what, fix=fix, step=error.step) from None
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(folder, ignore_errors=True)


def _state(detector: Detector, masks: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return masked_state({name: value.numpy() for name, value in detector.state_dict().items()}, masks)
