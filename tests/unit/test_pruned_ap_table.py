"""The table of the benchmark of pruned AP: cells, rows, what recovery did, and the recipe that it asks for."""

import argparse
import json
from pathlib import Path

from benchmarks.pruned_ap import Variant, cell, fields_of, steps_of, table
from dm3d_deploy.evaluation.paired import Change
from dm3d_deploy.evaluation.variants import EVERY_MEAN, VariantRow


def row(name, subset="all", objects=30, interval=(-3.04, 0.26)):
    changes = {"1": Change(points=-1.25, interval_points=interval)} if subset == "all" else {}
    return VariantRow(
        name=name, classes=(name,), subset=subset, objects=objects, ap_percent={"0": 61.36, "1": 60.11}, changes=changes
    )


def test_a_cell_has_the_change_with_its_interval_where_there_is_one() -> None:
    assert cell(row("car"), "0") == "61.4"
    assert cell(row("car"), "1") == "60.1 (-1.2; -3.0 to +0.3)"
    assert cell(row("car", interval=None), "1") == "60.1 (-1.2)"
    empty = VariantRow(name="bus", classes=(), subset="all", objects=0, ap_percent={"0": None}, changes={})
    assert cell(empty, "0") == "-"


def test_vulnerable_road_users_stand_before_cars_and_refusals_below() -> None:
    variants = [
        Variant(kept="1", recovery="dense", steps=(), weights=Path()),
        Variant(kept="0.5", recovery="bn", steps=("norm refused, distortion 0.1 to 0.2",), weights=Path()),
    ]
    rows = [row(EVERY_MEAN), row("car"), row("car", subset="0-30 m"), row("pedestrian"), row("bicycle", objects=0)]
    lines = table(variants, rows).splitlines()
    assert lines[0] == "| kept | recovery | all classes (30) | pedestrian (30) | car (30) |"
    assert lines[2] == "| 1 | dense | 61.4 | 61.4 | 61.4 |"
    assert lines[3].startswith("| 0.5 | bn | 60.1 (-1.2; -3.0 to +0.3) | ")
    assert lines[-1] == "* kept 0.5, bn: norm refused, distortion 0.1 to 0.2"


def test_steps_are_read_from_the_run(tiny_run) -> None:
    told = json.loads((tiny_run / "work" / "recovery.json").read_text())
    lines = steps_of(tiny_run)
    assert len(lines) == len(told["steps"]) > 0
    assert lines[0].startswith(told["steps"][0]["method"])
    assert ("accepted" in lines[0]) == told["steps"][0]["accepted"]


def test_fields_of_the_recipe() -> None:
    options = argparse.Namespace(
        model="centerpoint", checkpoint=None, patterns="auto", set=["recover_steps=900", "scope=model"]
    )
    assert fields_of(options) == {
        "model": "centerpoint", "checkpoint": None, "patterns": "auto", "recover_steps": 900, "scope": "model",
    }  # fmt: skip
