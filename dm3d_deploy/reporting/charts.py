"""Charts as inline SVG: equal data gives equal bytes, and colours are CSS variables so that they follow dark mode."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dm3d_deploy.reporting.facts import (
    backbone_macs,
    milliseconds,
    part_titles,
    percent,
    scaled,
    share_of,
    significant,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = {
    "ink": "#010101",
    "muted": "#010102",
    "line": "#010103",
    "track": "#010104",
    "3d": "#010105",
    "2d": "#010106",
    "head": "#010107",
    "accent": "#010108",
    "surface": "#010109",
}
ROW_PX = 20.0
MOST_SHARES = 5  # as many labels as stand side by side
LEAST_SHARES = 0.1  # of the axis: points of one budget differ by less than a thousandth
TOP_PX = 26.0
BOTTOM_PX = 28.0
EXECUTED_OPACITY = 0.38
TEXT_PX = 12.0
WIDEST_NAME = 19
LOG_AXIS_FROM = 12.0


def _draw(name: str, label: str, width_px: float, height_px: float, paint: Callable[[Figure], None]) -> str:
    """Paint a figure under default settings, whatever the user's matplotlibrc says, and return one <svg> element."""
    from matplotlib import rc_context, style
    from matplotlib.figure import Figure

    with (
        style.context("default"),
        rc_context({"svg.hashsalt": f"dm3d-{name}", "svg.fonttype": "none", "text.parse_math": False}),
    ):
        figure = Figure(figsize=(width_px / 72, height_px / 72), dpi=72)
        paint(figure)
        buffer = io.BytesIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    return _inline(buffer.getvalue().decode(), name, label)


def _inline(document: str, name: str, label: str) -> str:
    """Strip what a page does not need, make ids unique to the chart, and turn colours into CSS variables."""
    from markupsafe import escape

    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[A-Za-z_]+\w*_\d+">', "<g>", svg)
    for pattern in (r'(\bid=")', r"(url\(#)", r'(href="#)'):
        svg = re.sub(pattern, rf"\g<1>{name}-", svg)
    for variable, colour in INK.items():
        svg = svg.replace(colour, f"var(--{variable})")
    opening = re.search(r'viewBox="[^"]+"', svg)
    view_box = opening.group(0) if opening else ""
    start = f'<svg class="chart" {view_box} role="img" aria-label="{escape(label)}" xmlns="http://www.w3.org/2000/svg">'
    return re.sub(r"\n\s*", "\n", re.sub(r"<svg[^>]*>", lambda _: start, svg, count=1)).strip()


def _short_names(names: Sequence[str]) -> list[str]:
    """Layer names that fit beside their bars: without their module if they stay unique, and the end of a long one."""
    inner = [name.partition(".")[2] or name for name in names]
    shown = inner if len(set(inner)) == len(inner) else names
    return [name if len(name) <= WIDEST_NAME else "…" + name[-(WIDEST_NAME - 1) :] for name in shown]


def _axes(figure: Figure, left: float, width: float, rows: int, bottom: float = BOTTOM_PX) -> Axes:
    """Axes in pixels whose y runs over the rows, first row on top, without a frame."""
    total_width, total_height = figure.get_size_inches() * 72
    height = total_height - TOP_PX - bottom
    axes = figure.add_axes((left / total_width, bottom / total_height, width / total_width, height / total_height))
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_facecolor("none")
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_yticks([])
    axes.tick_params(axis="x", length=0, labelsize=TEXT_PX - 1, labelcolor=INK["muted"], pad=4)
    axes.grid(axis="x", color=INK["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _text(axes: Axes, x: float, y: float, text: str, *, align: str = "left", ink: str = "ink", **style: Any) -> None:
    """Text at a share of the width and a row, outside the data's scale."""
    style = {"fontsize": TEXT_PX, "va": "center", **style}
    axes.text(x, y, text, ha=align, color=INK[ink], transform=axes.get_yaxis_transform(), clip_on=False, **style)


def _title(axes: Axes, text: str, *, x: float = 0, align: str = "left") -> None:
    """A heading over a share of the width."""
    axes.text(x, 1, text, transform=axes.transAxes, va="bottom", ha=align, color=INK["muted"], fontsize=TEXT_PX)


def _share_axis(axes: Axes) -> None:
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])


