"""report.json is of its schema in both directions, and contradicts nothing that it says itself."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_sample import sample_report

from dm3d_deploy.artifacts import canonical_json
from dm3d_deploy.errors import InternalError
from dm3d_deploy.evidence import Tolerance, compare_arrays
from dm3d_deploy.reporting.schema import SCHEMA_VERSION, key_paths, validate_report

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "report.md"
SIGNED = ("cosine", "change_points", "change_low_points", "change_high_points")
FREE_KEYS = ("recipe", "tools", "machine", "digests", "capacities", "stamp", "by_part")


def mappings(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping of a report with its path; of a list only the first item, as the others are alike."""
    if isinstance(value, dict):
        yield path, value
        for key, inner in value.items():
            yield from mappings(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        yield from mappings(value[0], f"{path}[0]")


def places() -> list[tuple[str, str]]:
    return [
        (path, key) for path, mapping in mappings(sample_report()) for key in mapping if not path.endswith(FREE_KEYS)
    ]


def at(report: dict[str, Any], path: str) -> dict[str, Any]:
    return next(mapping for here, mapping in mappings(report) if here == path)


@pytest.fixture(name="report")
def _report() -> dict[str, Any]:
    return sample_report()


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("simulated", [True, False])
def test_the_sample_is_valid_and_survives_json(trained: bool, simulated: bool) -> None:
    report = sample_report(trained=trained, simulated=simulated)
    validate_report(report)
    validate_report(json.loads(canonical_json(report)))


def test_the_walk_over_the_sample_reaches_every_key_of_the_schema() -> None:
    seen = {re.sub(r"\[\d+\]", "[]", f"{path}.{key}" if path else key) for path, key in places()}
    seen = {re.sub(r"by_part\.\w+", "by_part{}", path) for path in seen}
    assert set(key_paths()) == seen
    assert len(places()) > 100


@pytest.mark.parametrize(("path", "key"), places())
def test_a_missing_key_is_named_with_its_path(report: dict[str, Any], path: str, key: str) -> None:
    del at(report, path)[key]
    with pytest.raises(InternalError, match=rf"{re.escape(path or 'the whole report')}: the key '{key}' is missing"):
        validate_report(report)


@pytest.mark.parametrize(("path", "key"), places())
def test_a_value_of_another_type_is_named_with_its_path(report: dict[str, Any], path: str, key: str) -> None:
    at(report, path)[key] = object()
    where = re.escape(f"{path}.{key}" if path else key)
    with pytest.raises(InternalError, match=rf"report\.json: {where}: expected .*found <object"):
        validate_report(report)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_number_that_is_not_finite_or_below_zero_is_refused(value: float) -> None:
    tried = 0
    for path, key in places():
        report = sample_report()
        mapping = at(report, path)
        if isinstance(mapping[key], (int, float)) and not (key in SIGNED and value == -1.0):
            mapping[key] = value
            tried += 1
            with pytest.raises(InternalError, match=re.escape(key)):
                validate_report(report)
    assert tried > 60


def test_an_unknown_key_is_refused_everywhere() -> None:
    report = sample_report()
    paths = [path for path, _ in mappings(report) if not path.endswith(FREE_KEYS[:-1])]
    assert len(paths) > 20
    for path in paths:
        broken = copy.deepcopy(report)
        at(broken, path)["surprise"] = 1
        with pytest.raises(InternalError, match="unknown key 'surprise'"):
            validate_report(broken)


@pytest.mark.parametrize("key", ["model", "verdict", "warnings", "engines"])
def test_null_is_refused_where_the_schema_does_not_allow_it(report: dict[str, Any], key: str) -> None:
    report[key] = None
    with pytest.raises(InternalError, match=f"{key}: expected .*found None"):
        validate_report(report)


@pytest.mark.parametrize("value", [True, "2", 3, 1, 0])
def test_another_schema_version_is_refused(report: dict[str, Any], value: Any) -> None:
    report["schema"] = value
    with pytest.raises(InternalError, match=f"schema: expected the schema version {SCHEMA_VERSION}"):
        validate_report(report)


def _set(path: str, value: Any) -> Any:
    *parents, last = path.split(".")

    def change(report: dict[str, Any]) -> None:
        for name in parents:
            report = report[int(name)] if name.isdigit() else report[name]
        report[last] = value

    return change


CONTRADICTIONS = [
    ("macs.kept", _set("macs.kept", 1.0), "macs.kept: 1 is not the sum of its parts"),
    ("share", _set("budget.kept_of_model", 0.1), "budget.kept_of_model: 0.1 is not macs.kept / macs.dense"),
    ("twins", _set("layers.1.name", "backbone_3d.conv_input.0"), "'backbone_3d.conv_input.0' appears 2 times"),
    ("untrained", _set("verdict.sentence", "simulated, fine"), "does not say UNTRAINED"),
    ("simulated", _set("verdict.sentence", "UNTRAINED, fine"), "the frames are simulated"),
    ("failed", _set("parity.0.passed", False), "verdict.passed: true, but 1 comparisons failed, first task 0 heat map"),
    ("no parity", _set("parity", []), "verdict.passed: true, but nothing was compared"),
    ("frames", _set("frames.held_out", 5), "distortion.heldout: 4 frames listed, 5 held out"),
    ("recovery", _set("recovery", None), "there was no recovery"),
    ("ap and a reason", _set("ap.none_because", "untrained"), "ap: it must hold AP or the reason why there is none"),
    ("ap of nothing", _set("ap.classes", []), "ap: it must hold AP or the reason why there is none"),
    ("ap without objects", _set("ap.means.0.objects", 0), "vulnerable road users: 0 objects and an AP of 61.4"),
    ("samples", _set("latency.0.n", 7), r"latency\[0\].n: 7 is not the 300 samples listed"),
    ("power mode", _set("provenance.machine.power_mode", " "), "provenance.machine.power_mode: a measured latency"),
    ("part", _set("layers.0.part", "neck"), "expected one of 3d, 2d, head, found 'neck'"),
    ("digest", _set("engines.0.sha256", "A" * 64), "expected 64 lower-case hexadecimal digits"),
    ("picture", _set("detections.picture", "/home/me/picture.png"), "expected a PNG in base64"),
]


@pytest.mark.parametrize(("change", "match"), [case[1:] for case in CONTRADICTIONS], ids=[c[0] for c in CONTRADICTIONS])
def test_a_report_that_contradicts_itself_is_refused(report: dict[str, Any], change: Any, match: str) -> None:
    change(report)
    with pytest.raises(InternalError, match=match):
        validate_report(report)


def test_a_comparison_that_found_nan_fits_the_schema(report: dict[str, Any]) -> None:
    found = compare_arrays(
        "heat map",
        np.ones(3),
        np.full(3, np.nan),
        names=("a", "b"),
        tolerance=Tolerance(max_relative=1e-3, min_cosine=0.99),
    ).as_json()
    assert not found["passed"]
    assert found["max_abs"] is None
    report["parity"] = [found]
    report["verdict"]["passed"] = False
    validate_report(report)


def test_every_key_is_documented_and_no_other() -> None:
    documented = re.findall(r"^\| `([^`]+)` \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(documented) == len(set(documented))
    assert set(documented) == set(key_paths())
