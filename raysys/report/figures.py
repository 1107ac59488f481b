"""Matplotlib figures that become inline SVG and follow the page's light or dark theme.

Text, axes and grid are drawn in stand-in colours, which the SVG text then swaps for
``currentColor`` and CSS variables; data series keep fixed colours that read on both backgrounds.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, adjusted to a contrast of at least 3:1 on white and on #14171c.
SERIES_COLORS = ("#1f7fc4", "#d9641e", "#0f9a70", "#b45fa4", "#8a8f98", "#b8860b")
INK = "#010203"
GRID = "#040506"

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "axes.grid": True,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "lines.linewidth": 2,
}
_unique = itertools.count()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """A figure with the words around it.

    Args:
        title: what is compared, in a few words.
        caption: how to read it, and where the figures come from.
        figure: a matplotlib figure, best made by :func:`new_figure`.
    """

    title: str
    caption: str
    figure: Figure


def new_figure(
    rows: int = 1, columns: int = 1, *, width: float = 7.0, height: float = 3.4
) -> tuple[Figure, Any]:
    """Make a figure in the house style; no global matplotlib state is touched.

    Returns:
        The figure and its axes: one ``Axes``, or an array of shape [rows, columns].
    """
    import matplotlib as mpl
    from cycler import cycler
    from matplotlib.figure import Figure

    with mpl.rc_context({**_STYLE, "axes.prop_cycle": cycler(color=list(SERIES_COLORS))}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns)
    return figure, axes


def series_color(index: int) -> str:
    """Colour of the ``index``-th series, repeating after the palette's end."""
    return SERIES_COLORS[index % len(SERIES_COLORS)]


def to_svg(figure: Figure) -> str:
    """Return the figure as an ``<svg>`` element that scales with its container.

    Ids are made unique, so that several figures can stand in one page.
    """
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "raysys"}):
        for axes in figure.axes:
            existing = axes.get_legend()
            if existing is not None:
                existing.set_frame_on(False)
                for text in existing.get_texts():
                    text.set_color(INK)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = svg.replace(INK, "currentColor").replace(GRID, "var(--grid, #9aa0a8)")
    svg = svg.replace("#000000", "currentColor")  # a caller's plain black must show on dark too
    prefix = f"f{next(_unique)}-"
    svg = re.sub(r'id="([^"]+)"', rf'id="{prefix}\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", svg)
    return re.sub(r'(<svg[^>]*?) width="[^"]+"', r'\1 width="100%"', svg, count=1).replace(
        ' height="', ' data-height="', 1
    )