def _share_row(axes: Axes, row: int, kept: float, executed: float, ink: str) -> None:
    """One row: all of it, what the hardware executes, what is kept."""
    axes.barh(row, 1, height=0.62, color=INK["track"])
    axes.barh(row, executed, height=0.62, color=INK[ink], alpha=EXECUTED_OPACITY)
    axes.barh(row, kept, height=0.62, color=INK[ink])


def macs_chart(report: Mapping[str, Any]) -> str:
    """MACs by part: bars are as long as the part is large, filled as far as it is kept and executed."""
    by_part = report["macs"]["by_part"]
    titles = part_titles(report["layers"])
    rows = [(title, by_part[part], part) for part, title in titles.items() if part in by_part]
    rows += [("Backbones", backbone_macs(report), "accent"), ("Whole model", report["macs"], "accent")]

    def paint(figure: Figure) -> None:
        axes = _axes(figure, 86, 320, len(rows))
        axes.set_xlim(0, report["macs"]["dense"] or 1)
        axes.xaxis.set_major_locator(_few_ticks())
        axes.xaxis.set_major_formatter(lambda value, _: scaled(value))
        for row, (title, macs, ink) in enumerate(rows):
            axes.barh(row, macs["dense"], height=0.62, color=INK["track"])
            axes.barh(row, macs["executed"], height=0.62, color=INK[ink], alpha=EXECUTED_OPACITY)
            axes.barh(row, macs["kept"], height=0.62, color=INK[ink])
            _text(axes, -0.02, row, title, align="right")
            kept, executed = percent(share_of(macs, "kept")), percent(share_of(macs, "executed"))
            _text(axes, 1.15, row, kept, align="right", fontweight="bold")
            _text(axes, 1.33, row, executed, align="right")
        _title(axes, "MACs per frame")
        _title(axes, "kept", x=1.15, align="right")
        _title(axes, "executed", x=1.33, align="right")

    height = TOP_PX + BOTTOM_PX + 26 * len(rows)
    return _draw("macs", "Kept and executed MACs by part of the model", 530, height, paint)


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=4)


def allocation_chart(layers: Sequence[Mapping[str, Any]], part: str) -> str:
    """Share of MACs kept in every layer of one part, its pattern, and where the MACs lie (the paper's Fig. 4)."""
    own = [layer for layer in layers if layer["part"] == part]
    names, title = _short_names([layer["name"] for layer in own]), part_titles(layers)[part]

    def paint(figure: Figure) -> None:
        shares = _axes(figure, 128, 190, len(own))
        _share_axis(shares)
        costs = _axes(figure, 444, 80, len(own))
        costs.set_xlim(0, max((layer["dense_macs"] for layer in layers), default=0) or 1)
        costs.set_xticks([])
        for row, (name, layer) in enumerate(zip(names, own, strict=True)):
            kept = share_of({"dense": layer["dense_macs"], "kept": layer["kept_macs"]}, "kept")
            executed = share_of({"dense": layer["dense_macs"], "executed": layer["executed_macs"]}, "executed")
            _share_row(shares, row, kept, executed, part)
            _text(shares, -0.02, row, name, align="right")
            _text(shares, 1.2, row, f"{100 * kept:.0f} %", align="right")
            _text(shares, 1.24, row, layer["pattern"][:14], ink="muted")
            costs.barh(row, layer["dense_macs"], height=0.62, color=INK["track"])
            costs.barh(row, layer["kept_macs"], height=0.62, color=INK[part])
        _title(shares, f"{title}: share of MACs kept")
        _title(shares, "pattern", x=1.24)
        _title(costs, "MACs")

    height = TOP_PX + BOTTOM_PX + ROW_PX * len(own)
    return _draw(f"allocation-{part}", f"Kept share of each layer of the {title}", 530, height, paint)


