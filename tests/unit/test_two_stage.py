"""The detectors with two stages in small: torch against the deployed graphs, batches, a whole build, refusals."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from run_sample import Noted, tiny_recipe
from test_pcdet_live import EasyDict, SECONDNet
from two_stage_sample import VARIANTS, deployed_from, variant, variant_text
from zoo_sample import small_cloud_points

from calib.gradients import sketch_gradients
from calib.pool import FramePool
from dm3d_deploy import build as builder
from dm3d_deploy.api import detector_from_pcdet
from dm3d_deploy.artifacts import Artifact, Engine
from dm3d_deploy.config import config_from_text, load_config
from dm3d_deploy.detect import load_run
from dm3d_deploy.detect_in_torch import detect_in_torch
from dm3d_deploy.detect_two_stage import GEOMETRY
from dm3d_deploy.device import device_named
from dm3d_deploy.errors import EngineError, ExportError, InternalError, UsageError
from dm3d_deploy.geometry.decode import decoded
from dm3d_deploy.geometry.rois import array_from_rois, rois_from_array, second_maps
from dm3d_deploy.geometry.voxelize import voxelize
from dm3d_deploy.inspection import describe_path
from dm3d_deploy.model_table import MULTIPLICATIONS, model_rows
from dm3d_deploy.models.checkpoints import save_weights
from dm3d_deploy.models.detector import build_detector, prunable_layers, sparse_pair_counts, tensors_from_voxels
from dm3d_deploy.models.outputs import Scene
from dm3d_deploy.models.seeded import seed_weights
from dm3d_deploy.plan_facts import describe_plan_of_run
from dm3d_deploy.pointcloud import PointCloud
from dm3d_deploy.profiling import cells_read
from dm3d_deploy.pruning.contracts import Layer
from dm3d_deploy.pruning.estimate import estimated_profile
from dm3d_deploy.pruning.groups import channel_groups
from dm3d_deploy.pruning.normalisation import output_scale
from dm3d_deploy.pruning.patterns import native_from_taps, taps_from_native
from dm3d_deploy.recipe import Recipe
from dm3d_deploy.stages import RunContext
from dm3d_deploy.steps import deploy
from dm3d_deploy.steps.layers import layers_of
from dm3d_deploy.steps.report import out_of_scope
from dm3d_deploy.training.loop import check_trainable
from engines.tensorrt_rtx import rtx_missing
from exporters.graph_checks import check_graph
from exporters.graph_files import interface, safe_load
from exporters.second_stage import export_second_stage


def built(name):
    detector = build_detector(variant(name))
    seed_weights(detector, 3)
    return detector


def cloud_of(seed=0):
    columns = ("x", "y", "z", "intensity")
    return PointCloud(points=small_cloud_points(4, seed=seed), columns=columns, source="a test")


def outputs_of(detector, seeds=(0,), rois=None):
    frames = [voxelize(cloud_of(seed), detector.config) for seed in seeds]
    features, coords = zip(*(tensors_from_voxels(frame) for frame in frames), strict=True)
    for index, cells in enumerate(coords):
        cells[:, 0] = index
    scenes = [Scene(points=frame.points, rois=rois[i] if rois else None) for i, frame in enumerate(frames)]
    with torch.no_grad():
        return detector.outputs(torch.cat(features), torch.cat(coords), len(frames), scenes)


@pytest.mark.parametrize("name", VARIANTS)
def test_frames_of_a_batch_are_computed_as_alone(name):
    detector = built(name)
    alone = [outputs_of(detector, (seed,)) for seed in (0, 1)]
    both = outputs_of(detector, (0, 1), [found.rois[0] for found in alone])
    for key in second_maps(detector.config):
        found = both.maps[key]
        expected = torch.cat([one.maps[key] for one in alone], dim=3)
        assert torch.allclose(found, expected, atol=1e-5)
        assert float(found.std()) > 1e-3  # noise in, and not the same answer everywhere


@pytest.mark.parametrize("name", VARIANTS)
def test_a_detector_of_two_stages_needs_a_scene_and_rois(name):
    detector = built(name)
    features, coords = tensors_from_voxels(voxelize(cloud_of(), detector.config))
    with pytest.raises(InternalError, match="0 scenes for a batch of 1"):
        detector(features, coords)
    maps = {key: value.numpy() for key, value in outputs_of(detector).maps.items()}
    with pytest.raises(InternalError, match="with RoIs exactly if it has a second stage"):
        decoded(maps, detector.config)


def test_rois_survive_the_way_to_a_table_and_back():
    found = outputs_of(built("pv-rcnn")).rois[0]
    table = array_from_rois(found)
    again = array_from_rois(rois_from_array(table, variant("pv-rcnn")))
    np.testing.assert_array_equal(table, again)
    assert table.shape == (12, 10)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_reach_every_layer_of_both_stages(name):
    detector = built(name)
    found = outputs_of(detector)
    scale = output_scale([{key: value.numpy() for key, value in found.maps.items()}], 50)
    features, coords = tensors_from_voxels(voxels := voxelize(cloud_of(), detector.config))
    layers = [layer.name for layer in prunable_layers(detector)]
    settings = {
        "layers": layers, "scale": scale.as_json(), "sketches": 1, "seed": 0, "lambda_box": 1.0, "lambda_score": 1.0,
        "scenes": [Scene(points=voxels.points, rois=found.rois[0])],
    }  # fmt: skip
    rows = sketch_gradients(detector, features, coords, 0, settings)
    dead = [layer for layer in layers if not np.abs(rows[layer]).any()]
    assert dead == []


@pytest.mark.parametrize("name", VARIANTS)
def test_layers_are_counted_and_their_weights_turned_to_matrices_and_back(name):
    detector = built(name)
    _, coords = tensors_from_voxels(voxelize(cloud_of(), detector.config))
    layers = {layer.name: layer for layer in layers_of(detector, [sparse_pair_counts(detector, coords)])}
    second = {key: layer for key, layer in layers.items() if key.startswith(("pfe", "point_head", "roi_head"))}
    assert {len(layer.shape) for layer in second.values()} == ({2, 3, 4})
    assert [key for key, layer in second.items() if layer.final] == {
        "voxel-rcnn": ["roi_head.cls_pred_layer", "roi_head.reg_pred_layer"],
        "pv-rcnn": ["point_head.cls_layers.6", "roi_head.cls_layers.7", "roi_head.reg_layers.7"],
    }[name]
    assert all((layer.part, layer.kind) == ("head", "linear") for layer in second.values())
    for key, layer in second.items():
        weight = detector.get_parameter(f"{key}.weight").detach().numpy()
        taps = taps_from_native(layer, weight)
        np.testing.assert_array_equal(taps[0], weight.reshape(len(weight), -1).T)
        np.testing.assert_array_equal(native_from_taps(layer, taps), weight)
    groups = channel_groups(tuple(layers.values()))
    written = {slot.layer for group in groups for slot in group.written}
    assert "backbone_3d.conv3.1.0" in written
    assert not written & ({*second} | {f"backbone_3d.conv{i}.2.0" for i in (2, 3, 4)} | {"backbone_3d.conv_out.0"})


def test_an_estimate_says_that_the_second_stage_is_not_in_it():
    entries = yaml.safe_load(load_config("voxel-rcnn").text)
    entries["MODEL"]["BACKBONE_3D"] = {"NAME": "VoxelResBackBone8x"}  # the one that times were published of
    detector = build_detector(config_from_text(yaml.safe_dump(entries), "residual.yaml"))
    coords = torch.tensor([[0, 10, 800, 700], [0, 10, 801, 700], [0, 12, 900, 100]])
    layers = layers_of(detector, [sparse_pair_counts(detector, coords)])
    found = estimated_profile(
        layers, cells_read(detector, layers), device_named("orin"), voxels=40_000, model_name="voxel-rcnn"
    )
    assert found.notes[-1].startswith("the second stage, its keypoints and its pooling are not in it")
    assert all(layer.dense_ms == 0 for layer in found.layers if layer.layer.startswith("roi_head"))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_live_model_has_written_its_inputs_into_its_configuration(name):
    inner, entries = built(name), yaml.safe_load(variant_text(name))
    sources = inner.config.second_stage.sources
    head = entries["MODEL"]["ROI_HEAD"]["ROI_GRID_POOL"]
    if name == "voxel-rcnn":
        for source in sources:
            mlps = head["POOL_LAYERS"][source.name]["MLPS"]
            mlps[0].insert(0, source.channels)
    else:
        for widths in head["MLPS"]:
            widths.insert(0, sources[0].channels + 3)
        for source in inner.config.second_stage.keypoints.sources:
            for widths in entries["MODEL"]["PFE"]["SA_LAYER"][source.name]["MLPS"]:
                widths.insert(0, source.channels + 3)
    model = SECONDNet(EasyDict(entries), inner)
    found = detector_from_pcdet(model)
    assert found.config.second_stage == inner.config.second_stage
    assert all(torch.equal(value, inner.state_dict()[key]) for key, value in found.state_dict().items())
    again = detector_from_pcdet(SECONDNet(EasyDict(yaml.safe_load(variant_text(name))), inner))
    assert again.config.second_stage == inner.config.second_stage


def test_training_them_is_refused():
    with pytest.raises(UsageError, match="small-pv-rcnn has a second stage, and no targets are made here for its RoIs"):
        check_trainable(variant("pv-rcnn"))


def test_a_linear_weight_of_extent_two_is_refused():
    with pytest.raises(InternalError, match=r"\(4, 3, 2\) is no linear weight"):
        Layer(name="x", part="head", kind="linear", shape=(4, 3, 2), positions=np.ones(2))


def test_a_weight_that_is_not_finite_is_not_exported(tmp_path):
    detector = built("voxel-rcnn")
    with torch.no_grad():
        detector.roi_head.cls_pred_layer.bias.fill_(float("nan"))
    with pytest.raises(ExportError, match=r"roi_head.cls_pred_layer holds weights that are not finite"):
        export_second_stage(detector, tmp_path / "second.onnx")


@pytest.mark.parametrize("name", VARIANTS)
def test_graphs_and_numpy_say_what_torch_says(tmp_path, name):
    detector, cloud = built(name), cloud_of(9)
    deployed = deployed_from(detector, tmp_path)
    for graph in ("backbone", "head", "second"):
        check_graph(tmp_path / f"{graph}.onnx")
    _, maps, rois = deployed.outputs_at(deployed.voxels_of(cloud), None)
    expected = outputs_of(detector, (9,))
    np.testing.assert_array_equal(rois.cells, expected.rois[0].cells)
    for key in second_maps(detector.config):
        np.testing.assert_allclose(maps[key], expected.maps[key].numpy(), atol=1e-4)
    ours, theirs = deployed.detect(cloud), detect_in_torch(detector, cloud)
    assert len(ours) == len(theirs) > 0
    np.testing.assert_allclose(ours.boxes.centre, theirs.boxes.centre, atol=1e-3)
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-4)
    assert ours.labels.tolist() == theirs.labels.tolist()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run of a small PV-RCNN over its own frames, pruned in the second stage too."""
    root = tmp_path_factory.mktemp("two-stage")
    frames = root / "frames"
    frames.mkdir()
    for seed in range(4):
        np.save(frames / f"frame{seed}.npy", small_cloud_points(4, seed=seed))
    (root / "small.yaml").write_text(variant_text("pv-rcnn"))
    recipe = tiny_recipe(
        frames, model=str(root / "small.yaml"), scope="model", calibration_frames=1, candidates=1, bench_repeats=1
    )  # fmt: skip
    digest = builder.source_digest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "source_digest", lambda: digest)
        builder.build(recipe, root / "run")
    return root / "run"


