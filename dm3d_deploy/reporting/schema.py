"""The shape of report.json: every key, its type, what must agree; `docs/report.md` says what each key means."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from dm3d_deploy.errors import InternalError
from dm3d_deploy.reporting.kinds import (
    AMOUNT,
    COUNT,
    FLAG,
    NUMBER,
    PART,
    PARTS,
    PERCENT,
    PNG,
    ROUNDING,
    SHA256,
    SHARE,
    TEXT,
    WORDS,
    ListOf,
    MapOf,
    Nullable,
    Scalar,
)

SCHEMA_VERSION = 2
STAMP = ("device", "power_mode", "clocks")

COST = Scalar("macs, executed or latency", lambda value: value in ("macs", "executed", "latency"))
VERSION = Scalar(f"the schema version {SCHEMA_VERSION}", lambda value: COUNT.accepts(value) and value == SCHEMA_VERSION)

MACS = {"dense": AMOUNT, "kept": AMOUNT, "executed": AMOUNT}
AP = {
    "objects": COUNT,
    **{f"{variant}_percent": Nullable(PERCENT) for variant in ("dense", "masked", "recovered")},
    **{f"{kind}_points": Nullable(NUMBER) for kind in ("change", "change_low", "change_high")},
}

SCHEMA: dict[str, Any] = {
    "schema": VERSION,
    "command": WORDS,
    "verdict": {"sentence": WORDS, "passed": FLAG},
    "model": {"name": WORDS, "trained": FLAG, "weights_source": WORDS, "classes": ListOf(WORDS), "parameters": COUNT},
    "frames": {
        "source": WORDS,
        "simulated": FLAG,
        "held_out_simulated": FLAG,
        "calibration": COUNT,
        "selection": WORDS,
        "held_out": COUNT,
        "notes": ListOf(WORDS),
    },
    "budget": {
        "goal": WORDS,
        "cost": COST,
        "target": Nullable(SHARE),
        "kept": SHARE,
        "executed": SHARE,
        "scope": WORDS,
        "unit": WORDS,
        "lower_bound_gap": Nullable(AMOUNT),
        "kept_of_backbone": SHARE,
        "kept_of_model": SHARE,
        "candidates": ListOf(
            {
                "name": WORDS,
                "predicted": AMOUNT,
                "verified": Nullable(AMOUNT),
                "cost": AMOUNT,
                "share": AMOUNT,
                "chosen": FLAG,
                "tie": FLAG,
            }
        ),
    },
    "macs": {**MACS, "by_part": MapOf(MACS, keys=PARTS)},
    "distortion": {
        "predicted": AMOUNT,
        "foresees_refit": FLAG,
        "heldout": Nullable(AMOUNT),
        "heldout_after_recovery": Nullable(AMOUNT),
        "per_frame": ListOf({"frame": WORDS, "heldout": AMOUNT, "after_recovery": Nullable(AMOUNT)}),
        "baselines": ListOf({"method": WORDS, "heldout": AMOUNT}),
    },
    "recovery": Nullable(
        {
            "method": WORDS,
            "accepted": FLAG,
            "before": AMOUNT,
            "after": AMOUNT,
            "reason": WORDS,
            "seconds": Nullable(AMOUNT),
            "steps": ListOf(
                {
                    "method": WORDS,
                    "measure": WORDS,
                    "accepted": FLAG,
                    "before": AMOUNT,
                    "after": AMOUNT,
                    "reason": WORDS,
                    "seconds": Nullable(AMOUNT),
                }
            ),
        }
    ),
    "ap": {
        "none_because": Nullable(WORDS),
        "data": Nullable(WORDS),
        "measure": Nullable(WORDS),
        "means": ListOf({"name": WORDS, "classes": ListOf(WORDS), **AP}),
        "classes": ListOf({"name": WORDS, "subset": WORDS, "vulnerable": FLAG, **AP}),
        "notes": ListOf(WORDS),
    },
    "layers": ListOf(
        {
            "name": WORDS,
            "part": PART,
            "kind": WORDS,
            "weights": COUNT,
            "dense_macs": AMOUNT,
            "kept_macs": AMOUNT,
            "executed_macs": AMOUNT,
            "ratio": SHARE,
            "pattern": WORDS,
            "distortion": Nullable(AMOUNT),
            "why": TEXT,
            "legal_2_4": Nullable(FLAG),
            "gain": TEXT,
        }
    ),
    "skipped": ListOf({"layer": WORDS, "reason": WORDS}),
    "parity": ListOf(
        {
            "output": WORDS,
            "reference": WORDS,
            "candidate": WORDS,
            "frames": COUNT,
            "max_abs": Nullable(AMOUNT),
            "max_relative": Nullable(AMOUNT),
            "cosine": Nullable(NUMBER),
            "worst": TEXT,
            "tolerance": WORDS,
            "passed": FLAG,
            "detail": TEXT,
        }
    ),
    "planned_time": Nullable(
        {
            **dict.fromkeys(("label", "standing", "device", "clock", "precision"), WORDS),
            "voxels": COUNT,
            "sha256": SHA256,
            "dense_ms": AMOUNT,
            "planned_ms": AMOUNT,
            "by_part": MapOf(
                {"dense_ms": AMOUNT, "planned_ms": AMOUNT, "fixed_ms": AMOUNT, "band": Nullable(AMOUNT)}, keys=PARTS
            ),
            "stamp": MapOf(WORDS),
            "notes": ListOf(WORDS),
        }
    ),
    "latency": ListOf(
        {
            "stage": WORDS,
            "variant": WORDS,
            "backend": WORDS,
            "clock": WORDS,
            "n": COUNT,
            **{f"{statistic}_ms": AMOUNT for statistic in ("min", "mean", "p50", "p90", "p99", "max")},
            "p99_indicative": FLAG,
            "measured": FLAG,
            "voxels": ListOf(COUNT),
            "samples_ms": ListOf(AMOUNT),
        }
    ),
    "latency_note": TEXT,
    "plan": Nullable(
        {
            "path": WORDS,
            "bytes": COUNT,
            "sha256": SHA256,
            "precision": WORDS,
            "workspace_bytes": COUNT,
            "launches": COUNT,
            "memsets": COUNT,
            "capacities": MapOf(COUNT),
            "tiles_kept": COUNT,
            "tiles_skipped": COUNT,
            "moved_bytes": COUNT,
            "multiplications": COUNT,
            "dense_multiplications": COUNT,
            "devices": ListOf(
                {
                    "sm": WORDS,
                    "kernels": COUNT,
                    "bytes": COUNT,
                    "made_by": WORDS,
                    "most_registers": COUNT,
                    "most_shared_bytes": COUNT,
                    "spilled_bytes": COUNT,
                }
            ),
            "standing": WORDS,
            "compiler": WORDS,
        }
    ),
    "engines": ListOf(
        {
            "path": WORDS,
            "backend": WORDS,
            "version": WORDS,
            "built_for": ListOf(WORDS),
            "precision": WORDS,
            "layers": COUNT,
            "sha256": SHA256,
            "bytes": COUNT,
            "standing": WORDS,
            "rows": ListOf({"dimension": WORDS, "least": COUNT, "most": COUNT, "source": WORDS}),
            "sparsity": Nullable(
                {"legal": COUNT, "eligible": Nullable(COUNT), "chosen": Nullable(COUNT), "note": TEXT}
            ),
        }
    ),
    "detections": Nullable(
        {
            "frame": WORDS,
            "dense": COUNT,
            "pruned": COUNT,
            "matched": COUNT,
            "by_class": ListOf({"name": WORDS, "dense": COUNT, "pruned": COUNT, "matched": COUNT}),
            "picture": Nullable(PNG),
        }
    ),
    "stages": ListOf({"name": WORDS, "seconds": AMOUNT, "fresh": FLAG}),
    "provenance": {
        "version": WORDS,
        "recipe": MapOf(TEXT),
        "tools": MapOf(WORDS),
        "machine": MapOf(TEXT),
        "digests": MapOf(SHA256),
    },
    "warnings": ListOf(WORDS),
}


def key_paths(spec: Any = SCHEMA, path: str = "") -> Iterator[str]:
    """Every key of the schema as `layers[].kept_macs`; `docs/report.md` documents each."""
    if isinstance(spec, Nullable):
        yield from key_paths(spec.item, path)
    elif isinstance(spec, ListOf):
        yield from key_paths(spec.item, f"{path}[]")
    elif isinstance(spec, MapOf):
        yield from key_paths(spec.item, f"{path}{{}}")
    elif isinstance(spec, dict):
        for key, inner in spec.items():
            here = f"{path}.{key}" if path else key
            yield here
            yield from key_paths(inner, here)


def validate_report(data: Any) -> None:
    """Refuse a report that is not of the schema, or that contradicts itself; InternalError names the key's path."""
    _check(SCHEMA, data, "")
    _check_macs(data)
    _check_words(data)
    _check_evidence(data)
    _check_ap(data)


