"""What the last stage says of a build: layers that lost channels, what saves time, bounds and warnings."""

from __future__ import annotations

import numpy as np
import pytest

from dm3d_deploy.pruning.channels import GroupCurve
from dm3d_deploy.pruning.contracts import Layer
from dm3d_deploy.pruning.narrowed import Narrowing
from dm3d_deploy.recipe import Recipe
from dm3d_deploy.steps import report
from dm3d_deploy.steps.report_layers import WHY, layer_rows

LAYERS = tuple(
    Layer(name=f"backbone_2d.blocks.0.{index}", part="2d", kind="conv2d", shape=(8, 8, 3, 3), positions=np.ones(9))
    for index in (1, 4, 7, 10, 13)
)
CURVE = GroupCurve(
    group=LAYERS[1].name, order=np.arange(8), widths=np.array([8, 4]), distortion=np.array([0.0, 1.0])
)  # fmt: skip
TOLD = {
    "frames_info": {"overflow": []},
    "model_info": {"trained": True},
    "recovery": {"method": "refit", "accepted": True},
    "export_info": {"graphs": []},
    "output_scale": {"pooled": []},
    "plan_info": {"skipped": []},
    "allocation": {"distortion": 0.1, "foreseen": False},
    "verification": {"held_out": [{"frame": "a", "masked": 0.4, "recovered": 0.3}]},
    "latency": {"warnings": []},
}


def recipe(**changes):
    return Recipe(model="centerpoint", target=0.5, cost="executed", **changes)


def test_a_narrowed_layer_is_called_by_what_became_of_it_in_the_order_of_the_network():
    narrow = Narrowing(LAYERS, {CURVE.group: CURVE}, {CURVE.group: 4})  # the second writes them, the third reads them
    masks = ((0, "2:4", 288), (1, "unstructured", 288), (2, "tile", 144), (3, "unstructured", 500), (4, "dense", 576))
    found = {
        "allocation": {"choices": [{"layer": LAYERS[i].name, "distortion": 0.1} for i in (3, 1, 2, 0)]},
        "masks_info": [
            {"layer": LAYERS[i].name, "pattern": pattern, "kept_weights": kept, "legal_2_4": None}
            | dict.fromkeys(("dense_macs", "kept_macs", "executed_macs"), kept)
            for i, pattern, kept in masks
        ],
        "export_info": {"sparsity": [{"weight": f"{LAYERS[0].name}.weight", "expected_gain": False, "reason": "thin"}]},
    }
    rows = layer_rows("auto", found, narrow)
    assert [row["name"] for row in rows] == [layer.name for layer in LAYERS[:4]]
    assert [row["pattern"] for row in rows] == ["2:4", "channel", "channel + tile", "unstructured"]
    assert [row["ratio"] for row in rows] == pytest.approx([0.5, 0.5, 0.75, 1 - 500 / 576])
    _, channel, both, free = rows
    assert (channel["why"], channel["gain"]) == (WHY["channel"], "not in the exported files any more, on any device")
    assert both["why"] == f"{WHY['channel']}; what is left: {WHY['tile']}"
    assert both["gain"].startswith(f"{channel['gain']}; what is left: skipped tiles")
    assert (rows[0]["gain"], free["gain"]) == ("thin", "none: zeros among weights that are all multiplied")
    assert layer_rows("unstructured", found, narrow)[3]["why"].startswith("pruned freely, as the paper does")


@pytest.mark.parametrize(
    ("pattern", "keep", "words"),
    [
        ("tile", 1.0, "only where a kernel offset"),
        ("channel + tile", 1.0, "only where channels or blocks are no longer in the files, and where a kernel offset"),
        ("depth", 0.7, "in the files, where voxels pass a block by, and where a kernel offset"),
        ("dense", 0.7, "only where voxels pass a block by, and where a kernel offset"),
    ],
)
def test_the_note_on_time_names_what_this_build_did(pattern, keep, words):
    assert words in report._time_note(recipe(voxel_keep=keep), [{"pattern": pattern, "part": "3d"}])


@pytest.mark.parametrize(("gap", "told"), [(1.0, None), (0.25, 0.25), (0.0, 0.0)])
def test_a_bound_of_nothing_is_no_bound(gap, told):
    allocation = {"gap": gap, "budget": {"unit": "executed"}, "candidates": [], "time": None}
    parts = {part: {"dense": 2.0, "kept": 1.0, "executed": 1.0} for part in ("3d", "2d", "head")}
    assert report._budget(recipe(), allocation, parts)["lower_bound_gap"] == told


def test_voxel_pruning_and_a_3d_plan_that_was_refused_are_warned_of():
    refused = {**TOLD, "plan_info": {"skipped": [{"layer": "3D plan", "reason": "a graph of ONNX Runtime alone"}]}}
    assert report._warnings(recipe(), TOLD, pillars=False) == []
    assert report._warnings(recipe(voxel_keep=0.7), refused, pillars=False) == [
        "voxel pruning: the blocks of stages 2,3 run on 70.0 % of their voxels",
        "there is no 3D plan, so ONNX Runtime alone runs the 3D backbone: a graph of ONNX Runtime alone",
    ]
    assert report._warnings(recipe(), refused, pillars=True) == []


def test_a_recovery_that_held_out_frames_do_not_confirm_is_warned_of():
    rows = [{"frame": "a", "masked": 0.2, "recovered": 0.3}, {"frame": "b", "masked": 0.364, "recovered": 0.456}]
    worse = {**TOLD, "verification": {"held_out": rows}}
    assert report._warnings(recipe(), worse, pillars=False) == [
        "the recovery was accepted on the selection frames, but the 2 held-out frames are worse with it: distortion "
        "0.282 before, 0.378 after"
    ]
    refused = {**worse, "recovery": {"method": "refit", "accepted": False}}
    assert report._warnings(recipe(), refused, pillars=False) == []


@pytest.mark.parametrize(("count", "words"), [(1, "1 weight or bias that is"), (3, "3 weights or biases that are")])
def test_one_weight_that_was_rounded_away_is_one(count, words):
    graphs = [{"path": "onnx/bev_head.onnx", "rounded_to_zero": count}]
    told = report._warnings(recipe(), {**TOLD, "export_info": {"graphs": graphs}}, pillars=False)
    assert told == [f"{words} not zero became zero in the exported precision"]
