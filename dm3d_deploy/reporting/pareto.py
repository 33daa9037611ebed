"""The page of a comparison: a Pareto chart of distortion, one of AP where it is known, and the table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dm3d_deploy.reporting import facts
from dm3d_deploy.reporting.charts import pareto_chart

HERE = Path(__file__).resolve().parent


def render_comparison(comparison: Mapping[str, Any], headline: str) -> str:
    """One HTML page without network, script or other files; equal comparisons give equal bytes."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=facts.percent, sig=facts.significant)
    return environment.get_template("comparison.html.j2").render(
        c=comparison,
        headline=headline,
        css=Markup((HERE / "report.css").read_text(encoding="utf-8")),  # noqa: S704 - our own file
        charts=[Markup(svg) for svg in _charts(comparison)],  # noqa: S704 - our own SVG, text escaped
    )


def _charts(comparison: Mapping[str, Any]) -> list[str]:
    pruned = _lines(comparison, "pruned")
    drawn = [pareto_chart(pruned, "pruned", title="distortion, pruned (logarithmic)", logarithmic=_positive(pruned))]
    recovered = _lines(comparison, "recovered")
    if recovered:
        title = "distortion, recovered (logarithmic)"
        drawn.append(pareto_chart(recovered, "recovered", title=title, logarithmic=_positive(recovered)))
    precision = _lines(comparison, "ap")
    if precision:
        name = next(row["ap_name"] for row in comparison["runs"] if row["ap_name"] is not None)
        drawn.append(pareto_chart(precision, "ap", title=f"{name}, percent", logarithmic=False))
    return drawn


def _lines(comparison: Mapping[str, Any], column: str) -> dict[str, list[tuple[float, float]]]:
    """A line a method, and a recovery where a method has several."""
    ways: dict[str, set[str]] = {}
    for row in comparison["runs"]:
        ways.setdefault(row["method"], set()).add(row["recover"])
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in comparison["runs"]:
        if row[column] is not None:
            name = row["method"] if len(ways[row["method"]]) == 1 else f"{row['method']} {row['recover']}"
            lines.setdefault(name, []).append((row["kept_of_backbone"], row[column]))
    return lines


def _positive(lines: Mapping[str, list[tuple[float, float]]]) -> bool:
    return all(value > 0 for points in lines.values() for _, value in points)
