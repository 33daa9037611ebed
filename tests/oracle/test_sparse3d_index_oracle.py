"""Sites, rulebooks, tap masks and tile lists of many small frames, against loops over dictionaries."""

import itertools

import numpy as np
import pytest
from sparse3d_sample import backbone_of, layer, padded, plain_frame

from engines.sparse3d.interpreter import interpret
from engines.sparse3d.packing import tiled_weights
from engines.sparse3d.planner import plan_backbone
from engines.sparse3d.shapes import KernelShapes

pytest.importorskip("triton")
# small blocks: several programs, several blocks per program, a last block that is not full
SMALL = KernelShapes(conv_rows=16, entry_rows=32, strided_rows=32, book_blocks=2, scan_words=4, bev_cells=32)
ROOM = 128
NETWORKS = {
    "cubes": ((3, 5, 7), (3, 3, 3), {"kernel": (3, 3, 3), "stride": (2, 2, 2), "padding": (1, 1, 1)}),
    "a plane": ((1, 9, 12), (1, 3, 3), {"kernel": (1, 3, 3), "stride": (1, 2, 3), "padding": (0, 1, 0)}),
    "columns": ((11, 2, 5), (3, 1, 1), {"kernel": (3, 1, 1), "stride": (2, 1, 1), "padding": (0, 0, 0)}),
    "even": ((4, 6, 5), (1, 1, 3), {"kernel": (2, 2, 2), "stride": (2, 1, 1), "padding": (1, 0, 1)}),
}


def rows_at(cells, outputs, taps, stride, padding):
    """pairs[tap][output] = input row or -1, by looking every cell up."""
    row_of = {cell: row for row, cell in enumerate(cells)}
    return [
        [
            row_of.get(tuple(o * s - p + k for o, s, p, k in zip(out, stride, padding, tap, strict=True)), -1)
            for out in outputs
        ]
        for tap in taps
    ]


def reached(cells, grid, kernel, stride, padding):
    """Output cells under whose kernel any cell lies, in raster order."""
    sizes = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(grid, padding, kernel, stride, strict=True)]
    known = set(cells)
    every = itertools.product(*map(range, sizes))
    taps = list(itertools.product(*map(range, kernel)))
    found = [
        out
        for out in every
        if any(
            tuple(o * s - p + k for o, s, p, k in zip(out, stride, padding, tap, strict=True)) in known for tap in taps
        )
    ]
    return found, sizes


def frames_of(grid, rng):
    total = int(np.prod(grid))
    counts = [0, 1, 2, total, total - 1, min(33, total), *rng.integers(1, total, 6).tolist()]
    for count in counts:
        flat = rng.choice(total, count, replace=False)
        yield np.stack(np.unravel_index(flat, grid), axis=1)


def check_lists(run, name, tiled, blocks_of_taps):
    """Each block lists the stored tiles whose tap it needs, in their order."""
    lists, lengths = run.kept[f"{name}.list"], run.kept[f"{name}.length"]
    for block, needed in enumerate(blocks_of_taps):
        expected = [entry for entry in tiled.columns[0] if entry & 31 in needed]
        assert lists[block, 0, : lengths[block, 0]].tolist() == expected


@pytest.mark.parametrize("kind", NETWORKS)
def test_many_frames_give_the_index_of_dictionaries(kind, tmp_path):
    rng = np.random.default_rng(0)
    grid, same, down = NETWORKS[kind]
    layers = [
        layer(rng, "a", 16, 3, kernel=same, submanifold=True, key="a"),
        layer(rng, "d", 16, 16, submanifold=False, key="d", dead=0.4, **down),
    ]
    backbone = backbone_of(layers, grid, ROOM, tmp_path)
    books = {item.name: item.book for item in backbone.layers}
    keep = [f"{book}.{part}" for book in books.values() for part in ("pairs", "taps", "list", "length")]
    plan = plan_backbone(
        backbone, frame=plain_frame(grid, ROOM), capacities={"input": ROOM, "d": 256}, precision="fp32", shapes=SMALL,
        keep=(*keep, "input.sites", "d.sites"),
    )  # fmt: skip
    frames = list(frames_of(grid, rng))
    feeds = [padded(np.ones((len(cells), 3), np.float32), cells, ROOM) for cells in frames]
    tiled = {item.name: tiled_weights(item) for item in backbone.layers}
    for frame, run in zip(frames, interpret(plan, feeds, backwards=True).runs, strict=True):
        cells = sorted(map(tuple, frame.tolist()))
        outputs, sizes = reached(cells, grid, down["kernel"], down["stride"], down["padding"])
        centre = tuple(size // 2 for size in same)
        expected = {
            "a": (cells, grid, rows_at(cells, cells, itertools.product(*map(range, same)), (1, 1, 1), centre)),
            "d": (
                outputs,
                sizes,
                rows_at(
                    cells, outputs, itertools.product(*map(range, down["kernel"])), down["stride"], down["padding"]
                ),
            ),
        }
        for name, stage in (("a", "input"), ("d", "d")):
            sites, size, pairs = expected[name]
            count, book = len(sites), books[name]
            assert run.status[stage] == count
            found = run.kept[f"{stage}.sites"][:count]
            assert list(zip(*np.unravel_index(found, size), strict=True)) == sites
            assert run.kept[f"{book}.pairs"][:, :count].tolist() == pairs
            starts = range(0, count, SMALL.conv_rows)
            needed = [
                {tap for tap, rows in enumerate(pairs) if max(rows[start : start + SMALL.conv_rows]) >= 0}
                for start in starts
            ]
            masks = run.kept[f"{book}.taps"][: len(needed)].tolist()
            assert masks == [sum(1 << tap for tap in taps) for taps in needed]
            check_lists(run, book, tiled[name], needed)
