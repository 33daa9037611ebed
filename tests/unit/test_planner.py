"""The planner without any executor: what it reads, packs, refuses and states."""

import json
import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse3d_sample import (
    backbone_of,
    clustered_cells,
    exported,
    layer,
    plain_frame,
    tiny_detector,
    voxel_frame,
)

from dm3d_deploy.errors import EngineError, UsageError
from engines.sparse3d.describe import describe
from engines.sparse3d.entry import Frame
from engines.sparse3d.onnx_reader import read_backbone
from engines.sparse3d.packing import Lifetime, pitch_of, place, tiled_weights
from engines.sparse3d.plan import Launch, Memset, Pointer
from engines.sparse3d.plan_file import decode_plan, encode_plan
from engines.sparse3d.planner import calibrated_plan, plan_backbone
from engines.sparse3d.shapes import DEVICE
from engines.sparse3d.sites import capacities_from, frame_statistics, stage_sites
from exporters.backbone3d import backbone_model

STAGES = ("input", "stage2_down", "stage3_down", "stage4_down", "out")


@pytest.fixture(scope="module")
def detector(request):
    return tiny_detector(request.path.parents[1] / "fixtures")


@pytest.fixture(scope="module")
def backbone(detector, tmp_path_factory):
    return exported(detector, tmp_path_factory.mktemp("onnx"), 4000)


@pytest.fixture(scope="module")
def coords():
    cells = clustered_cells(np.random.default_rng(0), (41, 128, 128), 500)
    return np.pad(cells, ((0, 0), (1, 0)))


def planned(backbone, detector, rooms=4000, **options):
    capacities = dict.fromkeys(STAGES, rooms)
    return plan_backbone(backbone, frame=voxel_frame(detector, 4000), capacities=capacities, **options)


def test_the_reader_sees_stages_and_layers(backbone):
    assert tuple(stage.name for stage in backbone.stages) == STAGES
    assert [stage.grid for stage in backbone.stages] == [
        (41, 128, 128), (21, 64, 64), (11, 32, 32), (5, 16, 16), (2, 16, 16)
    ]  # fmt: skip
    assert backbone.stage("out").kernel == (3, 1, 1)
    assert backbone.stage("stage4_down").padding == (0, 1, 1)
    assert len(backbone.layers) == 13
    by_name = {item.name: item for item in backbone.layers}
    assert by_name["conv2.1.conv2"].adds == "conv2.0.0"
    assert by_name["conv2.1.conv2"].book == by_name["conv2.1.conv1"].book != by_name["conv2.0.0"].book
    assert backbone.bev_shape == (1, 32, 16, 16)


def test_rows_of_stages_are_outputs_after_map_and_status(backbone, detector):
    given = {"x_conv2": "conv2.1.conv2", "x_conv4": "conv4.1.conv2"}
    rooms = dict.fromkeys(STAGES, 4000) | {"stage4_down": 300}
    frame = voxel_frame(detector, 4000)
    plan = plan_backbone(replace(backbone, given=given), frame=frame, capacities=rooms)
    assert decode_plan(encode_plan(plan)) == plan
    assert {item.name: (item.dtype, item.shape) for item in plan.outputs[2:]} == {
        "features.x_conv2": ("fp32", (4000, 8)), "sites.x_conv2": ("i64", (3, 4000)),
        "features.x_conv4": ("fp32", (300, 16)), "sites.x_conv4": ("i64", (3, 300)),
    }  # fmt: skip
    told = describe(plan)
    assert told["outputs"]["features.x_conv4"] == "fp32[300, 16]"
    assert told["meta"]["given"] == {"x_conv2": "stage2_down", "x_conv4": "stage4_down"}
    assert told["launches_of"]["kernels_conv.give_rows"] == 2
    assert told["workspace_bytes"] == plan_backbone(backbone, frame=frame, capacities=rooms).workspace_bytes