def test_a_build_compares_both_stages_and_says_what_stays_outside_the_graphs(run):
    found = json.loads((run / "work" / "verification.json").read_text())["parity"]
    rows = {row["output"] for row in found}
    assert {"rcnn_cls", "rcnn_reg", "proposals before NMS", "proposals", "boxes before NMS", "boxes"} <= rows
    assert all(row["passed"] for row in found)
    report = json.loads((run / "report.json").read_text())
    told = json.dumps(report)
    assert GEOMETRY in told
    assert "in numpy on the host" in report["latency_note"]
    layers = json.loads((run / "work" / "layers.json").read_text())
    (outside,) = out_of_scope(Recipe(model="m", target=0.5), layers, two_stages=True)
    assert "roi_head" in outside["layer"]
    assert "outside --scope backbone: " in outside["reason"]
    assert "answers at the dense detector's proposals" in outside["reason"]
    assert out_of_scope(Recipe(model="m", target=0.5, scope="model"), layers, two_stages=True) == []
    latency = json.loads((run / "work" / "latency.json").read_text())["latency"]
    assert {GEOMETRY, "RoI head", "3D", "BEV + head", "decode + NMS"} <= {row["stage"] for row in latency}


def test_the_plans_of_a_run_give_out_what_the_second_stage_reads(run):
    pytest.importorskip("triton")
    report = json.loads((run / "report.json").read_text())
    assert not [row for row in report["skipped"] if row["layer"].startswith("3D")]
    assert (report["plan"]["standing"], len(report["plan"]["devices"])) == ("compiled, not run on a device", 1)
    graph = {value.name for value in safe_load(run / "onnx" / "backbone3d.onnx").graph.output}
    for kind in ("plan", "points_plan"):
        told = describe_plan_of_run(run, kind)
        assert set(told["outputs"]) == graph
        assert told["outputs"]["sites.x_conv4"] == f"i64[3, {told['capacities']['stage4_down']}]"
        assert told["launches_of"]["kernels_conv.give_rows"] == len(told["meta"]["given"]) == 4
        assert [row["sm"] for row in told["images"]] == ["sm_87"]


