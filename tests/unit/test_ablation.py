"""Tables of the measurements of pruning: by part, of curves, of scores, of 2:4; those themselves run by hand."""

import importlib.util
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks import curve_fidelity, score_evidence, two_four
from benchmarks.ablation_parts import share_of_scope, table
from benchmarks.curve_fidelity import measured, predicted, rank_correlation, summary
from benchmarks.stamped import markdown
from dm3d_deploy.compare import ComparedRun
from dm3d_deploy.errors import MissingDependency
from dm3d_deploy.progress import Silent
from dm3d_deploy.pruning.contracts import Layer
from dm3d_deploy.reporting import pareto
from dm3d_deploy.stages import STAGES, RunContext
from dm3d_deploy.steps.layers import read_layers

STAGES_READ = {field for stage in STAGES[:4] for field in stage.recipe}


def layer(name, part, macs, final=False):
    kind, shape = ("sparse", (4, 1, 1, 1, 4)) if part == "3d" else ("conv2d", (4, 4, 1, 1))
    return Layer(name=name, part=part, kind=kind, shape=shape, positions=np.array([macs / 16.0]), final=final)


LAYERS = [layer("a", "3d", 30.0), layer("b", "2d", 40.0), layer("c", "head", 20.0), layer("d", "head", 10.0, True)]


def test_a_share_of_the_model_is_a_smaller_share_of_a_part_that_saves_alone() -> None:
    assert share_of_scope(LAYERS, "backbone3d", 0.9) == pytest.approx(2 / 3, abs=1e-6)
    assert share_of_scope(LAYERS, "backbone", 0.9) == pytest.approx(6 / 7, abs=1e-6)
    assert share_of_scope(LAYERS, "model", 0.9) == pytest.approx(0.9)
    assert share_of_scope(LAYERS, "backbone3d", 0.7) is None  # all of the 3D backbone
    assert share_of_scope(LAYERS, "model", 0.12) is None  # the last layer of the head stays


def test_the_table_says_what_a_part_cannot_give() -> None:
    run = ComparedRun(
        run="x", method="dm3d", target=0.5, recover="reconstruct", kept_of_backbone=0.5, kept_of_model=0.7,
        predicted=0.1, pruned=0.25, recovered=0.125, ap=None, ap_name=None,
    )  # fmt: skip
    lines = table([("backbone3d", 0.9, run), ("backbone3d", 0.7, None), ("model", 0.9, run), ("model", 0.7, run)])
    assert lines[0] == "| what is pruned | model keeps 0.9 | model keeps 0.7 |"
    assert lines[2] == "| 3D | 0.25, recovered 0.125 (0.7000 kept) | has not as much to give |"
    assert lines[3].startswith("| 3D, 2D and head | 0.25")


def test_fidelity_is_rank_factor_and_sum() -> None:
    assert rank_correlation([(1.0, 10.0), (2.0, 20.0), (3.0, 15.0)]) == pytest.approx(0.5)
    rows = summary({0.5: {"a": (1.0, 2.0), "b": (2.0, 8.0), "c": (4.0, 4.0)}})
    assert rows[2] == "| 0.5 | 3 | 0.500 | 2.00 (1.20 to 3.60) | 2.00 |"
    assert markdown(["x"], [["1"]]) == ["| x |", "| --- |", "| 1 |"]


def test_each_layer_is_pruned_alone_and_measured_once(run_copy, tmp_path, monkeypatch) -> None:
    dense = load_file(run_copy / "weights" / "dense.safetensors")
    pruned = []

    def outputs(run, weights, frames, advanced):
        found = load_file(weights)
        changed = [name for name in dense if not np.array_equal(dense[name], found[name])]
        pruned.append([(name, float((found[name] == 0).mean())) for name in changed])
        return [len(pruned)] * len(frames)

    monkeypatch.setattr(curve_fidelity, "outputs_of", outputs)
    monkeypatch.setattr(curve_fidelity, "distortions", lambda run, first, other: [float(value) for value in other])
    run = RunContext(root=run_copy, recipe=None, watch=Silent(), pool=None)
    guess, path = predicted(run, 0.5), tmp_path / "true.json"
    true = measured(run, 0.5, path)
    assert set(true) == set(guess)
    assert pruned[0] == []
    assert [[name for name, _ in one] for one in pruned[1:]] == [[f"{name}.weight"] for name in true]
    assert all(share == pytest.approx(0.5, abs=0.02) for one in pruned[1:] for _, share in one)
    assert measured(run, 0.5, path) == true
    assert len(pruned) == len(true) + 2  # the dense outputs again, no layer


def test_the_evidence_for_scores_marks_the_least_of_each_target() -> None:
    found = {"defaults": [(0.5, 0.2, 0.3), (2.0, 1.0, 1.0)], "1 sketch": [(0.25, 0.2, 0.05), (3.0, 2.0, 1.0)]}
    rows = score_evidence.table(found, [0.5, 0.3])
    assert rows[0] == "| setting | R = 0.5 (score + box) | R = 0.3 (score + box) |"
    assert rows[2:] == [
        "| defaults | 0.5 (0.2 + 0.3) | **2** (1 + 1) |", "| 1 sketch | **0.25** (0.2 + 0.05) | 3 (2 + 1) |",
    ]  # fmt: skip
    fields = {name for changes in score_evidence.SKETCHED.values() for name in changes}
    assert fields <= set(STAGES_READ)  # a setting that no stage before the curves reads would change nothing


def test_masks_to_compare_are_halves_and_legal(run_copy) -> None:
    run = RunContext(root=run_copy, recipe=None, watch=Silent(), pool=None)
    name = next(
        layer.name for layer in read_layers(run.path("layers")) if layer.kind == "conv2d" and layer.part == "2d"
    )
    masks = two_four.own_masks(run, {name: None})
    assert two_four.checked(run, masks) == pytest.approx(0.5)
    with pytest.raises(SystemExit, match="not 2:4 along the input channels"):
        two_four.checked(run, {name: np.ones_like(masks[name])})


@pytest.mark.skipif(importlib.util.find_spec("modelopt") is not None, reason="the package is there")
def test_an_absent_modelopt_is_told_with_what_to_install() -> None:
    with pytest.raises(MissingDependency, match="pip install nvidia-modelopt requests huggingface_hub"):
        two_four.modelopt()


def test_runs_of_several_recoveries_are_lines_of_their_own() -> None:
    rows = [("dm3d", "none"), ("dm3d", "distill"), ("lamp", "none")]
    runs = [{"method": m, "recover": r, "kept_of_backbone": 0.5, "pruned": 0.1 * i} for i, (m, r) in enumerate(rows, 1)]
    lines = pareto._lines({"runs": runs}, "pruned")
    assert list(lines) == ["dm3d none", "dm3d distill", "lamp"]
    drawn = pareto.pareto_chart(lines, "x", title="t", logarithmic=True)
    assert "50 %" in drawn
    assert "45 %" not in drawn  # ticks stand where runs are


def test_points_of_one_budget_lie_close_and_both_axes_have_labels() -> None:
    drawn = pareto.pareto_chart({"a": [(0.4998, 0.21)], "b": [(0.5, 0.44)]}, "x", title="t", logarithmic=True)
    labels = re.findall(r">([0-9.]+(?: %)?)</text>", drawn)
    assert labels == ["50 %", "0.20", "0.50"]
    a, _, b, _ = (float(x) for x in re.findall(r"<use [^>]* x=\"([0-9.]+)\"", drawn))  # beside each its legend's
    assert 0 < b - a < 5
