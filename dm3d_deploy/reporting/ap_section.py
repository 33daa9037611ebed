"""What the report says about average precision on simulated scenes: on the page, in the terminal and in the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WHOLE = "all"
NOTHING = "–"  # noqa: RUF001 - a dash for the eye


def shipped_percent(row: Mapping[str, Any]) -> float | None:
    """AP of the weights that are shipped: the recovered ones where a recovery was accepted."""
    value = row["recovered_percent"] if row["recovered_percent"] is not None else row["masked_percent"]
    return None if value is None else float(value)


def known_means(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The means that have a value, vulnerable road users first."""
    return [row for row in report["ap"]["means"] if row["dense_percent"] is not None]


def points(value: float | None) -> str:
    """AP in percent with one decimal."""
    return NOTHING if value is None else f"{value:.1f}"


def signed(value: float | None) -> str:
    """A change in points."""
    return NOTHING if value is None else f"{value:+.1f}"


def interval(row: Mapping[str, Any]) -> str:
    """The change's 95 % interval."""
    if row["change_low_points"] is None:
        return NOTHING
    return f"{signed(row['change_low_points'])} to {signed(row['change_high_points'])}"


def ap_sentence(report: Mapping[str, Any]) -> str:
    """The verdict's part; empty without AP."""
    told = [
        f"{row['name']} {points(shipped_percent(row))} % instead of {points(row['dense_percent'])} %"
        for row in known_means(report)
    ]
    return f"AP on simulated scenes: {', '.join(told)}; " if told else ""


def ap_line(report: Mapping[str, Any]) -> str:
    """The terminal's line."""
    if report["ap"]["none_because"] is not None:
        return f"none: {report['ap']['none_because']}"
    told = []
    for row in known_means(report):
        sure = "" if row["change_low_points"] is None else f", 95 % {interval(row)}"
        values = f"{points(row['dense_percent'])} → {points(shipped_percent(row))} %"
        told.append(f"{row['name']} {values} ({signed(row['change_points'])}{sure})")
    return f"{'; '.join(told)}; {report['ap']['data']}"


def ap_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The page's table: the means, then a row for each class, with its ranges beside it."""
    classes = report["ap"]["classes"]
    rows = [{"row": row, "mean": True, "ranges": []} for row in report["ap"]["means"]]
    for row in classes:
        if row["subset"] == WHOLE:
            near = [other for other in classes if other["name"] == row["name"] and other["subset"] != WHOLE]
            rows.append({"row": row, "mean": False, "ranges": near})
    return rows


def range_names(report: Mapping[str, Any]) -> list[str]:
    """The ranges that every class is split into."""
    return list(dict.fromkeys(row["subset"] for row in report["ap"]["classes"] if row["subset"] != WHOLE))