@pytest.fixture
def rtx():
    if rtx_missing() is not None:
        pytest.skip(str(rtx_missing()))


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_an_engine_of_the_second_stage_takes_what_the_plan_gives_out(run, tmp_path):
    root = shutil.copytree(run, tmp_path / "run")
    builder.rerun(root, ("engine", "report"), changes={"device": "rtx4090"})
    report = json.loads((root / "report.json").read_text())
    head, second = report["engines"]
    assert (head["path"], head["rows"]) == ("engines/bev_head.rtx.engine", [])
    assert (second["path"], second["precision"]) == ("engines/second_stage.rtx.engine", "fp32")
    assert (second["built_for"], second["standing"], second["sparsity"]) == (["sm_89"], "built, not run here", None)
    rooms = describe_plan_of_run(run)["capacities"]
    points = describe_plan_of_run(run, "points_plan")["inputs"]["points"]
    told = {row["dimension"]: (row["least"], row["most"]) for row in second["rows"]}
    assert told == {
        "rows_of_places": (8, 12 * 8),  # 12 RoIs of two places a side
        **{f"rows_of_x_conv{n}": (1, rooms[f"stage{n}_down"]) for n in (2, 3, 4)},
        "rows_of_x_conv1": (1, 4000),
        "rows_of_raw_points": (1, int(points.split("[")[1].split(",")[0])),
    }
    sources = {row["source"] for row in second["rows"]}
    assert "NMS_POST_MAXSIZE 12 x GRID_SIZE 2 ^ 3 of the configuration" in sources
    assert {"capacity of x_conv4 in the 3D plan", "points that the 3D plan from points takes"} < sources
    listed = json.loads((root / "engines" / "second_stage.rtx.engine.layers.json").read_text())
    nodes = safe_load(root / "onnx" / "second_stage.onnx").graph.node
    products = {f"node_of_{node.output[0]}" for node in nodes if node.op_type == "MatMul"}
    done = {node for layer in listed["layers"] for node in layer["onnx_nodes"]}
    assert len(products) > 20
    assert products <= done <= {f"node_of_{node.output[0]}" for node in nodes}
    assert listed["rows"]["rows_of_places"]["most"] == 96
    assert not [row for row in report["skipped"] if row["layer"].startswith("engine of")]
    page = (root / "report.html").read_text()
    assert "8 to 96 rows_of_places (NMS_POST_MAXSIZE 12 x GRID_SIZE 2 ^ 3 of the configuration)" in page


