"""report.json -> one HTML page that needs no network, no script and no other file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dm3d_deploy.reporting import ap_section, charts, facts
from dm3d_deploy.reporting.kinds import PARTS
from dm3d_deploy.reporting.schema import validate_report

HERE = Path(__file__).resolve().parent
UNSTEADY_VARIATION = 0.025  # trtexec warns from here on
NOTHING = "–"  # noqa: RUF001 - a dash for the eye


def render_html(report: Mapping[str, Any]) -> str:
    """The page of a valid report; equal reports give equal bytes."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    validate_report(report)
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=facts.percent,
        scaled=facts.scaled,
        size=facts.size,
        ms=facts.milliseconds,
        seconds=facts.duration,
        sig=_significant_or_dash,
        ap=ap_section.points,
        signed=ap_section.signed,
        shipped=ap_section.shipped_percent,
        interval=ap_section.interval,
        grouped=lambda value: f"{value:,}",
    )
    return environment.get_template("report.html.j2").render(_context(report))


def _significant_or_dash(value: float | None) -> str:
    return NOTHING if value is None else facts.significant(value)


def _context(report: Mapping[str, Any]) -> dict[str, Any]:
    from markupsafe import Markup

    pictures = {name: Markup(svg) for name, svg in _charts(report).items()}  # noqa: S704 - our own SVG, text escaped
    distortion, how = facts.final_distortion(report)
    return {
        "r": report,
        "css": Markup((HERE / "report.css").read_text(encoding="utf-8")),  # noqa: S704 - our own file
        "charts": pictures,
        "part_titles": facts.part_titles(report["layers"]),
        "padding_words": facts.padding_words(report),
        "unpruned_words": facts.unpruned_words(report),
        "bound_words": facts.bound_words(report),
        "removed": facts.removed_from(report, PARTS),
        "parts": _part_rows(report),
        "tags": _tags(report),
        "distortion": distortion,
        "distortion_how": how,
        "headline": facts.headline_pair(report),
        "ap_means": ap_section.known_means(report),
        "ap_rows": ap_section.ap_rows(report),
        "ap_ranges": ap_section.range_names(report),
        "latency": _latency_tables(report),
        "planned": facts.planned_rows(report),
        "parity": _parity_groups(report),
        "passed_parity": sum(comparison["passed"] for comparison in report["parity"]),
        "picture": report["detections"] and report["detections"]["picture"],
    }


def _tags(report: Mapping[str, Any]) -> list[str]:
    """Words that must stand beside every number that a network or a frame took part in."""
    words = [] if report["model"]["trained"] else ["untrained"]
    return [*words, "simulated"] if report["frames"]["simulated"] else words


def _charts(report: Mapping[str, Any]) -> dict[str, str]:
    drawn = {"macs": charts.macs_chart(report), "distortion": charts.distortion_chart(report)}
    for part in PARTS:
        if any(layer["part"] == part for layer in report["layers"]):
            drawn[f"allocation_{part}"] = charts.allocation_chart(report["layers"], part)
    for index, entries in enumerate(facts.latency_groups(report).values()):
        drawn[f"latency_{index}"] = charts.latency_chart(entries, str(index))
    return drawn


def _part_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The MACs table: each part, then both denominators."""
    by_part = report["macs"]["by_part"]
    titles = facts.part_titles(report["layers"])
    rows = [(title, part, by_part[part]) for part, title in titles.items() if part in by_part]
    rows += [
        (f"{titles['3d']} + {titles['2d']}", "sum", facts.backbone_macs(report)),
        ("Whole model", "sum", report["macs"]),
    ]
    return [
        {
            "title": title,
            "part": part,
            **{column: macs[column] for column in ("dense", "kept", "executed")},
            "kept_share": facts.share_of(macs, "kept"),
            "executed_share": facts.share_of(macs, "executed"),
        }
        for title, part, macs in rows
    ]


def _latency_tables(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    words = {id(pair.other): pair.words for pair in facts.latency_pairs(report)}
    tables = []
    for (backend, clock, measured), entries in facts.latency_groups(report).items():
        rows = []
        for entry, previous in zip(entries, [None, *entries], strict=False):
            variation = _variation(entry["samples_ms"])
            rows.append(
                {
                    **entry,
                    "opens": previous is None or previous["stage"] != entry["stage"],
                    "change": words.get(id(entry), NOTHING),
                    "variation": variation,
                    "unsteady": variation is not None and variation > UNSTEADY_VARIATION,
                }
            )
        voxels = [count for entry in entries for count in entry["voxels"]]
        head = {"backend": backend, "clock": clock, "standing": "measured" if measured else "estimated"}
        tables.append({**head, "rows": rows, "voxels": _range(voxels)})
    return tables


def _parity_groups(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Comparisons under the words that they share, in the report's order."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    shared = ("candidate", "reference", "frames", "tolerance")
    for comparison in report["parity"]:
        groups.setdefault(tuple(comparison[key] for key in shared), []).append(comparison)
    return [{**dict(zip(shared, key, strict=True)), "rows": rows} for key, rows in groups.items()]


def _variation(samples_ms: Sequence[float]) -> float | None:
    """Coefficient of variation (sample standard deviation over mean); None where it has no meaning."""
    if len(samples_ms) < 2 or sum(samples_ms) <= 0:
        return None
    mean = sum(samples_ms) / len(samples_ms)
    return math.sqrt(sum((sample - mean) ** 2 for sample in samples_ms) / (len(samples_ms) - 1)) / mean


def _range(values: Sequence[int]) -> str:
    if not values:
        return NOTHING
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