def distortion_rows(report: Mapping[str, Any]) -> list[tuple[str, float, list[float], str]]:
    """Title, mean, the frames' own values and colour of every distortion that the report holds."""
    distortion = report["distortion"]
    frames = distortion["per_frame"]
    title = "predicted, refitted" if distortion["foresees_refit"] else "predicted"
    rows: list[tuple[str, float, list[float], str]] = [(title, distortion["predicted"], [], "muted")]
    if distortion["heldout"] is not None:
        rows.append(("held-out, pruned", distortion["heldout"], [frame["heldout"] for frame in frames], "accent"))
    if distortion["heldout_after_recovery"] is not None:
        values = [frame["after_recovery"] for frame in frames if frame["after_recovery"] is not None]
        rows.append(("held-out, recovered", distortion["heldout_after_recovery"], values, "accent"))
    rows += [(baseline["method"], baseline["heldout"], [], "muted") for baseline in distortion["baselines"]]
    return rows


def distortion_chart(report: Mapping[str, Any]) -> str:
    """Predicted and true distortion: a bar to the mean, one dot for each held-out frame."""
    rows = distortion_rows(report)
    values = [value for _, mean, dots, _ in rows for value in (mean, *dots)]
    positive = [value for value in values if value > 0]
    logarithmic = len(positive) == len(values) and max(positive) / min(positive) > LOG_AXIS_FROM

    def paint(figure: Figure) -> None:
        axes = _axes(figure, 140, 340, len(rows))
        start = 10 ** math.floor(math.log10(min(positive))) if logarithmic else 0.0
        if logarithmic:
            axes.set_xscale("log")
        axes.set_xlim(start, (max(values) or 1) * (1.3 if logarithmic else 1.05))
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(lambda value, _: significant(value, 2))
        for row, (title, mean, dots, ink) in enumerate(rows):
            axes.barh(row, mean - start, left=start, height=0.5, color=INK[ink], alpha=0.45)
            axes.plot([mean, mean], [row - 0.32, row + 0.32], color=INK[ink], linewidth=2)
            axes.scatter(dots, [row] * len(dots), s=22, color=INK["ink"], edgecolors=INK["surface"], linewidths=0.8)
            _text(axes, -0.02, row, title[:24], align="right")
            _text(axes, 1.03, row, significant(mean))
        _title(axes, "distortion (no unit; 0 is the dense output)" + (", logarithmic" if logarithmic else ""))

    height = TOP_PX + BOTTOM_PX + 30 * len(rows)
    return _draw("distortion", "Predicted and held-out distortion", 560, height, paint)


def latency_chart(entries: Sequence[Mapping[str, Any]], name: str) -> str:
    """Median bar, a line to p90 and a mark at p99 for each stage and variant of one backend."""
    stages = list(dict.fromkeys(entry["stage"] for entry in entries))
    ordered = [entry for stage in stages for entry in entries if entry["stage"] == stage]
    variants = list(dict.fromkeys(entry["variant"] for entry in ordered))
    inks = dict(zip(variants, ["muted", "accent", "2d", "head", *["3d"] * len(variants)], strict=False))

    def paint(figure: Figure) -> None:
        axes = _axes(figure, 156, 306, len(ordered))
        axes.set_xlim(0, max(entry["p99_ms"] for entry in ordered) * 1.04 or 1)
        axes.xaxis.set_major_locator(_few_ticks())
        axes.xaxis.set_major_formatter(lambda value, _: milliseconds(value) if value else "0")
        for row, entry in enumerate(ordered):
            ink = INK[inks[entry["variant"]]]
            axes.barh(row, entry["p50_ms"], height=0.6, color=ink, alpha=0.85)
            axes.plot([entry["p50_ms"], entry["p99_ms"]], [row, row], color=INK["ink"], linewidth=1)
            axes.plot([entry["p90_ms"]] * 2, [row - 0.22, row + 0.22], color=INK["ink"], linewidth=1.2)
            fill = INK["surface"] if entry["p99_indicative"] else INK["ink"]
            axes.scatter([entry["p99_ms"]], [row], s=20, color=fill, edgecolors=INK["ink"], linewidths=1, zorder=3)
            if row == 0 or ordered[row - 1]["stage"] != entry["stage"]:
                _text(axes, -0.51, row, entry["stage"][:20])
            _text(axes, -0.02, row, entry["variant"][:10], align="right", ink="muted")
            _text(axes, 1.03, row, milliseconds(entry["p50_ms"]))
        _title(axes, "median, p90 (tick), p99 (circle; hollow: indicative)")

    height = TOP_PX + BOTTOM_PX + ROW_PX * len(ordered)
    return _draw(f"latency-{name}", "Latency of each stage, dense and pruned", 530, height, paint)


