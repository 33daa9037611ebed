"""Paired timing with a clock of our own: every nanosecond is accounted for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dm3d_deploy.errors import InternalError, UsageError
from dm3d_deploy.evidence import Latency
from engines.latency import TOTAL, latency_warnings, sample


class Clock:
    """Time that passes only where a stage says so."""

    def __init__(self) -> None:
        self.now = 0
        self.calls: list[tuple[str, Any]] = []

    def read(self) -> int:
        return self.now

    def stage(self, name: str, cost_ns: Callable[[], int]) -> Callable[[Any], Any]:
        def run(value: Any) -> Any:
            self.calls.append((name, value))
            self.now += cost_ns()
            return (value, name)

        return run


def test_variants_alternate_and_stages_are_chained() -> None:
    clock = Clock()
    variants = {
        "dense": {"a": clock.stage("dense.a", lambda: 1_000_000), "b": clock.stage("dense.b", lambda: 500_000)},
        "pruned": {"a": clock.stage("pruned.a", lambda: 250_000)},
    }
    found = sample(variants, ["f0", "f1"], warmup=1, repeats=2, backend="fake", voxels=[7, 9], now_ns=clock.read)
    one_round = ["dense.a", "dense.b", "pruned.a"]
    assert [name for name, _ in clock.calls] == one_round * 5
    assert [value for name, value in clock.calls if name == "pruned.a"] == ["f1", "f0", "f1", "f0", "f1"]
    assert clock.calls[1] == ("dense.b", ("f1", "dense.a"))
    assert {(item.variant, item.stage): item.samples_ms for item in found} == {
        ("dense", "a"): (1.0,) * 4,
        ("dense", "b"): (0.5,) * 4,
        ("dense", TOTAL): (1.5,) * 4,
        ("pruned", "a"): (0.25,) * 4,
        ("pruned", TOTAL): (0.25,) * 4,
    }
    assert all(item.voxels == (7, 9, 7, 9) and item.measured and item.backend == "fake" for item in found)


def test_a_slow_first_run_stays_in_the_warmup() -> None:
    clock = Clock()
    costs = iter([9_000_000, 1_000_000, 1_000_000])
    found = sample(
        {"v": {"s": clock.stage("s", lambda: next(costs))}}, [0], warmup=1, repeats=2, backend="x", now_ns=clock.read
    )
    assert found[0].samples_ms == (1.0, 1.0)


def test_drift_hits_both_variants_alike() -> None:
    clock = Clock()
    drift = iter(range(1000))
    variants = {name: {"s": clock.stage(name, lambda: 10**9 + next(drift) * 10**6)} for name in ("A", "B")}
    found = {i.variant: i for i in sample(variants, [0], warmup=0, repeats=100, backend="x", now_ns=clock.read)}
    pairs = zip(found["A"].samples_ms, found["B"].samples_ms, strict=True)
    assert all(abs(b - a) < 1.001 for a, b in pairs)  # run one after the other they would differ by 100 ms


@given(
    costs=st.lists(st.integers(0, 10**12), min_size=1, max_size=5),
    frames=st.integers(1, 4),
    warmup=st.integers(0, 3),
    repeats=st.integers(1, 4),
)
def test_stages_sum_to_the_total(costs: list[int], frames: int, warmup: int, repeats: int) -> None:
    clock = Clock()
    stages = {f"s{i}": clock.stage(f"s{i}", lambda c=cost: c) for i, cost in enumerate(costs)}
    found = sample({"v": stages}, list(range(frames)), warmup=warmup, repeats=repeats, backend="x", now_ns=clock.read)
    assert [item.stage for item in found] == [*stages, TOTAL]
    for *parts, total in zip(*(item.samples_ms for item in found), strict=True):
        assert total == pytest.approx(sum(parts))
    assert all(len(item.samples_ms) == repeats * frames for item in found)
    assert len(clock.calls) == (warmup + repeats * frames) * len(costs)


@pytest.mark.parametrize(("frames", "repeats", "warmup"), [([], 1, 0), ([1], 0, 0), ([1], 1, -1)])
def test_nothing_to_measure_is_refused(frames: list[int], repeats: int, warmup: int) -> None:
    with pytest.raises(UsageError, match="nothing to measure"):
        sample({"v": {"s": lambda x: x}}, frames, warmup=warmup, repeats=repeats, backend="x")


def test_stage_names_and_voxel_counts_are_checked() -> None:
    with pytest.raises(InternalError, match="empty or named 'total'"):
        sample({"v": {TOTAL: lambda x: x}}, [1], warmup=0, repeats=1, backend="x")
    with pytest.raises(InternalError, match="empty or named"):
        sample({"v": {}}, [1], warmup=0, repeats=1, backend="x")
    with pytest.raises(InternalError, match="1 voxel counts for 2 frames"):
        sample({"v": {"s": lambda x: x}}, [1, 2], warmup=0, repeats=1, backend="x", voxels=[5])


def test_a_failing_stage_is_not_hidden() -> None:
    def fail(_: Any) -> Any:
        raise ValueError("broken stage")

    with pytest.raises(ValueError, match="broken stage"):
        sample({"v": {"s": fail}}, [1], warmup=0, repeats=1, backend="x")


def latency(samples: list[float], voxels: tuple[int, ...] = ()) -> Latency:
    return Latency(
        stage="s", variant="v", samples_ms=tuple(samples), clock="c", backend="b", voxels=voxels, measured=True
    )


def test_warnings() -> None:
    assert latency_warnings(latency([1.0, 1.001] * 500)) == ()
    (few,) = latency_warnings(latency([1.0] * 999))
    assert "p99 of 999 samples is indicative" in few
    (noisy,) = latency_warnings(latency([1.0, 1.1] * 500))
    assert "coefficient of variation 4.8% exceeds 2.5%" in noisy
    assert "no input was timed twice" in latency_warnings(latency([1.0]))[0]


def test_a_scene_that_takes_longer_is_not_noise() -> None:
    samples, sizes = [1.0, 3.0] * 500, (10, 30) * 500
    assert latency_warnings(latency(samples, sizes)) == ()
    assert "exceeds" in latency_warnings(latency(samples))[0]
    assert "no input was timed twice" in latency_warnings(latency([1.0, 3.0], (10, 30)))[0]


def test_the_limit_is_trtexecs() -> None:
    quiet, loud = [1 - 0.0249, 1 + 0.0249] * 500, [1 - 0.0251, 1 + 0.0251] * 500
    assert latency_warnings(latency(quiet)) == ()
    assert len(latency_warnings(latency(loud))) == 1
