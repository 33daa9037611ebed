"""The normalised output and its distortion, cell by cell."""

import math

import numpy as np
import pytest

from dm3d_deploy.pruning.normalisation import LEAST_DEVIATION, OutputScale, output_distortion, output_scale, top_cells

TASKS = {0: {"hm": 1, "center": 2, "dim": 3}, 1: {"hm": 3, "center": 2, "dim": 3}, 10: {"hm": 2, "center": 2, "dim": 3}}
HEIGHT, WIDTH = 9, 7


def frame(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        f"{task}.{branch}": rng.normal(0, 2, (1, channels, HEIGHT, WIDTH)).astype(np.float32)
        for task, branches in TASKS.items()
        for branch, channels in branches.items()
    }


def cells_by_hand(maps: dict[str, np.ndarray], count: int) -> dict[int, list[int]]:
    ranked = []
    for task in TASKS:
        for y in range(HEIGHT):
            for x in range(WIDTH):
                confidence = max(maps[f"{task}.hm"][0, c, y, x] for c in range(TASKS[task]["hm"]))
                ranked.append((-confidence, task, y * WIDTH + x))
    chosen = sorted(ranked)[:count]
    return {task: sorted(cell for _, t, cell in chosen if t == task) for task in TASKS}


@pytest.mark.parametrize("count", [1, 20, 120, 10_000])
def test_top_cells(count: int) -> None:
    maps = frame(0)
    found = top_cells(maps, count)
    assert {task: cells.tolist() for task, cells in found.items()} == cells_by_hand(maps, count)


@pytest.mark.parametrize("count", [1, 30, 100])
def test_top_cells_with_ties(count: int) -> None:
    maps = {name: np.round(values / 2) for name, values in frame(1).items()}
    found = top_cells(maps, count)
    assert {task: cells.tolist() for task, cells in found.items()} == cells_by_hand(maps, count)


def probability(logit: float) -> float:
    return 1 / (1 + math.exp(-float(logit)))


def test_scale_and_distortion() -> None:
    count, calibration, dense = 100, [frame(seed) for seed in (2, 3, 4)], frame(5)
    rng = np.random.default_rng(6)
    other = {name: values + rng.normal(0, 0.1, values.shape).astype(np.float32) for name, values in dense.items()}
    scale = output_scale(calibration, count)

    energy = sum(
        probability(logit) ** 2 for maps in calibration for task in TASKS for logit in maps[f"{task}.hm"].ravel()
    ) / len(calibration)
    assert scale.score_energy == pytest.approx(energy, rel=1e-9)
    assert scale.pooled == ()
    assert scale.frames == 3
    assert scale.box_cells == count

    score = sum(
        (probability(a) - probability(b)) ** 2
        for task in TASKS
        for a, b in zip(dense[f"{task}.hm"].ravel(), other[f"{task}.hm"].ravel(), strict=True)
    )
    squares = []
    for task, cells in cells_by_hand(dense, count).items():
        for branch in ("center", "dim"):
            for channel in range(TASKS[task][branch]):
                seen = [
                    float(maps[f"{task}.{branch}"][0, channel].ravel()[cell])
                    for maps in calibration
                    for cell in cells_by_hand(maps, count)[task]
                ]
                mean = sum(seen) / len(seen)
                deviation = math.sqrt(sum((value - mean) ** 2 for value in seen) / len(seen))
                assert scale.box_deviation[f"{task}.{branch}"][channel] == pytest.approx(deviation, rel=1e-9)
                for cell in cells:
                    a, b = (float(m[f"{task}.{branch}"][0, channel].ravel()[cell]) for m in (dense, other))
                    squares.append(((a - b) / deviation) ** 2)
    assert len(squares) == count * 5
    expected = 0.3 * score / energy + 2 * sum(squares) / len(squares)
    got = output_distortion(dense, other, scale, top_cells(dense, count), lambda_box=2.0, lambda_score=0.3)
    assert got == pytest.approx(expected, rel=1e-6)


def test_a_task_with_few_cells_takes_the_deviation_of_all() -> None:
    calibration = [frame(seed) for seed in range(2)]
    for maps in calibration:
        maps["10.hm"] -= 100
        maps["10.hm"][0, 0, 0, :4] += 200
    scale = output_scale(calibration, 60)
    assert scale.pooled == (10,)
    pool = [
        maps[f"{task}.dim"][0, 1].ravel()[cell]
        for maps in calibration
        for task, cells in cells_by_hand(maps, 60).items()
        for cell in cells
    ]
    assert scale.box_deviation["10.dim"][1] == pytest.approx(np.std(np.array(pool, dtype=float)), rel=1e-9)
    assert scale.box_deviation["0.dim"][1] != scale.box_deviation["10.dim"][1]


def test_a_nearly_silent_channel_does_not_rule_the_others() -> None:
    calibration = [frame(seed) for seed in (2, 3, 4)]
    for maps in calibration:
        maps["0.dim"][0, 1] *= 1e-6
        maps["0.center"][0, 0] = 7
    scale = output_scale(calibration, 100)
    assert scale.box_deviation["0.dim"][1] == LEAST_DEVIATION["dim"]
    assert scale.box_deviation["0.center"][0] == LEAST_DEVIATION["center"]
    assert scale.box_deviation["0.dim"][0] > LEAST_DEVIATION["dim"]
    assert OutputScale.from_json(scale.as_json()).as_json() == scale.as_json()