def test_no_plan_says_no_rows_and_the_report_says_so(run, tmp_path, monkeypatch):
    root = shutil.copytree(run, tmp_path / "run")
    path = root / "engines" / "backbone3d" / "resources.json"
    info = json.loads(path.read_text())
    info["skipped"].append({"layer": "3D plan from points", "reason": "it cannot be"})
    path.write_text(json.dumps(info))
    made, watch = [], Noted()

    def build_nothing(onnx_path, engine_path, **given):
        made.append(engine_path)
        artifact = Artifact(path=engine_path, kind="engine", digest="0" * 64, bytes=1)
        return Engine(
            artifact=artifact, backend="x", version="1", built_for=given["targets"], precision="fp16", layers=1,
            ran_here=False,
        )  # fmt: skip

    monkeypatch.setattr("engines.tensorrt_rtx.rtx_missing", lambda: None)
    monkeypatch.setattr("engines.tensorrt_rtx.build_rtx_engine", build_nothing)
    recipe = tiny_recipe(tmp_path, device="rtx4090")
    with FramePool() as pool:
        deploy.engine(RunContext(root=root, recipe=recipe, watch=watch, pool=pool))
    assert made == ["engines/bev_head.rtx.engine"]
    reason = "a 3D plan from points would say how many rows it reads, and there is none; ONNX Runtime runs the graph"
    skipped = json.loads((root / "engines" / "engines.json").read_text())["skipped"]
    assert skipped == [{"layer": "engine of the second stage", "reason": reason}]
    assert watch.notes == [f"no engine of the second stage: {reason}"]


