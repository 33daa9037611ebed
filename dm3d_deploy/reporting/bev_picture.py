"""A frame seen from above with its detections, as PNG; equal data gives equal bytes."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dm3d_deploy.artifacts import write_bytes
from dm3d_deploy.errors import UsageError
from dm3d_deploy.geometry.boxes import bev_from_boxes, corners_bev
from dm3d_deploy.geometry.matching import match_detections
from dm3d_deploy.pointcloud import Detections, PointCloud

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

WIDTH_PX = 1200
DPI = 100
LEFT_PX, RIGHT_PX, GAP_PX, TOP_PX, BOTTOM_PX = 62, 14, 44, 78, 116
SAME_PLACE_M = 1.0
PALETTE = (
    *("#0b62d6", "#d1480f", "#8a2be2", "#00897b", "#b8860b"),
    *("#5d4037", "#d81b8c", "#2e9e2e", "#e01b24", "#0097c4"),
)
HALO = "#ffd21f"
INK, MUTED, RING = "#1c1f24", "#60666e", "#c9ced6"


def draw_bev(
    path: Path,
    cloud: PointCloud,
    detections: Detections,
    *,
    title: str,
    range_m: float,
    compare: Detections | None = None,
    names: tuple[str, str] = ("before", "after"),
) -> None:
    """Write `bev_png` whole."""
    data = bev_png(cloud, detections, title=title, range_m=range_m, compare=compare, names=names)
    write_bytes(path, data)


def bev_png(
    cloud: PointCloud,
    detections: Detections,
    *,
    title: str,
    range_m: float,
    compare: Detections | None = None,
    names: tuple[str, str] = ("before", "after"),
) -> bytes:
    """Points by height, boxes by class with a line out of their front, x forward up, to `range_m` on every side.

    With `compare`, `detections` stand on the left and `compare` on the right, under `names`; a box whose class the
    other side does not have within a metre is set off. The picture is 1200 pixels wide.
    """
    if not (math.isfinite(range_m) and range_m > 0):
        raise UsageError(f"a view of {range_m:g} m cannot be drawn.", fix="give a range above zero, in metres")
    from matplotlib import rc_context, style
    from matplotlib.figure import Figure

    sides = [detections] if compare is None else [detections, compare]
    side_px = (WIDTH_PX - LEFT_PX - RIGHT_PX - GAP_PX * (len(sides) - 1)) / len(sides)
    height_px = round(TOP_PX + side_px + BOTTOM_PX)
    # The user's matplotlibrc must not change the picture, nor a dollar sign in a title start a formula.
    with style.context("default"), rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(WIDTH_PX / DPI, height_px / DPI), dpi=DPI, facecolor="white")
        _paint(figure, cloud, sides, title, range_m, names)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _paint(
    figure: Figure, cloud: PointCloud, sides: list[Detections], title: str, range_m: float, names: tuple[str, str]
) -> None:
    width_px, height_px = figure.get_size_inches() * DPI
    side_px = height_px - TOP_PX - BOTTOM_PX
    top = 1 - 30 / height_px
    figure.text(LEFT_PX / width_px, top, title, fontsize=13, fontweight="bold", color=INK, va="center")
    alone = [np.empty(0, np.int64)]
    if len(sides) == 2:
        matching = match_detections(sides[0], sides[1], max_centre_m=SAME_PLACE_M)
        alone = [matching.missing, matching.extra]
    for index, (side, only_here) in enumerate(zip(sides, alone, strict=True)):
        x = LEFT_PX + index * (side_px + GAP_PX)
        place = (x / width_px, BOTTOM_PX / height_px, side_px / width_px, side_px / height_px)
        axes = figure.add_axes(place)
        _paint_frame(axes, range_m)
        if index == 0:
            axes.set_ylabel("x, forward (m)", fontsize=9.5, color=MUTED)
        _paint_points(axes, cloud, range_m)
        _paint_boxes(axes, side, only_here)
        caption = _caption(side, range_m)
        if len(sides) == 2:
            caption = f"{names[index]}: {caption}, {len(only_here)} only here"
        axes.set_title(caption, fontsize=10, color=MUTED, loc="left")
    handles = _legend(sides, with_halo=any(map(len, alone)))
    if handles:
        figure.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=((LEFT_PX - 8) / width_px, 6 / height_px),
            ncols=min(len(handles), 5),
            fontsize=9.5,
            frameon=False,
            labelcolor=INK,
            handlelength=1.6,
            columnspacing=1.4,
        )


def _caption(side: Detections, range_m: float) -> str:
    outside = int(np.count_nonzero(np.abs(side.boxes.centre[:, :2]).max(axis=1, initial=0.0) > range_m))
    count = f"{len(side)} {'box' if len(side) == 1 else 'boxes'}"
    return f"{count} ({outside} beyond the view)" if outside else count


def _paint_frame(axes: Axes, range_m: float) -> None:
    """Axes in metres with rings of equal range around the sensor; x forward is up, y left is left."""
    from matplotlib.patches import Circle
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(range_m, -range_m)
    axes.set_ylim(-range_m, range_m)
    axes.set_aspect("equal")
    axes.set_xlabel("y, left (m)", fontsize=9.5, color=MUTED)
    axes.tick_params(labelsize=9, colors=MUTED)
    for spine in axes.spines.values():
        spine.set_color(RING)
    locator = MaxNLocator(nbins=8, steps=[1, 2, 5, 10])
    axes.xaxis.set_major_locator(locator)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    for radius in locator.tick_values(-range_m, range_m):
        if 0 < radius <= range_m:
            axes.add_patch(Circle((0, 0), radius, fill=False, edgecolor=RING, linewidth=0.8, zorder=1))
            place = (-radius * math.sqrt(0.5), -radius * math.sqrt(0.5))
            text = axes.annotate(f"{radius:g} m", place, fontsize=8, color=MUTED, ha="center", va="center", zorder=5)
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.0})
    axes.plot([0], [0], marker="^", markersize=7, color=INK, zorder=6)


def _paint_points(axes: Axes, cloud: PointCloud, range_m: float) -> None:
    """Ground light, high points dark."""
    inside = (np.abs(cloud.points[:, :2]) <= range_m).all(axis=1)
    x, y, z = cloud.points[inside, :3].astype(np.float64).T
    if not len(z):
        return
    low, high = np.percentile(z, (2, 98))
    shade = 0.78 - 0.5 * np.clip((z - low) / max(high - low, 1e-6), 0, 1)
    order = np.argsort(z, kind="stable")
    colours = np.repeat(shade[order, None], 3, axis=1)
    axes.scatter(y[order], x[order], s=1.1, c=colours, linewidths=0, zorder=2)


def _paint_boxes(axes: Axes, detections: Detections, only_here: np.ndarray) -> None:
    from matplotlib.collections import LineCollection

    bev = bev_from_boxes(detections.boxes)
    outlines = corners_bev(bev)[:, :, ::-1]  # y to the left of the picture, x up
    front = outlines[:, [0, 3]].mean(axis=1)
    tip = front + (front - bev[:, 1::-1]) * 0.5
    closed = np.concatenate([outlines, outlines[:, :1]], axis=1)
    axes.add_collection(LineCollection(list(closed[only_here]), colors=HALO, linewidths=7, zorder=3))
    for label in np.unique(detections.labels):
        chosen = detections.labels == label
        lines = [*closed[chosen], *np.stack([front[chosen], tip[chosen]], axis=1)]
        axes.add_collection(LineCollection(lines, colors=_colour(label), linewidths=1.5, zorder=4))


def _colour(label: int) -> str:
    return PALETTE[label % len(PALETTE)]


def _legend(sides: list[Detections], *, with_halo: bool) -> list[Line2D]:
    """One entry for each class that is there, with its counts."""
    from matplotlib.lines import Line2D

    handles = []
    for label, name in enumerate(sides[0].class_names):
        counts = [int(np.count_nonzero(side.labels == label)) for side in sides]
        if any(counts):
            text = f"{name} {' / '.join(map(str, counts))}"
            handles.append(Line2D([], [], color=_colour(label), linewidth=2.5, label=text))
    if with_halo:
        text = f"no counterpart within {SAME_PLACE_M:g} m"
        handles.append(Line2D([], [], color=HALO, linewidth=7, label=text))
    return handles
