"""What benchmarks/gpu_sparse3d.py checks, judges and writes, without a GPU: its checks run in Triton's interpreter."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from run_sample import TINY, points_of
from sparse3d_sample import backbone_of, clustered_cells, merging_layers, padded, plain_frame

from benchmarks import gpu_sparse3d
from benchmarks.gpu_sparse3d import PARTS, Machine, Session, machine_of, options_of, run, save
from benchmarks.sparse3d_gpu import tools
from benchmarks.sparse3d_gpu.cases import Case, nearest, shuffled, stages_in_torch
from benchmarks.sparse3d_gpu.findings import Finding, bars_of, exit_code, judged, missing, page
from benchmarks.sparse3d_gpu.kernels import CHECKS, Evidence, check_kernels, every_array
from benchmarks.sparse3d_gpu.latency import floors_ms, measure_spconv, percentiles
from benchmarks.sparse3d_gpu.stages import check_repeats, check_stages
from dm3d_deploy.errors import EngineError
from dm3d_deploy.pointcloud import PointCloud
from engines.sparse3d.interpreter import PlanRun, interpret
from engines.sparse3d.planner import plan_backbone
from engines.sparse3d.shapes import WIDE
from engines.sparse3d.sites import frame_statistics

MACHINE = Machine(name="NVIDIA Toy 9000", sm=87, driver="580.1", clocks="2000 MHz, 3000 MHz")
SIDES = {"voxels": ("fp16", False, None), "points": ("fp32", True, 90)}
PRECISION = {"merged": "fp32", **{name: precision for name, (precision, *_) in SIDES.items()}}


@pytest.fixture(scope="module")
def case():
    columns = ("x", "y", "z", "intensity", "timestamp")
    cloud = PointCloud(points=points_of(0, columns=5), columns=columns)
    return Case(model=TINY, kept=0.5, cloud=nearest(cloud, 300))


def merged_evidence(folder):
    """Of a small network that adds up stages, as VoxelNeXt does."""
    rng, grid = np.random.default_rng(0), (11, 21, 19)
    backbone, frame = backbone_of(merging_layers(rng), grid, 128, folder), plain_frame(grid, 128)
    feed = padded(rng.normal(size=(60, 4)).astype(np.float32), clustered_cells(rng, grid, 60), 128)
    plan = plan_backbone(
        backbone, frame=frame, capacities={stage.name: 512 for stage in backbone.stages}, precision="fp32",
        shapes=WIDE, keep=every_array(backbone, frame, 512), count_tiles=True,
        calibration=[frame_statistics(backbone, feed["coords"][:60], conv_rows=WIDE.conv_rows)],
    )  # fmt: skip
    return Evidence(backbone=backbone, plan=plan, feed=feed, run=interpret(plan, [feed]).runs[0])


@pytest.fixture(scope="module")
def evidence(case, tmp_path_factory):
    """One run of each side in the interpreter, of the voxels in another order, and of stages that are added up."""
    pytest.importorskip("triton")
    found = {"merged": [merged_evidence(tmp_path_factory.mktemp("merged"))]}
    for name, (precision, points, room) in SIDES.items():
        plan = case.plan(precision, points=points, keep=every_array, room=room, shapes=WIDE)
        feed = case.feed(points=points)
        runs = interpret(plan, [feed] if points else [feed, shuffled(feed, 1)]).runs
        found[name] = [Evidence(backbone=case.backbone, plan=plan, feed=feed, run=one) for one in runs]
    return found


def checked(side, one):
    return check_kernels(one, part="kernels", precision=PRECISION[side])


def test_every_kernel_is_checked_and_right(evidence):
    functions = set()
    for side, (one, *_) in evidence.items():
        findings = checked(side, one)
        assert [finding.name for finding in findings] == [kernel.name for kernel in one.plan.kernels]
        assert {finding.standing for finding in findings} == {"passed"}, findings
        functions |= {kernel.function.partition(".")[2] for kernel in one.plan.kernels}
    assert functions == set(CHECKS)


WRONG = {
    "voxels": (
        "entry.keys", "entry.features", "input.bits", "stage2_down.bits", "out.prefix", "out.sums", "stage3_down.count",
        "stage4_down.sites", "out.book.pairs", "input.book.3x3x3.taps", "out.book.list", "out.book.length",
        "conv2.0.0", "executed",
    ),
    "points": ("entry.keys", "entry.features", "entry.rings", "entry.limit", "entry.sums", "entry.members"),
    "merged": ("merged.bits", "merged.sites", "merged.features", "conv5.0"),
}  # fmt: skip


def changed_at(array, place):
    """One value made another."""
    changed = array.copy()
    flat = changed.reshape(-1)
    flat[place] = flat[place] ^ 1 if array.dtype.kind == "i" else 2 * np.abs(flat).max() + 1
    return changed


@pytest.mark.parametrize("side", WRONG)
def test_one_wrong_value_in_an_array_is_found(side, evidence):
    one = evidence[side][0]
    for name in WRONG[side]:
        place = np.flatnonzero(one.run.kept["out.bits"])[0] if name == "out.prefix" else 0
        kept = {**one.run.kept, name: changed_at(one.run.kept[name], place)}
        wrong = checked(side, replace(one, run=replace(one.run, kept=kept)))
        assert "failed" in {finding.standing for finding in wrong}, name


def test_a_run_that_left_nothing_passes_nowhere(evidence):
    one = evidence["points"][0]
    kept = {name: np.zeros_like(array) for name, array in one.run.kept.items()}
    outputs = {name: np.zeros_like(array) for name, array in one.run.outputs.items()}
    empty = PlanRun(outputs=outputs, kept=kept, status=dict.fromkeys(one.run.status, 0))
    found = checked("points", replace(one, run=empty))
    assert {finding.standing for finding in found} == {"failed"}, found


def test_a_wrong_map_is_found(evidence):
    one = evidence["voxels"][0]
    outputs = {**one.run.outputs, "bev": changed_at(one.run.outputs["bev"], 0)}
    wrong = checked("voxels", replace(one, run=replace(one.run, outputs=outputs)))
    assert [finding.name.rpartition("_")[0] for finding in wrong if finding.standing == "failed"] == ["to_bev"]


def test_stages_are_held_against_torch_and_a_run_against_itself(case, evidence):
    one, other = evidence["voxels"]
    reference = stages_in_torch(case.detector, case.voxels(points=False), "cpu")

    def found(run):
        return list(check_stages(case, one.plan, run, reference, part="stages", precision="fp16"))

    right = found(one.run)
    assert [finding.name for finding in right][-2:] == ["bev", "tiles"]
    assert len(right) == 9 + 2
    assert {finding.standing for finding in right} == {"passed"}, right
    name = right[3].name.partition(" ")[0]
    wrong = found(replace(one.run, kept={**one.run.kept, name: changed_at(one.run.kept[name], 0)}))
    assert [finding.name for finding in wrong if finding.standing == "failed"] == [right[3].name]
    fewer = one.run.kept["executed"] - np.eye(13, dtype=np.int32)[2]
    wrong = found(replace(one.run, kept={**one.run.kept, "executed": fewer}))
    assert [finding.name for finding in wrong if finding.standing == "failed"] == ["tiles"]

    assert check_repeats([one.run, other.run], part="stages").standing == "passed"
    altered = PlanRun(outputs={"bev": one.run.outputs["bev"] + 1}, kept={}, status=one.run.status)
    assert check_repeats([one.run, other.run, altered], part="stages").standing == "failed"
    assert check_repeats([one.run], part="stages").standing == "failed", "nothing was repeated"


def test_the_channel_of_active_cells_is_part_of_the_map(evidence):
    (one,) = evidence["merged"]
    count, name = one.run.status["out"], one.backbone.layers[-1].name
    reference = {name: (one.run.kept["out.sites"][:count], one.run.kept[name][:count])}
    wrong = one.run.outputs["bev"].copy()
    wrong[0, -1, 5, 5] = 1 - wrong[0, -1, 5, 5]
    for bev, standing in ((one.run.outputs["bev"], "passed"), (wrong, "failed")):
        left = replace(one.run, outputs={"bev": bev})
        found = list(check_stages(one, one.plan, left, reference, part="stages", precision="fp32"))
        assert [finding.standing for finding in found] == ["passed", standing, "passed"]


def row(what, kept, mode, p50_ms, runs=1000):
    return {
        "what": what,
        "kept_tiles": kept,
        "start": "voxels",
        "mode": mode,
        "p50_ms": p50_ms,
        "p99_ms": 9.0,
        "runs": runs,
    }


OURS = [row("ours", 1.0, "graph", 2.0), row("ours", 1.0, "eager", 3.0), row("ours", 0.5, "graph", 1.5)]


@pytest.mark.parametrize(
    ("rows", "standings"),
    [
        ([*OURS, row("ours", 0.3, "graph", 1.1), row("spconv", 1.0, "eager", 3.0)], ["passed"] * 3),
        ([*OURS, row("ours", 0.3, "graph", 1.11), row("spconv", 1.0, "eager", 2.9)], ["failed", "passed", "failed"]),
        (
            [*OURS, row("spconv", 1.0, "eager", 9), row("spconv", 1.0, "graph", 1.9)],
            ["failed", "passed", "passed", "missing"],
        ),
        (
            [*OURS[:2], row("ours", 0.5, "graph", 1.51), row("ours", 0.3, "graph", 1.0, 999)],
            ["missing", "failed", "missing"],
        ),
        ([], ["missing"] * 3),
    ],
)
def test_bars_are_judged_like_for_like(rows, standings):
    assert [finding.standing for finding in bars_of(rows)] == standings


def test_the_exit_code_forgives_nothing_but_what_is_allowed():
    passed, failed = judged("a", "b", True, "c"), judged("a", "b", False, "c")
    assert exit_code([passed], allow_missing=False) == 0
    assert exit_code([passed, failed], allow_missing=True) == 1
    assert exit_code([passed, missing("a", "b", "c")], allow_missing=False) == 1
    assert exit_code([passed, missing("a", "b", "c")], allow_missing=True) == 0
    assert exit_code([], allow_missing=True) == 1


def test_the_page_has_the_stamp_the_bars_first_and_a_table_of_latencies():
    findings = [
        judged("kernels", "to_bev", False, "1 of 2 | differ"),
        judged("kernels", "rulebook", True, "7 arrays"),
        Finding(part="latency", name="ours", standing="measured", words="2 ms", rows=(OURS[0],)),
        *bars_of(OURS),
    ]
    text = page({"gpu": "Toy", "command": "python -m x", "date": "today", "code": "abc"}, findings, 1)
    lines = text.splitlines()
    assert lines[:5] == [
        "# The sparse 3D engine on Toy",
        "",
        "`python -m x`, today: **not passed**.",
        "",
        "* code: abc",
    ]
    assert [line for line in lines if line.startswith("## ")] == ["## Bars", "## Latency", "## Checks"]
    assert lines[-2:] == ["| kernels | 1 of 2 | passed |", "| to_bev | **failed** | 1 of 2 / differ |"]
    assert "* ours: 2 ms" in lines
    assert "| ours | 1 | voxels | graph | 2 | 9 | 1000 |" in lines
    allowed = page({"gpu": "Toy", "command": "", "date": ""}, [missing("a", "b", "c")], 0)
    assert "what is missing was allowed to be" in allowed


def test_the_command_line_and_the_machine():
    options = options_of(["--repeats", "7", "--parts", "kernels", "bars", "--allow-missing"])
    assert (options.repeats, options.parts, options.allow_missing) == (7, ["kernels", "bars"], True)
    assert options_of([]).parts == list(PARTS)
    found = machine_of("NVIDIA H100 80GB HBM3, 9.0, 580.159.04, 1980 MHz, 2619 MHz\nanother, 8.0, 1, 2, 3\n")
    assert found == Machine(name="NVIDIA H100 80GB HBM3", sm=90, driver="580.159.04", clocks="1980 MHz, 2619 MHz")


def test_without_a_gpu_or_kernels_for_it_nothing_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_sparse3d.main([]) == 2
    assert "no NVIDIA GPU can be asked here" in capsys.readouterr().err
    monkeypatch.setattr(gpu_sparse3d, "machine_here", lambda: replace(MACHINE, sm=75))
    assert gpu_sparse3d.main([]) == 2
    assert "no kernels are compiled for the NVIDIA Toy 9000, sm_75" in capsys.readouterr().err


def test_a_part_that_dies_is_a_failure_and_the_others_go_on(case, tmp_path):
    session = Session(options=options_of(["--out", str(tmp_path / "out")]), machine=MACHINE, cloud=case.cloud)

    def dies(_):
        yield judged("first", "a", True, "fine")
        raise EngineError("the GPU is gone.", fix="look")

    told = gpu_sparse3d.stamp(session)
    run(session, {"first": dies, "bars": PARTS["bars"]}, lambda: save(session, told))
    assert [finding.standing for finding in session.findings] == ["passed", "failed", *["missing"] * 3]
    data = json.loads((tmp_path / "out" / "gpu-sparse3d-nvidia-toy-9000.json").read_text())
    assert (data["exit_code"], len(data["findings"])) == (1, 5)
    assert "EngineError: the GPU is gone." in (tmp_path / "out" / "gpu-sparse3d-nvidia-toy-9000.md").read_text()
    assert "300 points" in data["frame"]


def test_tools_that_are_absent_are_findings(monkeypatch, tmp_path, case):
    monkeypatch.setenv("PATH", str(tmp_path))
    built, memory = tools.build_runtime(tmp_path), tools.check_memory("memcheck", tmp_path, "voxels")
    assert (built.standing, built.words) == ("missing", "not built: cmake and c++ cannot be found")
    assert (memory.standing, memory.words) == ("missing", "not run: compute-sanitizer cannot be found")
    assert [finding.standing for finding in measure_spconv(case, 1)] == ["missing"]


@pytest.mark.parametrize(
    ("code", "output", "right", "words"),
    [
        (0, "========= ERROR SUMMARY: 0 errors\n", True, "no error"),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", True, "no hazard"),
        (0, "========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)\n", False, "2 errors or hazards"),
        (9, "========= ERROR SUMMARY: 1 error\n", False, "1 errors or hazards, exit code 9"),
        (1, "========= ERROR SUMMARY: 0 errors\n", False, "exit code 1"),
        (0, "Target application returned an error", False, "no summary, exit code 0"),
    ],
)
def test_what_compute_sanitizer_says_is_read_to_its_summary(code, output, right, words):
    found, said = tools.clean(code, output)
    assert (found, words in said) == (right, True), said


def test_the_bytes_of_the_c_runtime_are_compared(tmp_path):
    for name in ("expected", "found"):
        (tmp_path / name).mkdir()
    assert tools.same_files(tmp_path / "expected", tmp_path / "found") == (False, "other bytes: nothing was expected")
    (tmp_path / "expected" / "bev.bin").write_bytes(b"12")
    assert tools.same_files(tmp_path / "expected", tmp_path / "found") == (False, "other bytes: bev.bin")
    shutil.copy(tmp_path / "expected" / "bev.bin", tmp_path / "found")
    assert tools.same_files(tmp_path / "expected", tmp_path / "found") == (True, "equal bytes: bev.bin")


def test_floors_and_percentiles():
    h200 = floors_ms(4.8e9, 989e9, 90, "NVIDIA H200")
    assert h200 == {"peaks_of": "h200", "bytes_floor_ms": 1.0, "flops_floor_ms": 1.0}
    assert floors_ms(1, 1, 80, "NVIDIA A30")["peaks_of"] == "a30"
    assert floors_ms(1, 1, 89, "GeForce RTX 4090")["peaks_of"] == "rtx4090"
    assert floors_ms(1, 1, 12, "another") == {}
    assert percentiles(np.arange(101.0)) == {"p50_ms": 50.0, "p99_ms": 99.0, "runs": 101}
