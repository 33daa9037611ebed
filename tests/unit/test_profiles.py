"""Profiles: what is written is what is read, what was changed or is of another model is refused, times add up."""

import dataclasses
import json

import numpy as np
import pytest

from dm3d_deploy.device import device_named
from dm3d_deploy.errors import InternalError, StaleArtifact, UsageError
from dm3d_deploy.profiling import read_profile
from dm3d_deploy.pruning.contracts import Choice, Layer
from dm3d_deploy.pruning.costs import planned_time, time_costs
from dm3d_deploy.pruning.estimate import estimated_profile
from dm3d_deploy.pruning.latency_model import SPARSE_FIXED_MS, figures_of, sparse_stage_ms
from dm3d_deploy.pruning.profiles import LayerTimes, Profile, TimeCurve, check_model, profile_as_json, profile_from_text


def sparse(name: str, inputs: int, outputs: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> Layer:
    positions = np.linspace(10.0, 90.0, int(np.prod(kernel)))
    return Layer(name=name, part="3d", kind="sparse", shape=(outputs, *kernel, inputs), positions=positions)


def conv(name: str, inputs: int, outputs: int, part: str = "2d") -> Layer:
    return Layer(name=name, part=part, kind="conv2d", shape=(outputs, inputs, 3, 3), positions=np.full(9, 16_384.0))


SPARSE = [sparse(f"s{width}.{n}", width, width) for width in (16, 32, 64, 128) for n in range(5)]
SPARSE.append(sparse("out", 128, 128, (3, 1, 1)))
LAYERS = [
    *SPARSE,
    conv("c", 256, 256),
    conv("d", 128, 64),
    Layer(name="u", part="2d", kind="deconv2d", shape=(256, 256, 2, 2), positions=np.full(4, 4096.0)),
    conv("h", 64, 3, part="head"),
]
CELLS = {"c": 16_384, "d": 65_536, "u": 4096, "h": 16_384}


def estimate(name: str = "orin", voxels: int = 60_000) -> Profile:
    return estimated_profile(LAYERS, CELLS, device_named(name), voxels=voxels, model_name="centerpoint")


def choice(layer: Layer, pattern: str, ratio: float) -> Choice:
    return Choice(layer=layer.name, pattern=pattern, step=1, ratio=ratio, distortion=0.0, cost=layer.macs * (1 - ratio))


def as_text(profile: Profile) -> str:
    return json.dumps(profile_as_json(profile))


def test_what_is_written_is_what_is_read() -> None:
    again = profile_from_text(as_text(estimate()), "p.json")
    assert profile_as_json(again) == profile_as_json(estimate())
    assert again.label == "estimated for orin, not measured"
    assert again.dense_ms == pytest.approx(estimate().dense_ms)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda d: d.update(voxels=61_000), StaleArtifact, "p.json was changed since it was written"),
        (lambda d: d["layers"][0].update(dense_ms=0.1), StaleArtifact, "was changed since"),
        (lambda d: d.update(bands={}), UsageError, r"unknown key 'bands'\. Fix: did you mean 'band'"),
        (lambda d: d["layers"][1].update(dense=1), UsageError, "unknown key 'dense'"),
        (lambda d: d.pop("layers"), UsageError, "no profile that can be used"),
        (lambda d: d.update(layers=[]), UsageError, "no profile that can be used .*needs layers"),
        (lambda d: d["layers"][0].update(dense_ms=-1), UsageError, "-1.0 ms is no time"),
        (lambda d: d["layers"][0].update(dense_ms="fast"), UsageError, "no profile that can be used"),
        (lambda d: d.update(standing="guessed"), UsageError, "measured or estimated, not 'guessed'"),
        (lambda d: d["fixed_ms"].update(nose=1.0), UsageError, "a profile has no part 'nose'"),
        (lambda d: d.update(schema=99), UsageError, "has schema 99; this version reads 1"),
    ],
)
def test_what_is_no_profile_is_refused(change, error, words: str) -> None:
    data = json.loads(as_text(estimate()))
    change(data)
    with pytest.raises(error, match=words):
        profile_from_text(json.dumps(data), "p.json")


