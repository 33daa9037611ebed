"""Average precisions as a text table and as precision-recall curves; vulnerable road users come first."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dm3d_deploy.artifacts import write_bytes
from dm3d_deploy.evaluation.rows import ApRow, vulnerable_first

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 100
PANEL_PX = (440, 520)
PALETTE = (
    *("#0b62d6", "#d1480f", "#8a2be2", "#00897b", "#b8860b"),
    *("#5d4037", "#d81b8c", "#2e9e2e", "#e01b24", "#0097c4"),
)
INK, MUTED, GRID = "#1c1f24", "#60666e", "#e3e6ea"
NOTHING = "-"
TITLE_CHARACTERS = 62  # across one panel


def ap_text(rows: Sequence[ApRow]) -> str:
    """One table per measure: a line per class, a column per subset, AP in percent with the number of objects."""
    tables = []
    for measure in dict.fromkeys(row.measure for row in rows):
        own = {(row.class_name, row.subset): row for row in rows if row.measure == measure}
        subsets = tuple(dict.fromkeys(subset for _, subset in own))
        names = vulnerable_first(tuple(dict.fromkeys(name for name, _ in own)))
        lines = [("AP %, " + measure, *subsets)]
        lines += [(name, *(_cell(own.get((name, subset))) for subset in subsets)) for name in names]
        widths = [max(len(line[column]) for line in lines) for column in range(len(subsets) + 1)]
        tables.append("".join(_line(line, widths) for line in lines))
    return "\n".join(tables)


def _cell(row: ApRow | None) -> str:
    if row is None or row.ap_percent is None:
        return NOTHING
    return f"{row.ap_percent:.1f} ({row.objects})"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first = cells[0].ljust(widths[0])
    return "  ".join([first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]) + "\n"


def draw_curves(path: Path, rows: Sequence[ApRow], *, title: str) -> None:
    """Write `curves_png` whole."""
    write_bytes(path, curves_png(rows, title=title))


def curves_png(rows: Sequence[ApRow], *, title: str) -> bytes:
    """Precision over recall, a panel for each subset and a line for each class that occurs in it."""
    from matplotlib import rc_context, style
    from matplotlib.figure import Figure

    subsets = tuple(dict.fromkeys(row.subset for row in rows))
    names = vulnerable_first(tuple(dict.fromkeys(row.class_name for row in rows)))
    across = 2 if len(subsets) == 4 else min(len(subsets), 3)
    down = math.ceil(len(subsets) / across)
    size = (PANEL_PX[0] * across / DPI, PANEL_PX[1] * down / DPI)
    # The user's matplotlibrc must not change the picture, nor a dollar sign in a title start a formula.
    with style.context("default"), rc_context({"text.parse_math": False}):
        figure = Figure(figsize=size, dpi=DPI, facecolor="white", layout="constrained")
        figure.suptitle("\n".join(textwrap.wrap(title, TITLE_CHARACTERS * across)), fontsize=10, color=INK)
        for place, subset in enumerate(subsets):
            axes = figure.add_subplot(down, across, place + 1)
            shown = [row for row in rows if row.subset == subset and row.ap_percent is not None]
            _paint(axes, subset, sorted(shown, key=lambda row: names.index(row.class_name)), names)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _paint(axes: Axes, subset: str, rows: Sequence[ApRow], names: Sequence[str]) -> None:
    axes.set_title(subset, fontsize=10, color=MUTED, loc="left")
    axes.set(xlim=(0, 1.005), ylim=(0, 1.02))
    axes.set_xlabel("recall", fontsize=9, color=MUTED)
    axes.set_ylabel("precision", fontsize=9, color=MUTED)
    axes.tick_params(labelsize=8, colors=MUTED)
    axes.grid(color=GRID)
    axes.spines[["top", "right"]].set_visible(False)
    for row in rows:
        colour = PALETTE[names.index(row.class_name) % len(PALETTE)]
        reached = [index for index, value in enumerate(row.precision) if value > 0]
        last = reached[-1] + 1 if reached else 0
        label = f"{row.class_name} {row.ap_percent:.1f} ({row.objects})"
        axes.plot(row.recall[:last], row.precision[:last], color=colour, linewidth=1.6, label=label)
    if rows:
        axes.legend(
            fontsize=7.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, labelcolor=INK
        )
    else:
        axes.text(0.5, 0.5, "no object", ha="center", color=MUTED, fontsize=9)
