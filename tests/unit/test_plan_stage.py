"""The stage that plans the 3D engine, what a run says of its plan, and what is said where something is left out."""

import json
import sys

import onnx
import pytest
from run_sample import TINY, Noted, tiny_recipe
from zoo_sample import CONFIGS

from dm3d_deploy import build as builder
from dm3d_deploy.artifacts import Manifest, write_manifest
from dm3d_deploy.build import rerun
from dm3d_deploy.device import DEVICES
from dm3d_deploy.errors import EngineError, StaleArtifact, UsageError
from dm3d_deploy.plan_facts import describe_plan_of_run
from dm3d_deploy.recipe import Recipe
from dm3d_deploy.stages import FILES, RunContext
from dm3d_deploy.steps import plan3d
from dm3d_deploy.steps.plan3d import plan_devices
from engines.sparse3d.aot import TARGETS
from engines.sparse3d.plan_file import read_plan

PLAN, POINTS, INFO = FILES["plan"], FILES["points_plan"], FILES["plan_info"]


def context(root, frames, **changes):
    return RunContext(root=root, recipe=tiny_recipe(frames, **changes), watch=Noted(), pool=None)


def info_of(root):
    return json.loads((root / INFO).read_text())


def test_a_build_leaves_a_plan_with_kernels_and_their_resources(tiny_run):
    pytest.importorskip("triton")
    plan, info = read_plan(tiny_run / PLAN), info_of(tiny_run)
    assert list(plan.cubins) == [87]
    assert [item.name for item in plan.inputs] == ["features", "coords", "count"]
    node = onnx.load(tiny_run / FILES["backbone3d"]).graph
    assert [item.shape for item in plan.inputs] == [
        tuple(size.dim_value for size in value.type.tensor_type.shape.dim) for value in node.input
    ]
    rows = [(row["sm"], row["kernel"]) for row in info["kernels"]]
    assert rows[: len(plan.kernels)] == [("sm_87", item.name) for item in plan.kernels]
    assert {"registers", "shared_bytes", "spilled_bytes"} <= info["kernels"][0].keys()
    assert info["standing"] == "built, not run here"
    assert info["skipped"] == []


