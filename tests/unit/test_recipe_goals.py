"""One goal for each build: a share, a time or a distortion, each with the cost that it can have."""

import pytest

from dm3d_deploy.errors import UsageError
from dm3d_deploy.recipe import Recipe, goal_from_text, recipe_from_mapping
from dm3d_deploy.steps.report import command_of


@pytest.mark.parametrize(
    ("text", "goal"), [("0.3", {"target": 0.3}), ("25ms", {"target_ms": 25.0}), ("2.5 ms", {"target_ms": 2.5})]
)
def test_a_target_is_a_share_or_a_time(text: str, goal: dict[str, float]) -> None:
    assert goal_from_text(text) == goal


@pytest.mark.parametrize("text", ["25s", "ms", "", "half", "30%"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=f"the target '{text}' is no number.*--target 0.3 or --target 25ms"):
        goal_from_text(text)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "one goal, not none"),
        ({"target": 0.3, "max_distortion": 0.1}, "one goal, not 2"),
        ({"target": 0.3, "target_ms": 25.0, "cost": "latency"}, "one goal"),
        ({"target_ms": 25.0}, "a target in ms is a latency, not --cost macs"),
        ({"target_ms": 0.0, "cost": "latency"}, "the target in ms is 0"),
        ({"target_ms": float("nan"), "cost": "latency"}, "the target in ms is nan"),
        ({"max_distortion": -1.0}, "the largest distortion is -1"),
        ({"max_distortion": float("inf")}, "the largest distortion is inf"),
        ({"target": 0.3, "cost": "flops"}, "--cost flops is unknown"),
        ({"target": 0.3, "profile": "p.json"}, "--cost macs reads no profile"),
        ({"target": 0.3, "candidates": 0}, "candidates is 0"),
        ({"max_distortion": 0.1, "method": "erk", "patterns": "unstructured"}, "--method erk knows no budget but"),
        ({"target": 0.3, "cost": "executed", "method": "erk", "patterns": "unstructured"}, "--method erk knows no"),
    ],
)
def test_goals_that_mean_nothing_are_refused(given: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Recipe(model="centerpoint", **given)
    with pytest.raises(UsageError, match=words):
        recipe_from_mapping({"model": "centerpoint", **given})


@pytest.mark.parametrize(
    ("given", "goal", "command"),
    [
        ({"target": 0.3, "cost": "executed"}, "0.3", "--target 0.3 --cost executed"),
        ({"target_ms": 25.0, "cost": "latency", "profile": "orin"}, "25ms", "--target 25ms --profile orin"),
        ({"target": 0.5, "cost": "latency"}, "0.5", "--target 0.5 --cost latency"),
        ({"max_distortion": 0.05}, "distortion0.05", "--max-distortion 0.05"),
    ],
)
def test_a_goal_in_a_word_and_as_a_command(given: dict, goal: str, command: str) -> None:
    recipe = Recipe(model="centerpoint", **given)
    assert recipe.goal == goal
    assert command_of(recipe) == f"dm3d-deploy build --model centerpoint {command}"


def test_what_has_no_option_keeps_its_goal() -> None:
    recipe = Recipe(model="m", target_ms=25.0, cost="latency", damping=2.0)
    assert command_of(recipe) == "build(Recipe(model='m', target_ms=25.0, cost='latency', damping=2.0))"
