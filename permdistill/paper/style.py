"""How figures look: for a page of two columns, 7 inches wide or 3.3, text of at least 7 points, fonts that a PDF keeps as
text, shapes and names beside colours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import Bbox

WIDE, NARROW, SMALL = 7.0, 3.3, 7  # inches of both columns and of one, points of the smallest text
COLOURS = dict(zip(("teacher", "debiased", "copy", "student"), sns.color_palette("colorblind"), strict=False))
NAMES = {"teacher": "biased teacher", "debiased": "all-orders average", "copy": "copied decision", "student": "student"}
SHAPES = {"teacher": "o", "debiased": "s", "copy": "X", "student": "^"}


def columns_style() -> None:
    """Set the style of whatever is drawn next."""
    sizes = ("font.size", "axes.labelsize", "axes.titlesize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize")
    rc = {"figure.dpi": 110, "savefig.dpi": 200, "pdf.fonttype": 42, "ps.fonttype": 42, "axes.titlepad": 4}
    sns.set_theme(context="paper", style="whitegrid", palette="colorblind", rc=rc | dict.fromkeys(sizes, 7.5))


def logarithmic(ax: Axes, ticks: Iterable[float] = (1, 2, 5), base: float = 10) -> None:
    """A log x axis with plain numbers (exponents would be smaller than the smallest text), as wide as it was set, or else as
    what is drawn."""
    low, high = (ax.dataLim.x0 / 1.2, ax.dataLim.x1 * 1.2) if ax.get_autoscalex_on() else ax.get_xlim()
    ax.set_xscale("log", base=base)
    ax.set_xlim(low, high)
    places = [t * 10.0**n for n in range(-4, 5) for t in ticks] if base == 10 else list(ticks)
    ax.xaxis.set_major_locator(FixedLocator([place for place in places if low <= place <= high]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


_SIDES = ((1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (2, 1), (2, -1), (-2, 1), (-2, -1))


def _drawn(ax: Axes) -> np.ndarray:
    """Places along the lines of a panel, in pixels (place, 2): what a name should not lie on."""
    share, found = np.linspace(0, 1, 30)[:, None], [np.empty((0, 2))]
    for line in ax.lines:
        at = ax.transData.transform(np.asarray(line.get_xydata(), dtype=float))
        found += [a + share * (b - a) for a, b in zip(at[:-1], at[1:], strict=True)] if line.get_linestyle() == "-" else []
    return np.concatenate(found)


def write_names(ax: Axes, x: Any, y: Any, texts: Sequence[str]) -> None:
    """Write each name beside its point, where it hides least: no other name or point, then no line, then near. The last
    thing done to a figure."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # from here on the layout is fixed
    lines, scale = _drawn(ax), figure.dpi / 72
    points = ax.transData.transform(np.column_stack([x, y]))
    taken = [Bbox.from_bounds(px - 4 * scale, py - 4 * scale, 8 * scale, 8 * scale) for px, py in points]

    def price(far: float, box: Bbox) -> float:
        inside = ax.bbox.x0 < box.x0 and box.x1 < ax.bbox.x1 and ax.bbox.y0 < box.y0 and box.y1 < ax.bbox.y1
        crossed = ((lines > box.min) & (lines < box.max)).all(axis=1).sum()
        return 100 * box.count_overlaps(taken) + 200 * (not inside) + 2 * crossed + far / 4

    for i in np.argsort(-points[:, 1], kind="stable"):
        (px, py), name = points[i], texts[i]
        width, height = 0.56 * SMALL * scale * len(name), 1.15 * SMALL * scale
        places = []
        for far in (6, 10, 15, 20, 28, 38, 50):
            for dx, dy in _SIDES:
                left = px + dx * far * scale - (width if dx < 0 else width / 2 if dx == 0 else 0)
                box = Bbox.from_bounds(left, py + dy * far * scale - height / 2, width, height)
                places.append((price(far * (1 + abs(dy) / 4), box), (dx * far, dy * far), box))
        _, offset, box = min(places, key=lambda place: place[0])
        taken.append(box)
        style: dict[str, Any] = {
            "ha": "right" if offset[0] < 0 else "center" if offset[0] == 0 else "left",
            "va": "center",
            "fontsize": SMALL,
        }
        style["bbox"] = {"facecolor": "white", "alpha": 0.7, "lw": 0, "pad": 0.3}
        if max(map(abs, offset)) > 9:
            style["arrowprops"] = {"arrowstyle": "-", "lw": 0.4, "color": "0.4", "shrinkA": 0, "shrinkB": 2}
        at = ((px - ax.bbox.x0) / ax.bbox.width, (py - ax.bbox.y0) / ax.bbox.height)
        ax.annotate(name, at, xycoords="axes fraction", xytext=offset, textcoords="offset points", **style)