def _refuse(path: str, what: str) -> InternalError:
    return InternalError(f"report.json: {path or 'the whole report'}: {what}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check(spec: Any, value: Any, path: str) -> None:
    if isinstance(spec, Nullable):
        if value is not None:
            _check(spec.item, value, path)
    elif isinstance(spec, Scalar):
        if not spec.accepts(value):
            raise _refuse(path, f"expected {spec.name}, found {_shown(value)}")
    elif isinstance(spec, ListOf):
        if not isinstance(value, list):
            raise _refuse(path, f"expected a list, found {_shown(value)}")
        for index, item in enumerate(value):
            _check(spec.item, item, f"{path}[{index}]")
    else:
        _check_mapping(spec, value, path)


def _check_mapping(spec: Any, value: Any, path: str) -> None:
    if not isinstance(value, Mapping):
        raise _refuse(path, f"expected a mapping, found {_shown(value)}")
    if isinstance(spec, MapOf):
        for key, item in value.items():
            if not isinstance(key, str) or (spec.keys and key not in spec.keys):
                raise _refuse(path, f"unknown key {_shown(key)}; allowed: {', '.join(spec.keys) or 'text'}")
            _check(spec.item, item, f"{path}.{key}")
        return
    for key in value:
        if key not in spec:
            raise _refuse(path, f"unknown key {_shown(key)}")
    for key, inner in spec.items():
        if key not in value:
            raise _refuse(path, f"the key '{key}' is missing")
        _check(inner, value[key], f"{path}.{key}" if path else key)


def _differ(a: float, b: float) -> bool:
    return not math.isclose(a, b, rel_tol=ROUNDING, abs_tol=ROUNDING)


def _check_macs(data: Mapping[str, Any]) -> None:
    macs = data["macs"]
    for column in MACS:
        parts = sum(part[column] for part in macs["by_part"].values())
        if _differ(parts, macs[column]):
            raise _refuse(f"macs.{column}", f"{macs[column]:.10g} is not the sum of its parts, {parts:.10g}")
    if macs["dense"] > 0 and _differ(macs["kept"] / macs["dense"], data["budget"]["kept_of_model"]):
        raise _refuse("budget.kept_of_model", f"{data['budget']['kept_of_model']:.8g} is not macs.kept / macs.dense")
    names = [layer["name"] for layer in data["layers"]]
    for name in names:
        if names.count(name) > 1:
            raise _refuse("layers", f"the layer {_shown(name)} appears {names.count(name)} times")


def _check_words(data: Mapping[str, Any]) -> None:
    """The words that a reader relies on must stand in the sentence that is read first."""
    sentence = data["verdict"]["sentence"]
    if not data["model"]["trained"] and "UNTRAINED" not in sentence:
        raise _refuse("verdict.sentence", "the weights are untrained and the sentence does not say UNTRAINED")
    frames = data["frames"]
    seen = frames["simulated"] or frames["held_out_simulated"] or data["ap"]["data"] is not None
    if seen and "simulated" not in sentence.lower():
        raise _refuse("verdict.sentence", "the frames are simulated and the sentence does not say so")


def _check_ap(data: Mapping[str, Any]) -> None:
    """AP with what it was counted on and how, or the reason why there is none; never both, never neither."""
    ap = data["ap"]
    given = [ap["data"] is not None, ap["measure"] is not None, bool(ap["means"]), bool(ap["classes"])]
    if set(given) != {ap["none_because"] is None}:
        raise _refuse("ap", "it must hold AP or the reason why there is none")
    for row in (*ap["means"], *ap["classes"]):
        if (row["dense_percent"] is None) != (row["objects"] == 0):
            raise _refuse("ap", f"{row['name']}: {row['objects']} objects and an AP of {row['dense_percent']}")


def _check_evidence(data: Mapping[str, Any]) -> None:
    """No claim without what it rests on: comparisons, held-out frames, samples and the stamp of the machine."""
    if (data["planned_time"] is None) != (data["budget"]["cost"] != "latency"):
        raise _refuse("planned_time", f"the cost is {data['budget']['cost']}")
    failed = [comparison["output"] for comparison in data["parity"] if not comparison["passed"]]
    if data["verdict"]["passed"] and (failed or not data["parity"]):
        why = f"{len(failed)} comparisons failed, first {failed[0]}" if failed else "nothing was compared"
        raise _refuse("verdict.passed", f"true, but {why}")
    distortion, held_out = data["distortion"], data["frames"]["held_out"]
    if distortion["heldout"] is not None and not len(distortion["per_frame"]) == held_out > 0:
        raise _refuse("distortion.heldout", f"{len(distortion['per_frame'])} frames listed, {held_out} held out")
    if distortion["heldout_after_recovery"] is not None and data["recovery"] is None:
        raise _refuse("distortion.heldout_after_recovery", "there was no recovery")
    for index, entry in enumerate(data["latency"]):
        if entry["n"] != len(entry["samples_ms"]):
            raise _refuse(f"latency[{index}].n", f"{entry['n']} is not the {len(entry['samples_ms'])} samples listed")
        for key in STAMP:
            if entry["measured"] and not data["provenance"]["machine"].get(key, "").strip():
                raise _refuse(f"provenance.machine.{key}", "a measured latency needs it, and it is missing or empty")
