"""The report names a command that exists, and one of Python where no option says the same."""

import shlex
from dataclasses import fields

import typer.main

from dm3d_deploy.cli import app
from dm3d_deploy.recipe import Recipe
from dm3d_deploy.steps.report import OPTIONS, command_of


def test_every_option_it_may_name_exists():
    build = typer.main.get_command(app).commands["build"]
    known = {word for param in build.params for word in param.opts}
    assert {f"--{name.replace('_', '-')}" for name in OPTIONS} <= known


def test_every_option_that_is_a_field_of_the_recipe_may_be_named():
    build = typer.main.get_command(app).commands["build"]
    both = {param.name for param in build.params} & {field.name for field in fields(Recipe)}
    assert both - {"model", "target", "max_distortion"} == OPTIONS
    recipe = Recipe(model="centerpoint", target=0.5, voxel_keep=0.7, voxel_stages="2")
    assert command_of(recipe).endswith("--target 0.5 --voxel-keep 0.7 --voxel-stages 2")


def test_what_a_method_implies_is_not_named():
    recipe = Recipe(model="m", target=0.5, method="paper-eq13", patterns="unstructured", sketches=0)
    assert command_of(recipe) == "dm3d-deploy build --model m --target 0.5 --method paper-eq13 --patterns unstructured"


def test_only_what_differs_is_named_and_quoted():
    recipe = Recipe(model="my model.yaml", target=0.3, frames="drive 1", calibration_frames=4, bench_repeats=5)
    assert shlex.split(command_of(recipe)) == [
        "dm3d-deploy", "build", "--model", "my model.yaml", "--target", "0.3",
        "--frames", "drive 1", "--calibration-frames", "4",
    ]  # fmt: skip


def test_what_has_no_option_is_a_call():
    command = command_of(Recipe(model="centerpoint", target=0.5, damping=2.0))
    assert command == "build(Recipe(model='centerpoint', target=0.5, damping=2.0))"
    assert eval(command, {"build": lambda recipe: recipe, "Recipe": Recipe}).damping == 2.0  # noqa: S307 - our own text
