"""What can be refused before anything runs: whatever no frame and no weight decides."""

from __future__ import annotations

from dm3d_deploy.config import DetectorConfig, load_config
from dm3d_deploy.device import devices_from
from dm3d_deploy.errors import require
from dm3d_deploy.outside import outside_digest
from dm3d_deploy.profiling import refuse_time_goal
from dm3d_deploy.recipe import Recipe


def refuse_beforehand(recipe: Recipe) -> None:
    """Raise what a build of the recipe would end with: its model, devices, times, voxel stages, data to learn from."""
    config = load_config(recipe.model)
    devices_from(recipe.device)
    refuse_time_goal(recipe)
    _refuse_stages(recipe, config)
    _refuse_data(recipe, config)


def _refuse_stages(recipe: Recipe, config: DetectorConfig) -> None:
    if recipe.voxel_keep == 1:
        return
    require("torch", extra="compile")
    from dm3d_deploy.models.detector import build_detector
    from dm3d_deploy.models.voxel_pruning import prune_voxels, stage_names
    from dm3d_deploy.steps.inputs import permille_of_recipe

    detector = build_detector(config)
    prune_voxels(detector, permille_of_recipe(recipe, stage_names(detector)))


def _refuse_data(recipe: Recipe, config: DetectorConfig) -> None:
    if recipe.recover_data == "simulated":
        return
    from calib.training_folder import open_labelled, open_unlabelled

    outside_digest("recover_data", recipe)
    (open_labelled if recipe.recover == "finetune" else open_unlabelled)(recipe.recover_data, config)