def test_equal_inputs_give_equal_bytes_and_the_file_holds_the_plan(backbone, detector, coords):
    statistics = frame_statistics(backbone, coords, conv_rows=64)
    plan, again = (planned(backbone, detector, calibration=[statistics], keep=("input.sites",)) for _ in range(2))
    data = encode_plan(plan)
    assert data == encode_plan(again)
    assert decode_plan(data) == plan


def uses(plan):
    """First and last step at which each buffer of the workspace is named."""
    found = {}
    for number, step in enumerate(plan.steps):
        named = [step.buffer] if isinstance(step, Memset) else [a.buffer for a in step.args if isinstance(a, Pointer)]
        for index in named:
            if plan.buffers[index].kind == "workspace":
                first, _ = found.get(index, (number, number))
                found[index] = (first, number)
    return found


@pytest.mark.parametrize("points", [False, True])
def test_buffers_that_live_together_do_not_overlap(backbone, detector, points):
    plan = plan_backbone(
        backbone, frame=voxel_frame(detector, 9000, points=points), capacities=dict.fromkeys(STAGES, 4000),
        keep=("conv2.0.0", "input.sites"),
    )  # fmt: skip
    living = uses(plan)
    kept = {plan.meta["kept"][name]["buffer"] for name in ("conv2.0.0", "input.sites")}
    ends = {index: len(plan.steps) if index in kept else last for index, (_, last) in living.items()}
    shared = 0
    for a, (first_a, _) in living.items():
        for b, (first_b, _) in living.items():
            one, two = plan.buffers[a], plan.buffers[b]
            if a < b and one.offset < two.offset + two.bytes and two.offset < one.offset + one.bytes:
                assert ends[a] < first_b or ends[b] < first_a, (one.name, two.name)
                shared += 1
    assert shared > 10, "lifetimes save something"
    assert plan.workspace_bytes < sum(item.bytes for item in plan.buffers if item.kind == "workspace")


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 12), st.integers(0, 6)), min_size=1, max_size=14),
    st.randoms(use_true_random=False),
)
def test_placing_keeps_the_living_apart_in_any_order(items, random):
    lives = [Lifetime(name=f"b{i}", bytes=n, first=f, last=f + d) for i, (n, f, d) in enumerate(items)]
    offsets, total = place(lives)
    for a in lives:
        assert offsets[a.name] % 256 == 0
        assert offsets[a.name] + a.bytes <= total
        for b in lives:
            if a.name < b.name and a.first <= b.last and b.first <= a.last:
                apart = offsets[a.name] + a.bytes <= offsets[b.name] or offsets[b.name] + b.bytes <= offsets[a.name]
                assert apart
    assert total <= sum(-(-item.bytes // 256) * 256 for item in lives)
    shuffled = list(lives)
    random.shuffle(shuffled)
    assert place(shuffled) == (offsets, total)


@pytest.mark.parametrize(("cin", "cout"), [(5, 4), (16, 16), (16, 40), (24, 24), (40, 96), (64, 128), (128, 64)])
@pytest.mark.parametrize("dead", [0.0, 0.6, 1.0])
def test_tiles_hold_every_weight_and_nothing_that_is_zero(cin, cout, dead, tmp_path):
    rng = np.random.default_rng(cin)
    made = layer(rng, "a", cout, cin, key="a", dead=dead)
    (read,) = backbone_of([made], (6, 9, 9), 32, tmp_path).layers
    tiled = tiled_weights(read)
    tile_in, tile_out = tiled.tile_shape
    rebuilt = np.zeros((27, pitch_of(cin), pitch_of(cout)), np.float32)
    numbers = []
    for column, entries in enumerate(tiled.columns):
        for entry in entries:
            tap, row, number = entry & 31, (entry >> 5 & 63) * tile_in, entry >> 11
            rebuilt[tap, row : row + tile_in, column * tile_out : (column + 1) * tile_out] = tiled.tiles[number]
            numbers.append(number)
            assert tiled.tiles[number].any()
    expected = made.weight.transpose(1, 2, 3, 4, 0).reshape(27, cin, cout)
    np.testing.assert_array_equal(rebuilt[:, :cin, :cout], expected)
    assert np.abs(rebuilt).sum() == pytest.approx(np.abs(expected).sum())
    assert numbers == list(range(len(numbers)))
    side = 16 if min(cin, cout) <= 16 else 32
    assert tiled.total == 27 * math.ceil(cin / side) * math.ceil(cout / side)
    assert tiled.kept == tiled.total if dead == 0 else tiled.kept < tiled.total
    if dead == 1:
        assert tiled.kept == len(numbers) == 0


def test_layers_with_equal_lists_share_their_columns(backbone, detector):
    plan = planned(backbone, detector)
    listed = [step for step in plan.steps if isinstance(step, Launch)]
    lists = [step for step in listed if plan.kernels[step.kernel].function.endswith("tile_lists")]
    assert len(lists) == len({item.book for item in backbone.layers}) == 8
    assert all(step.grid[1] == 1 for step in lists), "dense layers of one rulebook have one column here"


def test_launches_are_few_and_stated(backbone, detector, coords):
    statistics = frame_statistics(backbone, coords, conv_rows=64)
    told = describe(planned(backbone, detector, calibration=[statistics]))
    assert json.loads(json.dumps(told)) == told
    # entry 4, four strided stages 4 each, eight rulebooks 2 each, 13 convolutions, the map
    assert told["launches"] == 4 + 4 * 4 + 8 * 2 + 13 + 1
    assert told["memsets"] == 1
    assert told["features"] == ["memset", "status"]
    assert told["cost"]["dense_multiplications"] == told["cost"]["multiplications"], "nothing is pruned"
    assert told["cost"]["multiplications"] >= told["cost"]["useful_multiplications"] > 0
    assert told["cost"]["index_bytes"] > 41 * 128 * 128 / 8 * 3
    assert told["cost"]["moved_bytes"] > told["cost"]["entry_bytes"] + told["cost"]["index_bytes"]
    assert told["layers"][0] == {
        "name": "conv_input.0", "kernel_taps": 27, "channels": [5, 4], "tiles_kept": 27, "tiles_skipped": 0,
        "stored_tile": [16, 16], "tile_products": sum(statistics.blocks["input.book.3x3x3"].tolist()),
    }  # fmt: skip
    assert told["images"] == []
    assert list(told["outputs"].items()) == [("bev", "fp16[1, 32, 16, 16]"), ("status", "i32[5]")]
    assert list(told["inputs"]) == ["features", "coords", "count"], "the order of the ONNX node"
    assert told["status"][-6:] == [
        {"word": "cut-off", "kind": "cutoff_m"}, *({"word": name, "kind": "count"} for name in STAGES)
    ]  # fmt: skip


def test_capacities_come_from_the_frames(backbone, coords):
    few, many = (frame_statistics(backbone, coords[:count], conv_rows=64) for count in (100, 500))
    assert many.counts["input"] == 500
    rooms = capacities_from([few, many], margin=1.25, max_voxels=4000)
    assert rooms["input"] == 4000
    for name in STAGES[1:]:
        assert many.counts[name] * 1.25 <= rooms[name] < many.counts[name] * 1.25 + 64 or rooms[name] == 64
    with pytest.raises(EngineError, match="0 frames"):
        capacities_from([], margin=1.2, max_voxels=10)
    with pytest.raises(EngineError, match=r"margin of 0\.5"):
        capacities_from([many], margin=0.5, max_voxels=10)


def test_one_call_plans_for_calibration_frames(detector, coords, tmp_path):
    backbone, frame = exported(detector, tmp_path, 1000), voxel_frame(detector, 1000)
    told = {"frame": frame, "calibration": [frame_statistics(backbone, c, conv_rows=64) for c in (coords, coords[:9])]}
    plan = calibrated_plan(backbone, margin=2, capacities={"out": 7}, **told)
    assert plan.capacities["input"] == 1000
    assert plan.capacities["out"] == 7
    assert plan.capacities["stage2_down"] % 64 == 0
    assert plan.meta["cost"]["frames"] == 2
    with pytest.raises(UsageError, match=r"no stage 'outer'.*'out'"):
        calibrated_plan(backbone, margin=2, capacities={"outer": 7}, **told)


def test_sites_are_those_of_a_dense_mask(backbone, coords):
    sites = stage_sites(backbone, np.concatenate([coords, [[0, -1, 0, 0], [0, 0, 0, 128]]]))
    mask = np.zeros((41, 128, 128), np.bool_)
    mask[tuple(coords[:, 1:].T)] = True
    for stage in backbone.stages[1:]:
        padded = np.pad(mask, [(p, k) for p, k in zip(stage.padding, stage.kernel, strict=True)])
        mask = np.zeros(stage.grid, np.bool_)
        for offset in np.ndindex(stage.kernel):
            steps = (slice(o, o + s * n, s) for o, s, n in zip(offset, stage.stride, stage.grid, strict=True))
            mask |= padded[tuple(steps)]
        np.testing.assert_array_equal(sites[stage.name], np.flatnonzero(mask))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"capacities": {"input": 10}}, "do not give each stage"),
        ({"capacities": dict.fromkeys(STAGES, 0)}, "do not give each stage"),
        ({"keep": ("input.site",)}, "no array 'input.site' to keep"),
        ({"frame": plain_frame((41, 128, 100), 10)}, "does not fit the backbone's grid"),
        ({"frame": plain_frame((41, 128, 128), 0)}, "a frame of 0 rows"),
        (
            {"frame": replace(plain_frame((41, 128, 128), 2**19), points=True)},
            "524288 points may overflow the sums of a cell",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(backbone, detector, change, words):
    whole = {"frame": voxel_frame(detector, 4000), "capacities": dict.fromkeys(STAGES, 100)} | change
    with pytest.raises(UsageError, match=words):
        plan_backbone(backbone, **whole)


def test_cells_that_are_not_square_have_no_rings(backbone):
    frame = Frame(
        rows=10, points=False, point_range_m=(0, 0, 0, 1, 1, 1), voxel_size_m=(0.1, 0.2, 0.1), grid_zyx=(41, 128, 128)
    )
    with pytest.raises(UsageError, match=r"cells of 0\.1 x 0\.2 m have no rings"):
        plan_backbone(backbone, frame=frame, capacities=dict.fromkeys(STAGES, 100))


def test_indices_beyond_32_bits_are_refused(tmp_path):
    made = layer(np.random.default_rng(0), "a", 4, 4, key="a")
    for grid, rows, words in (((4096, 1024, 512), 10, r"has 2\*\*31 cells"), ((8, 9, 9), 10**8, "32-bit indices")):
        backbone = backbone_of([made], grid, 10, tmp_path)
        with pytest.raises(EngineError, match=words):
            plan_backbone(backbone, frame=plain_frame(grid, 10), capacities={"input": rows})


def changed(backbone_layers, tmp_path, change):
    model = backbone_model(backbone_layers, grid_zyx=(6, 9, 9), max_voxels=32, stages=("x_a", "x_b"))
    change(model, next(function for function in model.functions if function.name == "SparseBackbone3d"))
    path = tmp_path / "changed.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _without_function(model, body):
    model.functions.remove(body)


def _without_relu(model, body):
    relu = next(node for node in body.node if node.op_type == "Relu")
    relu.output[0] = "other"


def _without_weight(model, body):
    weight = next(node for node in body.node if node.output[0].endswith(".weight"))
    weight.output[0] = "elsewhere"


def _strange_tap(model, body):
    node = next(node for node in body.node if node.op_type.startswith("SubMConv3d"))
    next(attribute for attribute in node.attribute if attribute.name == "taps").ints[3] = 27


def _large_kernel(model, body):
    node = next(node for node in body.node if node.op_type.startswith("SubMConv3d"))
    next(attribute for attribute in node.attribute if attribute.name == "kernel").ints[:] = [5, 5, 5]


def _sites_before_features(model, body):
    outputs = model.graph.node[0].output
    outputs[2:4] = [outputs[3], outputs[2]]


def _no_layer_given(model, body):
    body.output[4] = "b.sum"


def _other_sites_given(model, body):
    body.output[5] = "input.order"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without_function, "does not hold one dm3d::SparseBackbone3d node"),
        (_without_relu, "ends in 'other'"),
        (_without_weight, r"holds no fp32 weights \[taps, Cin, Cout\]"),
        (_strange_tap, "at most 31 can be run"),
        (_large_kernel, "at most 31 can be run"),
        (
            _sites_before_features,
            r"are \['bev', 'status', 'sites.x_a', .*, not bev, status, and features and sites",
        ),
        (_no_layer_given, r"features.x_b is 'b.sum', which is no layer with the sites given"),
        (_other_sites_given, r"features.x_b is 'b', which is no layer with the sites given"),
    ],
)
def test_files_that_are_no_backbone_are_refused(change, words, tmp_path):
    rng = np.random.default_rng(0)
    layers = [layer(rng, "a", 4, 4, key="a"), layer(rng, "b", 4, 4, key="a")]
    with pytest.raises(EngineError, match=words):
        read_backbone(changed(layers, tmp_path, change))


