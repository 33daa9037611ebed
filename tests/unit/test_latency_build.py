"""A build whose budget is a time: the report says how that time is known, and a changed profile is noticed."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from run_sample import TINY, tiny_recipe

from dm3d_deploy import build as builder
from dm3d_deploy.errors import InfeasibleBudget, StaleArtifact
from dm3d_deploy.profiling import profile
from dm3d_deploy.pruning.profiles import Profile
from dm3d_deploy.reporting import facts
from dm3d_deploy.reporting.summary import summary_lines
from dm3d_deploy.stages import STAGE_NAMES

ALLOCATE = STAGE_NAMES.index("allocate")


@pytest.fixture(scope="module")
def timed(tiny_frames, tmp_path_factory) -> tuple[Profile, Path]:
    """The tiny model's profile of this machine, and its file."""
    out = tmp_path_factory.mktemp("timed") / "here.json"
    return profile(str(TINY), device="here", out=out, frames=str(tiny_frames), repeats=1), out


def test_a_time_that_nothing_reaches_is_refused_and_a_generous_one_is_reported(run_copy, tiny_frames, timed):
    found, path = timed
    goal = {"target": None, "cost": "latency", "profile": str(path)}
    with pytest.raises(InfeasibleBudget, match=r"The target of .* ms cannot be reached.* are measured on "):
        builder.build(tiny_recipe(tiny_frames, target_ms=found.dense_ms / 100, **goal), run_copy)
    recipe = tiny_recipe(tiny_frames, target_ms=found.dense_ms * 2, **goal)
    builder.build(recipe, run_copy)

    report = json.loads((run_copy / "report.json").read_text())
    assert report["budget"]["goal"].endswith(f"({found.label}), which the dense network takes already")
    assert report["budget"]["cost"] == "latency"
    assert report["budget"]["kept"] == report["budget"]["executed"] == 1
    assert report["planned_time"]["dense_ms"] == pytest.approx(found.dense_ms)
    rows = {row.stage: row for row in facts.planned_rows(report)}
    assert rows.keys() == {"3D", "BEV + head"}
    assert all(row.measured_here_ms is not None for row in rows.values())
    page = (run_copy / "report.html").read_text()
    assert f"What the allocation counted: {found.label}" in page
    assert "Dense, measured in this build" in page
    assert found.label.upper() in words_of(report)

    assert builder.plan(recipe, run_copy)[ALLOCATE].fresh
    profile(str(TINY), device="here", out=path, frames=str(tiny_frames), repeats=2)
    assert builder.plan(recipe, run_copy)[ALLOCATE].reason == "an input, a setting or a tool changed"
    path.write_text(path.read_text().replace('"voxels": ', '"voxels": 1'))
    with pytest.raises(StaleArtifact, match="was changed since it was written"):
        builder.plan(recipe, run_copy)


def words_of(report) -> str:
    told = io.StringIO()
    Console(width=400, file=told).print(summary_lines(report))
    return told.getvalue()


def test_an_estimate_says_so_in_every_line() -> None:
    part = {"dense_ms": 10.0, "planned_ms": 8.0, "fixed_ms": 1.0}
    report = {
        "latency": [], "layers": [],
        "planned_time": {
            "label": "estimated for thor, not measured", "standing": "estimated", "voxels": 60_000, "dense_ms": 20.0,
            "planned_ms": 16.0, "by_part": {"3d": {**part, "band": None}, "2d": {**part, "band": 0.2}},
        },
    }  # fmt: skip
    assert facts.planned_words(report) == (
        "ESTIMATED FOR THOR, NOT MEASURED: 20.0 ms to 16.0 ms at 60,000 voxels; "
        "3D 10.0 ms to 8.00 ms (no band: never compared), BEV + head 10.0 ms to 8.00 ms (+-20.0 %)"
    )