def test_a_second_plan_starts_at_points_and_shares_the_kernels(tiny_run, cli):
    pytest.importorskip("triton")
    plan, points = read_plan(tiny_run / PLAN), read_plan(tiny_run / POINTS)
    frames = json.loads((tiny_run / FILES["frames_info"]).read_text())["frames"]
    most = max(row["points"] for row in frames if row["role"] == "calibration")
    assert [(item.name, item.shape) for item in points.inputs] == [("points", (most * 5 // 4, 5)), ("count", (1,))]
    assert points.outputs[0].shape == plan.outputs[0].shape
    assert points.capacities == plan.capacities
    images = {kernel.function: cubin for kernel, cubin in zip(plan.kernels, plan.cubins[87], strict=True)}
    again = {kernel.function: cubin for kernel, cubin in zip(points.kernels, points.cubins[87], strict=True)}
    assert again["kernels_conv.to_bev"] == images["kernels_conv.to_bev"]
    assert set(again) - set(images) == {
        "kernels_index.drop_far", "kernels_index.ring_cutoff", "kernels_points.enter_points",
        "kernels_points.mean_features", "kernels_points.sum_points",
    }  # fmt: skip
    functions = [row["function"] for row in info_of(tiny_run)["kernels"]]
    assert len(functions) == len(plan.kernels) + 6, "and a scan that leaves the count to the entry"
    code, out, _ = cli("plan", "inspect", tiny_run, "--points", "--json")
    assert (code, json.loads(out)["what"]) == (0, "3D plan from points")


def test_capacities_are_those_of_the_calibration_frames_with_a_margin(tiny_run):
    plan = read_plan(tiny_run / PLAN)
    frames = json.loads((tiny_run / FILES["frames_info"]).read_text())["frames"]
    assert plan.meta["cost"]["frames"] == sum(row["role"] == "calibration" for row in frames) == 2
    assert plan.capacities["input"] == 4000
    assert all(rows % 64 == 0 for name, rows in plan.capacities.items() if name != "input")


def test_the_margin_and_the_rows_of_single_stages_can_be_set(run_copy, tiny_frames, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    before, points_before = read_plan(run_copy / PLAN).capacities, read_plan(run_copy / POINTS).inputs[0].shape[0]
    plan3d.plan3d(context(run_copy, tiny_frames, capacity_margin=3, capacities="out=128, stage2_down=777,points=9000"))
    plan, points = read_plan(run_copy / PLAN), read_plan(run_copy / POINTS)
    assert plan.capacities == points.capacities
    assert plan.capacities["stage2_down"] == 777
    assert plan.capacities["out"] == 128
    for name in ("stage3_down", "stage4_down"):
        assert plan.capacities[name] == pytest.approx(before[name] * 3 / 1.25, abs=3 * 64)
    assert plan.capacities["input"] == before["input"] == 4000
    assert (points.inputs[0].shape[0], points_before) == (9000, 1500 * 5 // 4)


def test_another_room_repeats_the_plan_the_engines_and_the_report_alone(run_copy, tiny_frames):
    watch = Noted()
    builder.build(tiny_recipe(tiny_frames, capacity_margin=1.5, capacities="out=128"), run_copy, watch=watch)
    assert watch.ran == ["plan", "engine", "report"]
    assert read_plan(run_copy / PLAN).capacities["out"] == 128
    command = json.loads((run_copy / FILES["report"]).read_text())["command"]
    assert "capacity_margin=1.5, capacities='out=128'" in command


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("conv2=7", "--capacities names 'conv2', no stage of the backbone. Fix: known: input, stage2_down"),
        ("stage2_dawn=7", "no stage of the backbone. Fix: did you mean 'stage2_down'?"),
        ("out=513", "gives 'out' 513 rows, more than there can be. Fix: give 512 at most"),
        ("points=524288", "gives 'points' 524,288 rows, more than there can be. Fix: give 524,287 at most"),
    ],
)
def test_rows_of_no_stage_or_of_too_many_cells_are_refused(run_copy, tiny_frames, given, sentence):
    with pytest.raises(UsageError) as caught:
        plan3d.plan3d(context(run_copy, tiny_frames, capacities=given))
    assert sentence in str(caught.value)


def test_pillars_have_no_capacities(run_copy, tiny_frames):
    (run_copy / FILES["model_config"]).write_bytes((CONFIGS / "pointpillars.yaml").read_bytes())
    with pytest.raises(UsageError, match="are of a 3D plan, and there is none: pillars have no 3D backbone"):
        plan3d.plan3d(context(run_copy, tiny_frames, capacities="out=7"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--capacity-margin", "0.9"), "--capacity-margin 0.9 leaves no room for the calibration frames themselves"),
        (("--capacity-margin", "nan"), "--capacity-margin nan leaves no room"),
        (("--capacities", "out"), "--capacities out is no list of STAGE=ROWS: 'out' is wrong"),
        (("--capacities", "out=0"), "'out=0' is wrong"),
        (("--capacities", "out=1.5"), "'out=1.5' is wrong"),
        (("--capacities", "out=7,out=8"), "'out=8' is wrong or comes twice"),
        (("--capacities", "=7"), "'=7' is wrong"),
    ],
)
def test_rooms_that_are_none_are_usage_errors(cli, tmp_path, options, sentence):
    code, _, err = cli(
        "build", "--model", str(TINY), "--target", "0.5", "--out", tmp_path / "run", "--dry-run", *options
    )
    assert (code, sentence in " ".join(err.split())) == (2, True), err


def test_the_node_names_the_plan_and_the_dense_one_has_none(tiny_run):
    def named(kind):
        (node,) = onnx.load(tiny_run / FILES[kind]).graph.node
        return [onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == "plan_file"]

    assert named("backbone3d") == [PLAN.encode()]
    assert named("dense_backbone3d") == []


def test_the_same_bytes_again(run_copy, tiny_frames):
    before = {name: (run_copy / name).read_bytes() for name in (PLAN, POINTS, INFO)}
    plan3d.plan3d(context(run_copy, tiny_frames))
    assert info_of(run_copy)["reproducible"]
    assert {name: (run_copy / name).read_bytes() for name in before} == before


def test_without_triton_the_plan_has_no_kernels_and_one_sentence_says_so(run_copy, tiny_frames, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    run = context(run_copy, tiny_frames)
    plan3d.plan3d(run)
    plan, info = read_plan(run_copy / PLAN), info_of(run_copy)
    assert plan.cubins == {}
    reason = "the Python package 'triton' is not installed. Fix: pip install 'dm3d-deploy[sparse3d]'"
    assert info["skipped"] == [{"layer": "3D kernels for sm_87", "reason": reason}]
    assert (info["standing"], info["kernels"], info["triton"]) == ("not compiled", [], None)
    assert run.watch.notes == [f"no kernels in the 3D plan, for sm_87: {reason}"]


def test_the_version_of_triton_decides_the_plan_and_nothing_before_it(tiny_run, tiny_frames, monkeypatch):
    versions = builder.tool_versions
    monkeypatch.setattr(
        builder, "tool_versions", lambda names: {**versions(names), **({"triton": "0"} if "triton" in names else {})}
    )
    changed = [row.stage for row in builder.plan(tiny_recipe(tiny_frames), tiny_run) if not row.fresh]
    assert changed[0] == "plan"


def test_what_cannot_be_planned_is_told_and_the_rest_is_built(run_copy, monkeypatch):
    def refuse(*_, **__):
        raise EngineError("the grid has too many cells.", fix="use larger ones")

    monkeypatch.setattr(plan3d, "calibrated_plan", refuse)
    watch, reason = Noted(), "the grid has too many cells. Fix: use larger ones"
    rerun(run_copy, ("plan", "report"), watch=watch)
    assert watch.notes == [f"no 3D plan: {reason}", f"no 3D plan from points: {reason}"]
    assert not (run_copy / PLAN).exists()
    assert not (run_copy / POINTS).exists()
    report = json.loads((run_copy / FILES["report"]).read_text())
    assert report["plan"] is None
    assert {"layer": "3D plan", "reason": reason} in report["skipped"]
    assert "The 3D backbone was not planned" in (run_copy / FILES["report_page"]).read_text()
    with pytest.raises(EngineError, match=rf"holds no 3D plan. {reason}"):
        describe_plan_of_run(run_copy)


def test_a_config_that_is_not_the_exported_one_is_refused_by_the_planner(run_copy, tiny_frames):
    config = run_copy / FILES["model_config"]
    text = config.read_text()
    config.write_text(text.replace("POINT_CLOUD_RANGE: [-12.8", "POINT_CLOUD_RANGE: [-6.4"))
    assert config.read_text() != text
    run = context(run_copy, tiny_frames)
    plan3d.plan3d(run)
    row, _ = info_of(run_copy)["skipped"]
    assert "does not fit the backbone's grid (41, 128, 128)" in row["reason"]


def test_the_report_tells_the_plan(tiny_run):
    pytest.importorskip("triton")
    told = json.loads((tiny_run / FILES["report"]).read_text())["plan"]
    plan, whole = read_plan(tiny_run / PLAN), describe_plan_of_run(tiny_run)
    assert told["workspace_bytes"] == plan.workspace_bytes
    assert told["launches"] == len(plan.steps) - 1
    assert told["tiles_kept"] == sum(layer["tiles_kept"] for layer in whole["layers"])
    assert told["tiles_skipped"] > 0
    assert told["standing"] == "compiled, not run on a device"
    (device,) = told["devices"]
    assert (device["sm"], device["kernels"], device["spilled_bytes"]) == ("sm_87", len(plan.kernels), 0)
    page = (tiny_run / FILES["report_page"]).read_text()
    assert "Compiled, not run on a device." in page


@pytest.mark.parametrize(
    ("names", "sms", "left_out"),
    [
        ("auto", (87, 89, 110, 120), []),
        ("rtx", (80, 86, 89, 120), []),
        ("h100, orin", (87, 90), []),
        ("thor", (101,), []),
        ("cpu,gb10", (121,), ["3D kernels for cpu"]),
    ],
)
def test_devices_become_architectures(names, sms, left_out):
    found, skipped = plan3d.sms_and_skipped(plan_devices(names))
    assert found == sms
    assert [row["layer"] for row in skipped] == left_out


def test_every_device_with_a_gpu_has_an_architecture_that_kernels_are_compiled_for():
    named = {device.sm for device in DEVICES if device.sm}
    assert named <= {f"sm_{sm}" for sm in TARGETS}


def test_plan_inspect_says_what_the_plan_takes(tiny_run, cli):
    code, out, err = cli("plan", "inspect", tiny_run, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    plan = read_plan(tiny_run / PLAN)
    assert told["workspace_bytes"] == plan.workspace_bytes
    assert told["capacities"] == dict(plan.capacities)
    assert told["features"] == ["memset", "status"]
    assert [row["name"] for row in told["buffers"]] == [buffer.name for buffer in plan.buffers]
    assert len(told["steps"]) == len(plan.steps)
    assert {"tiles_kept", "tiles_skipped"} <= told["layers"][0].keys()

    code, out, err = cli("plan", "inspect", tiny_run)
    assert (code, err) == (0, "")
    for word in ("workspace bytes", "tiles_skipped", "conv_out.0", "cleared", "conv_tile_list", "memset"):
        assert word in out, word


def test_plan_inspect_takes_a_plan_file(run_copy, cli, tmp_path):
    code, out, _ = cli("plan", "inspect", run_copy / POINTS, "--json")
    whole = json.loads(cli("plan", "inspect", run_copy, "--points", "--json")[1])
    assert (code, json.loads(out)) == (0, {**whole, "what": "plan file"})
    code, _, err = cli("plan", "inspect", run_copy / POINTS, "--points")
    assert (code, "is one plan; --points chooses of a run's" in err) == (2, True)
    (tmp_path / "empty.plan").write_bytes(b"")
    for name in (tmp_path / "empty.plan", run_copy / FILES["bev_head"]):
        code, _, err = cli("plan", "inspect", name)
        assert (code, "restore the file, or build its run again with --from plan" in err) == (7, True), err


def test_a_run_that_stopped_before_its_plan_names_the_command(tmp_path):
    recipe = Recipe(model="centerpoint", target=0.5, frames="my drives")
    write_manifest(tmp_path, Manifest(recipe=recipe.as_json(), tools={}, steps=(), trained=False))
    with pytest.raises(StaleArtifact) as caught:
        describe_plan_of_run(tmp_path)
    assert (
        "its build stopped before the stage 'plan'. Fix: dm3d-deploy build --model centerpoint --target 0.5 "
        f"--frames 'my drives' --out {tmp_path} --from plan" in str(caught.value)
    )


def test_plan_inspect_refuses_a_changed_plan_and_a_run_without_one(run_copy, cli):
    plan = run_copy / PLAN
    plan.write_bytes(plan.read_bytes()[:-1] + b"x")
    code, _, err = cli("plan", "inspect", run_copy)
    assert code == StaleArtifact.exit_code
    assert "is not the file that was built" in err
    plan.unlink()
    _, _, err = cli("plan", "inspect", run_copy)
    assert "is missing" in err
    assert f"build(Recipe(model={str(TINY)!r}, target=0.5, " in err, "the tiny recipe has fields without an option"
    assert err.strip().endswith(f"{str(run_copy)!r}, first='plan')")
    code, _, err = cli("plan", "inspect", run_copy / "nowhere")
    assert (code, "it is not a finished run" in err) == (2, True)