def _ticks_around(values: Sequence[float]) -> list[float]:
    """Of ..., 1, 2, 5, 10, ... those within the values' range (all positive), and the next on both sides."""
    first, last = (math.floor(math.log10(end(values))) for end in (min, max))
    steps = [step * 10.0**power for power in range(first, last + 2) for step in (1, 2, 5)]
    low, high = max(x for x in steps if x <= min(values)), min(x for x in steps if x >= max(values))
    return [x for x in steps if low <= x <= max(high, 2.5 * low)]


def pareto_chart(
    lines: Mapping[str, Sequence[tuple[float, float]]], name: str, *, title: str, logarithmic: bool
) -> str:
    """A line per method through its points (share of MACs kept, value): the paper's Fig. 1."""
    inks = dict(zip(lines, ["accent", "2d", "head", "3d", *["muted"] * len(lines)], strict=False))
    marks = dict(zip(lines, "os^Dv<>ph*" * len(lines), strict=False))

    def paint(figure: Figure) -> None:
        width, height = figure.get_size_inches() * 72
        aside = 62 + 7 * max((len(method) for method in lines), default=0)  # the legend's marks and words
        box = (56 / width, 34 / height, (width - 56 - aside) / width, (height - 34 - TOP_PX) / height)
        axes = figure.add_axes(box)
        axes.set_facecolor("none")
        for side in axes.spines.values():
            side.set_visible(False)
        axes.tick_params(length=0, labelsize=TEXT_PX - 1, labelcolor=INK["muted"], pad=4)
        axes.grid(color=INK["line"], linewidth=0.8)
        axes.set_axisbelow(True)
        if logarithmic:
            axes.set_yscale("log")
            ticks = _ticks_around([y for points in lines.values() for _, y in points])
            axes.set_yticks(ticks)
            axes.set_ylim(ticks[0] / 1.1, ticks[-1] * 1.1)
            axes.minorticks_off()
        for row, (method, points) in enumerate(lines.items()):
            x, y = zip(*sorted(points), strict=True)
            style: dict[str, Any] = {"color": INK[inks[method]], "marker": marks[method], "linewidth": 1.6}
            axes.plot(x, y, markersize=5, **style)
            at = 1 - 0.09 * (row + 0.5)
            axes.plot([1.06], [at], transform=axes.transAxes, clip_on=False, markersize=5, **style)
            axes.text(1.1, at, method, transform=axes.transAxes, va="center", color=INK["ink"], fontsize=TEXT_PX)
        axes.yaxis.set_major_formatter(lambda value, _: significant(value, 2))
        left, right = axes.get_xlim()
        room = max(0.0, LEAST_SHARES - (right - left)) / 2
        axes.set_xlim(left - room, right + room)
        kept = sorted({round(x, 2) for points in lines.values() for x, _ in points})
        if len(kept) <= MOST_SHARES:
            axes.set_xticks(kept)
        else:
            axes.xaxis.set_major_locator(_few_ticks())
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axes.set_xlabel("MACs kept, backbones", color=INK["muted"], fontsize=TEXT_PX)
        _title(axes, title)

    return _draw(f"pareto-{name}", title, 530, 300, paint)