def test_a_run_detects_and_prunes_its_second_stage(run):
    found = load_run(run, threads=1).detect(cloud_of(9))
    assert np.isfinite(found.boxes.centre).all()
    masks = {row["layer"]: row for row in json.loads((run / "work" / "masks.json").read_text())}
    second = [row for name, row in masks.items() if name.startswith(("pfe", "roi_head")) and row["pattern"] != "dense"]
    assert second
    assert sum(row["kept_macs"] for row in second) < sum(row["dense_macs"] for row in second)


def test_the_graph_of_the_second_stage_has_open_rows_and_refuses_other_columns(run):
    deployed = load_run(run, threads=1)
    graph = safe_load(run / "onnx" / "second_stage.onnx").graph
    shapes = interface(list(graph.input))
    assert {name: tuple(value[1]) for name, value in shapes.items()} == {
        name: shape for name, (_, shape) in deployed.second.inputs.items()
    }
    assert all(shape[0] == -1 for name, (_, shape) in shapes.items() if name.startswith(("features.", "rois.")))
    name, (_, shape) = next((n, s) for n, s in deployed.second.inputs.items() if n.startswith("features."))
    wrong = {
        n: np.zeros([2 if size < 0 else size for size in s], kind) for n, (kind, s) in deployed.second.inputs.items()
    }
    wrong[name] = np.zeros((2, shape[1] + 1), np.float32)
    with pytest.raises(EngineError, match=rf"input '{name}' must be float32 \[-1, {shape[1]}\]"):
        deployed.second.run(wrong)


def test_a_checkpoint_is_guessed_by_its_second_stage(tmp_path):
    for name in ("pv-rcnn", "second", "voxel-rcnn"):
        detector = build_detector(load_config(name))
        save_weights(detector, tmp_path / "w.safetensors")
        assert describe_path(tmp_path / "w.safetensors")["looks_like"].startswith(f"{name}, by its classes")


def test_models_tell_the_second_stage_and_its_multiplications():
    rows = {row["model"]: row for row in model_rows()}
    assert rows["voxel-rcnn"]["parts"].endswith("AnchorHeadSingle, VoxelRCNNHead")
    assert rows["pv-rcnn"]["parts"].endswith("VoxelSetAbstraction, PointHeadSimple, PVRCNNHead")
    assert rows["second"]["MACs of second stage"] is None
    # by hand, 4,096 keypoints: as PV-RCNN for KITTI, but for two sources
    groups = [(16, 4, 16)] * 2 + [(16, 67, 64), (32, 67, 64)] * 2
    keypoints = 4096 * sum(samples * (first * width + width * width) for samples, first, width in groups)
    keypoints += 4096 * (544 * 128 + 544 * 256 + 256 * 256 + 256)
    heads = 100 * (2 * (256 * 256 + 256 * 256) + 256 * 256 + 256 * (1 + 7))
    rois = 2 * 21600 * 16 * (131 * 64 + 64 * 64) + 100 * 6**3 * 128 * 256
    assert MULTIPLICATIONS["pv-rcnn-once"].second == keypoints + rois + heads
