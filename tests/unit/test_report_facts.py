"""What a report says in words, held against hand-made cases."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_sample import sample_report

from dm3d_deploy.device import stamp_here
from dm3d_deploy.reporting import facts
from dm3d_deploy.reporting.render import render_html
from dm3d_deploy.reporting.schema import validate_report


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0970, "0.0970"), (42.456, "42.5"), (1.3e-6, "1.30e-06"), (1263.4, "1263"), (0.999, "0.999")],
)
def test_significant_digits(value: float, text: str) -> None:
    assert facts.significant(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(86_201_999_200, "86.2 G"), (2160, "2.16 k"), (12, "12.0"), (1.5e12, "1.50 T")]
)
def test_counts_are_scaled(value: float, text: str) -> None:
    assert facts.scaled(value) == text


def test_sizes_durations_and_plurals() -> None:
    assert (facts.size(999), facts.size(25_071_334)) == ("999 B", "25.1 MB")
    assert (facts.duration(8.2), facts.duration(185.4)) == ("8.20 s", "3 min 05 s")
    assert (facts.plural(1, "frame"), facts.plural(4, "frame")) == ("1 frame", "4 frames")


def test_the_median_interval_of_100_samples_is_the_textbook_one() -> None:
    assert facts.median_interval_ms(list(range(1, 101))) == (40, 61)  # ranks of the 95 % interval at n = 100


def test_the_median_interval_covers_by_the_binomial_law() -> None:
    for n in (10, 50, 300):
        low, high = facts.median_interval_ms(list(range(1, n + 1)))
        outside = sum(math.comb(n, k) for k in range(n + 1) if not low <= k < high) / 2**n
        assert 0.001 < outside <= 0.05


@given(st.lists(st.floats(0.1, 1e4), min_size=1, max_size=60))
def test_the_median_interval_lies_in_the_samples_and_holds_the_median(samples: list[float]) -> None:
    low, high = facts.median_interval_ms(samples)
    ordered = sorted(samples)
    assert ordered[0] <= low <= ordered[(len(ordered) - 1) // 2]
    assert ordered[len(ordered) // 2] <= high <= ordered[-1]


def entry(variant: str, *samples_ms: float, stage: str = "total", measured: bool = True) -> dict[str, Any]:
    return {
        "stage": stage,
        "variant": variant,
        "backend": "toy",
        "clock": "clock",
        "measured": measured,
        "n": len(samples_ms),
        "samples_ms": list(samples_ms),
        "p50_ms": sorted(samples_ms)[len(samples_ms) // 2],
    }


def test_pillars_have_a_feature_net_and_no_3d_backbone() -> None:
    report = sample_report()
    assert facts.part_titles(report["layers"])["3d"] == "3D backbone"
    report["layers"] = [{**layer, "name": layer["name"].replace("backbone_3d", "vfe")} for layer in report["layers"]]
    assert facts.part_titles(report["layers"])["3d"] == "Pillar feature net"
    page = render_html(report)
    assert "3D backbone: share" not in page
    assert "Pillar feature net + 2D backbone" in page


def test_the_padding_of_the_3d_plan_stands_beside_the_executed_macs() -> None:
    report = sample_report()
    macs = report["macs"]["by_part"]["3d"]
    words = facts.padding_words(report)
    assert "multiplies 21.4 G a frame, 49.1 % of the 43.6 G of a plan with nothing pruned. That is " in words
    share, times = facts.percent(facts.share_of(macs, "executed")), facts.significant(21.4e9 / macs["executed"])
    assert f"That is {times} times its executed MACs. Those ({facts.scaled(macs['executed'])}, {share}) count" in words
    told = "21.4 G of the 43.6 G multiplications of its layers unpruned, with padding (49.1 %)"
    assert told in facts.plan_words(report["plan"])
    assert "blocks of 64 rows" in render_html(report)
    assert "blocks of 64 rows" not in render_html({**report, "plan": None})


@pytest.mark.parametrize(
    ("pattern", "whole"), [("channel", True), ("channel + tile", True), ("depth", True), ("tile", False)]
)
def test_what_was_removed_is_not_among_the_unpruned_multiplications_of_the_plan(pattern: str, whole: bool) -> None:
    report = sample_report()
    report["layers"][1]["pattern"] = pattern
    page = render_html(report)
    assert page.count("with nothing pruned; removed blocks and channels are not among them") == 2 * whole
    assert page.count("of a plan with nothing pruned") == 2 * (not whole)
    assert ("What goes with a channel stands at" in page) is whole


def test_a_bound_is_one_of_what_was_minimised_and_stands_apart_from_the_words_before() -> None:
    report = sample_report()
    assert "or 32.\nThe allocation's predicted distortion is within 0.0420 % of a" in render_html(report).replace(
        "&#39;", "'"
    )
    report["provenance"]["recipe"]["max_distortion"] = "0.05"
    assert facts.bound_words(report) == "The allocation's cost is within 0.0420 % of a proven lower bound."
    report["budget"]["lower_bound_gap"] = None
    assert facts.bound_words(report) == "No lower bound was computed."


def test_tiles_without_a_3d_plan_are_not_said_to_be_skipped() -> None:
    report = {**sample_report(), "plan": None}
    assert "; no 3D plan could be made, one would execute " in facts.verdict_sentence(report)
    report["layers"] = [{**layer, "pattern": "dense"} for layer in report["layers"]]
    assert "; hardware executes " in facts.verdict_sentence(report)


def test_faster_is_said_only_where_the_intervals_are_apart() -> None:
    noisy = {"latency": [entry("dense", 1, 2, 3), entry("pruned", 0.9, 1.9, 2.9)]}
    assert [pair.words for pair in facts.latency_pairs(noisy)] == ["within noise"]
    clear = {"latency": [entry("dense", 10, 10, 10), entry("pruned", 8, 8, 8)]}
    assert [pair.words for pair in facts.latency_pairs(clear)] == ["20.0 % faster"]
    worse = {"latency": [entry("dense", 10, 10, 10), entry("pruned", 11, 11, 11)]}
    assert [pair.words for pair in facts.latency_pairs(worse)] == ["10.0 % slower"]


def test_estimates_are_never_paired_with_measurements() -> None:
    mixed = {"latency": [entry("dense", 10), entry("pruned", 8, measured=False)]}
    assert facts.latency_pairs(mixed) == []
    assert facts.headline_pair(mixed) is None


def test_the_headline_prefers_measured_then_the_total_then_the_longest() -> None:
    rows = [
        *(entry(variant, 50, stage="3D") for variant in ("dense", "pruned")),
        *(entry(variant, 9) for variant in ("dense", "pruned")),
        *(entry(variant, 99, measured=False) for variant in ("dense", "pruned")),
    ]
    assert facts.headline_pair({"latency": rows}).dense["p50_ms"] == 9
    assert facts.headline_pair({"latency": rows[:2] + rows[4:]}).dense["p50_ms"] == 50
    assert facts.headline_pair({"latency": rows[4:]}).dense["p50_ms"] == 99


def test_the_verdict_of_a_trained_detector_on_real_frames() -> None:
    sentence = facts.verdict_sentence(sample_report(trained=True, simulated=False))
    assert "UNTRAINED" not in sentence
    assert sentence.count("simulated") == 1
    told = "AP on simulated scenes: vulnerable road users 59.9 % instead of 61.4 %, all classes 62.8 % instead"
    assert told in sentence
    assert sentence.startswith("centerpoint keeps 33.1 % of its backbones' MACs (54.2 % of the whole model's; ")
    assert re.search(r"; hardware executes \d+\.\d % of the backbones'\); the distortion", sentence)
    assert "the distortion is 0.0970 on held-out frames after recovery; " in sentence
    assert sentence.endswith("on 2-core x86-64 CPU, n = 300).")
    assert "the total takes 42.5 ms instead of 56.2 ms (median, measured with onnxruntime" in sentence


def test_the_verdict_says_what_is_not_known() -> None:
    report = sample_report()
    report["latency"], report["parity"], report["recovery"] = [], [], None
    report["distortion"].update(heldout=None, heldout_after_recovery=None)
    sentence = facts.verdict_sentence(report)
    assert sentence.startswith("nothing was compared: UNTRAINED centerpoint keeps")
    assert "predicted from simulated frames and not verified; AP on simulated scenes: " in sentence
    assert sentence.endswith("; no time saving was measured.")


def test_the_verdict_counts_failures_and_quotes_a_rejected_recovery_as_it_is() -> None:
    report = sample_report()
    report["parity"][1]["passed"] = False
    report["recovery"]["accepted"] = False
    sentence = facts.verdict_sentence(report)
    assert sentence.startswith("1 of 6 comparisons out of tolerance: ")
    assert "the distortion is 0.214 on held-out simulated frames;" in sentence


def test_a_difference_within_noise_is_not_a_saving() -> None:
    report = sample_report()
    report["latency"] = [entry for entry in report["latency"] if entry["stage"] == "voxelise"]
    assert (
        "voxelise takes 3.10 ms where it took 3.09 ms, a difference within noise (median, measured with"
        in facts.verdict_sentence(report)
    )


def test_the_stamp_of_this_machine_fits_the_schema() -> None:
    report = sample_report()
    stamp = stamp_here().as_json()
    report["provenance"]["machine"] = facts.machine_from_stamp(stamp, ran_on="cpu")
    validate_report(report)
    assert report["provenance"]["machine"]["device"].startswith(stamp["cpu"])


def test_a_gpu_is_named_only_where_the_times_come_from_it() -> None:
    gpu = {"name": "GPU X", "pstate": "P0", "power.limit": "60 W", "clocks.sm": "1.3 GHz", "clocks.max.sm": "2 GHz"}
    stamp = {
        "cpu": "CPU Y",
        "cores": 8,
        "cores_usable": 4,
        "omp_num_threads": None,
        "os": "Linux",
        "python": "3.11",
        "libraries": {"numpy": "2"},
        "load_average": None,
        "gpu": gpu,
    }
    on_gpu = facts.machine_from_stamp(stamp, ran_on="gpu")
    assert (on_gpu["device"], on_gpu["power_mode"], on_gpu["clocks"]) == ("GPU X", "60 W, P0", "SM 1.3 GHz of 2 GHz")
    on_cpu = facts.machine_from_stamp(stamp, ran_on="cpu")
    assert (on_cpu["device"], on_cpu["power_mode"], on_cpu["gpu"]) == ("CPU Y, 4 of 8 cores", "not reported", "GPU X")