@pytest.mark.parametrize(("text", "words"), [("{", "is no JSON"), ("[]", "is no profile"), ("{}", "is no profile")])
def test_what_is_not_even_json(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        profile_from_text(text, "p.json")


def test_a_file_that_is_not_there(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"none\.json cannot be read: No such file.*profile --model MODEL"):
        read_profile(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot be read: it is no text"):
        read_profile(tmp_path / "bytes.json")


def test_another_model_is_refused_with_both_sides() -> None:
    check_model(estimate(), LAYERS, "centerpoint")
    with pytest.raises(UsageError, match="the build of 'slim': d is conv2d 64x128x3x3 there, conv2d") as caught:
        check_model(estimate(), [*LAYERS[:22], conv("d", 64, 64), *LAYERS[23:]], "slim")
    assert caught.value.fix == "dm3d-deploy profile --model slim --device orin writes one that fits"
    measured = dataclasses.replace(estimate(), standing="measured", device="a bench")
    with pytest.raises(UsageError, match=r"--model my/slim\.yaml --device here writes one that fits"):
        check_model(measured, LAYERS[:-1], "my/slim.yaml")
    with pytest.raises(UsageError, match="h is conv2d 3x64x3x3 there, absent here"):
        check_model(estimate(), LAYERS[:-1], "slim")
    with pytest.raises(UsageError, match="new is absent there"):
        check_model(estimate(), [*LAYERS, conv("new", 64, 64)], "slim")


def test_estimates_add_up_to_the_stage_and_its_fixed_part() -> None:
    profile = estimate()
    variable, fixed = sparse_stage_ms(60, figures_of(device_named("orin")))
    assert sum(row.dense_ms for row in profile.layers if row.kind == "sparse") == pytest.approx(variable)
    assert profile.fixed_ms == {"3d": fixed} == {"3d": SPARSE_FIXED_MS}
    assert profile.band == {"3d": 0.34, "2d": 0.2, "head": 0.2}
    assert estimate("rtx4090").band == dict.fromkeys(("3d", "2d", "head"))


def test_estimates_outside_what_was_published_are_refused() -> None:
    with pytest.raises(UsageError, match="a frame of 9,000 voxels lies outside"):
        estimate(voxels=9_000)
    with pytest.raises(UsageError, match="no figures to estimate times on 'h100'"):
        estimate("h100")


def test_only_what_changes_the_time_is_cheaper() -> None:
    times, by_name = estimate().times(), {layer.name: layer for layer in LAYERS}
    wide, narrow, tiled = by_name["c"], by_name["d"], by_name["s64.2"]
    dense = times["c"].dense_ms
    assert time_costs(times["c"], wide, [choice(wide, "unstructured", 0.9)]) == pytest.approx([dense])
    assert time_costs(times["c"], wide, [choice(wide, "2:4", 0.5), choice(wide, "2:4", 0.9)]) == pytest.approx(
        [dense / 1.17] * 2
    )
    assert time_costs(times["d"], narrow, [choice(narrow, "2:4", 0.5)]) == pytest.approx([times["d"].dense_ms])
    assert time_costs(times["s64.2"], tiled, [choice(tiled, "tile", 0.75)]) == pytest.approx(
        [times["s64.2"].dense_ms / 4]
    )


def test_fewer_channels_are_never_slower_than_the_waves_say() -> None:
    curve = estimate().times()["c"].curves["channel"]
    assert curve.share[-1] == 1
    assert curve.at(1.0) == pytest.approx(estimate().times()["c"].dense_ms)
    assert curve.at(0.5) < 0.7 * curve.at(1.0)


def test_a_plan_says_its_parts_and_what_is_fixed() -> None:
    profile, layers = estimate(), LAYERS[:23]
    choices = [choice(layer, "tile", 0.5) for layer in SPARSE] + [choice(LAYERS[21], "2:4", 0.5)]
    plan = planned_time(profile, layers, choices)
    parts = plan["by_part"]
    assert plan["dense_ms"] == pytest.approx(profile.dense_ms)
    assert parts["3d"]["planned_ms"] == pytest.approx((parts["3d"]["dense_ms"] + SPARSE_FIXED_MS) / 2)
    assert parts["head"]["planned_ms"] == parts["head"]["dense_ms"]
    assert plan["planned_ms"] == pytest.approx(sum(row["planned_ms"] for row in parts.values()))
    assert plan["label"].startswith("estimated")
    assert plan["sha256"] == profile.digest()


def test_every_part_has_its_band_in_words() -> None:
    orin = estimate()
    ms = orin.part_ms()
    assert sum(ms.values()) == pytest.approx(orin.dense_ms)
    assert orin.part_lines() == [
        f"3D backbone: {ms['3d']:.4g} ms, 6.3 ms of it fixed, +-34 %",
        f"2D backbone: {ms['2d']:.4g} ms, +-20 %",
        f"head: {ms['head']:.4g} ms, +-20 %",
    ]
    assert orin.words == "estimated for orin, not measured (3D backbone +-34 %, 2D backbone +-20 %, head +-20 %)"
    assert [line.rpartition("ms, ")[2] for line in estimate("a30").part_lines()] == [
        "6.3 ms of it fixed, no band: never compared", "+-14 %", "+-14 %",
    ]  # fmt: skip
    measured = dataclasses.replace(orin, standing="measured", device="a bench")
    assert measured.part_lines()[1] == f"2D backbone: {ms['2d']:.4g} ms"
    assert measured.words == "measured on a bench"


def test_what_an_estimate_rests_on_stands_in_its_notes() -> None:
    uncompared = "the figures of thor-jp7 are unvalidated: no time on it was ever compared with an estimate"
    fixed = "its fixed 6.3 ms (rulebooks, launches) are scaled to no device; fits of the curve say 3 to 10"
    assert uncompared in estimate("thor-jp7").notes
    assert not any("ever compared" in note for name in ("orin", "a30") for note in estimate(name).notes)
    assert all(fixed in estimate(name).notes for name in ("orin", "a30", "thor-jp7"))
    flat = estimated_profile(LAYERS[21:], CELLS, device_named("orin"), voxels=1, model_name="pillars")
    assert fixed not in flat.notes


def test_measured_times_are_called_so() -> None:
    measured = dataclasses.replace(estimate(), standing="measured", device="a bench")
    assert measured.label == "measured on a bench"
    assert measured.digest() != estimate().digest()


def test_times_that_are_none() -> None:
    with pytest.raises(InternalError, match="rising shares"):
        TimeCurve(share=np.array([0.5, 0.5]), ms=np.array([1.0, 2.0]))
    with pytest.raises(InternalError, match="rising shares"):
        TimeCurve(share=np.array([0.5]), ms=np.array([np.nan]))
    with pytest.raises(InternalError, match="a time curve of"):
        TimeCurve(share=np.array([0.5]), ms=np.array([1.0, 2.0]))
    one = TimeCurve(share=np.array([1.0]), ms=np.array([1.0]))
    with pytest.raises(InternalError, match="no time is kept for the pattern 'spiral'"):
        LayerTimes(layer="a", part="2d", kind="conv2d", shape=(1,), dense_ms=1.0, curves={"spiral": one})
