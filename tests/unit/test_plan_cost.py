"""What a plan states of its bytes and multiplications, counted again by hand."""

from dataclasses import replace

import numpy as np
import pytest
from sparse3d_sample import backbone_of, clustered_cells, exported, layer, plain_frame, tiny_detector, voxel_frame

from dm3d_deploy.errors import UsageError
from engines.sparse3d.describe import describe
from engines.sparse3d.packing import tiled_weights
from engines.sparse3d.planner import plan_backbone
from engines.sparse3d.sites import frame_statistics, predicted_tiles


def test_a_plan_from_points_costs_its_own_entry(request, tmp_path):
    """Counted by hand: 500 cells of 1,500 points with 5 columns, 16 channels a row, 4,000 rows of room, in fp16."""
    detector = tiny_detector(request.path.parents[1] / "fixtures")
    backbone = exported(detector, tmp_path, 4000)
    cells = clustered_cells(np.random.default_rng(0), (41, 128, 128), 500)
    statistics = frame_statistics(backbone, np.pad(cells, ((0, 0), (1, 0))), conv_rows=64, points=1500)
    rooms = dict.fromkeys((stage.name for stage in backbone.stages), 4000)
    voxels, points = (
        describe(
            plan_backbone(
                backbone, frame=voxel_frame(detector, 4000, points=points), capacities=rooms,
                calibration=[statistics],
            )
        )
        for points in (False, True)
    )  # fmt: skip
    # a voxel: z, y, x, its key written, its bit set; key, bits, prefix read, site written, five columns read
    assert voxels["cost"]["entry_bytes"] == 500 * (5 + 9) * 4 + 500 * 16 * 2
    enter_points = 1500 * (5 + 1 + 1)  # five columns, key written, bit set
    rings = 4096 + 500 + 4096  # cleared, a new cell counted in its ring, read by the cut-off
    sum_points = 1500 * (1 + 2 + 1 + 1 + 5 + 2 * 5)  # key, bits and prefix, site, member, five columns, 64-bit sums
    cleared = 4000 * (2 * 5 + 1)
    mean_features = 500 * (2 * 5 + 1)
    by_hand = (enter_points + rings + sum_points + cleared + mean_features) * 4 + 500 * 16 * 2
    assert points["cost"]["entry_bytes"] == by_hand
    for name in ("index_bytes", "convolution_bytes", "map_bytes", "multiplications"):
        assert points["cost"][name] == voxels["cost"][name]
    moved = [told["cost"]["moved_bytes"] - told["cost"]["entry_bytes"] for told in (voxels, points)]
    assert moved[0] == moved[1] == sum(voxels["cost"][f"{name}_bytes"] for name in ("index", "convolution", "map"))
    assert voxels["cost"]["given_bytes"] == 0
    own = {"ring_cutoff": 1, "drop_far": 1, "sum_points": 1, "mean_features": 1}
    assert points["launches"] == voxels["launches"] + 3
    assert {
        name.partition(".")[2]: count for name, count in points["launches_of"].items()
        if name not in voxels["launches_of"]
    } == {"enter_points": 1, **own}  # fmt: skip
    with pytest.raises(UsageError, match="do not say how many points they had"):
        plan_backbone(
            backbone, frame=voxel_frame(detector, 9, points=True), capacities=rooms,
            calibration=[replace(statistics, points=None)],
        )  # fmt: skip


def test_rows_that_leave_cost_what_is_read_of_the_frame_and_written_of_the_capacity(tmp_path):
    """By hand: 200 rows of 8 channels in fp16 and their keys are read, 256 of 8 in fp32 and 64-bit z, y, x written."""
    coords = np.pad(clustered_cells(np.random.default_rng(0), (8, 20, 20), 200), ((0, 0), (1, 0)))
    made = layer(np.random.default_rng(1), "a", 8, 4, key="a")
    backbone = backbone_of([made], (8, 20, 20), 256, tmp_path)
    statistics = [frame_statistics(backbone, coords, conv_rows=64)]
    room = {"frame": plain_frame((8, 20, 20), 256), "capacities": {"input": 256}, "calibration": statistics}
    given, without = (
        plan_backbone(replace(backbone, given=rows), **room).meta["cost"] for rows in ({"x_a": "a"}, {})
    )  # fmt: skip
    assert given["given_bytes"] == 200 * (8 * 2 + 4) + 256 * (8 + 6) * 4
    assert given["moved_bytes"] == without["moved_bytes"] + given["given_bytes"]


def test_a_pruned_tile_is_predicted_to_cost_nothing(tmp_path):
    rng = np.random.default_rng(0)
    coords = np.pad(clustered_cells(rng, (8, 20, 20), 200), ((0, 0), (1, 0)))
    counts = []
    for dead in (0.0, 0.5):
        made = layer(np.random.default_rng(1), "a", 16, 16, key="a", dead=dead)
        backbone = backbone_of([made], (8, 20, 20), 256, tmp_path)
        tiled = {"a": tiled_weights(backbone.layers[0])}
        statistics = frame_statistics(backbone, coords, conv_rows=64)
        counts.append(int(predicted_tiles(backbone, tiled, statistics)[0]))
        assert counts[-1] == sum(statistics.blocks["input.book.3x3x3"][entry & 31] for entry in tiled["a"].columns[0])
        plan = plan_backbone(
            backbone, frame=plain_frame((8, 20, 20), 256), capacities={"input": 256}, calibration=[statistics]
        )
        assert plan.meta["cost"]["multiplications"] == counts[-1] * 64 * 16 * 16
        assert plan.meta["cost"]["dense_multiplications"] == counts[0] * 64 * 16 * 16
    assert counts[1] < 0.75 * counts[0]