def test_a_file_that_is_not_onnx_is_refused(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"\xff" * 99)
    with pytest.raises(EngineError, match="cannot be read as ONNX"):
        read_backbone(path)
    path.write_bytes(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])).SerializeToString())
    with pytest.raises(EngineError, match="is no 3D backbone"):
        read_backbone(path)


@pytest.mark.parametrize(
    ("grid", "channels", "voxels", "limit_mib"),
    [((41, 1024, 1024), 5, 60_000, 160), ((41, 1440, 1440), 5, 160_000, 400)],
)
def test_the_workspace_of_the_real_backbone_stays_within_its_bar(grid, channels, voxels, limit_mib, tmp_path):
    rng = np.random.default_rng(0)
    layers = [layer(rng, "in", 16, channels, key="s0")]
    for number, (width, pad) in enumerate([(16, None), (32, 1), (64, 1), (128, 0)]):
        if pad is not None:
            cin = len(layers[-1].bias)
            layers.append(layer(rng, f"d{number}", width, cin, stride=(2, 2, 2), padding=(pad, 1, 1), key=f"d{number}"))
        for block in range(2):
            before = layers[-1].name
            for half in range(2):
                name = f"s{number}.{block}.{half}"
                layers.append(layer(rng, name, width, width, key=f"s{number}", adds=before if half else ""))
    column = {"kernel": (3, 1, 1), "stride": (2, 1, 1), "padding": (0, 0, 0), "submanifold": False}
    layers.append(layer(rng, "out", 128, 128, key="out", **column))
    backbone = backbone_of(layers, grid, voxels, tmp_path)
    # twice the voxels in the second stage is more than any frame measured needs
    capacities = {"input": voxels, "d1": 2 * voxels, "d2": voxels, "d3": voxels // 2, "out": voxels // 2}
    for points in (False, True):
        frame = Frame(
            rows=400_000 if points else voxels, points=points, point_range_m=(-54, -54, -5, 54, 54, 3),
            voxel_size_m=(108 / grid[2], 108 / grid[2], 0.2), grid_zyx=(40, *grid[1:]),
        )  # fmt: skip
        plan = plan_backbone(backbone, frame=frame, capacities=capacities, shapes=DEVICE)
        assert plan.workspace_bytes <= limit_mib * 2**20
        assert len(plan.steps) <= 65
