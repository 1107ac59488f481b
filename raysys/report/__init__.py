"""Self-contained HTML reports: one file, inline SVG plots, light and dark, phone to desktop."""

from raysys.report.figures import Plot, new_figure, series_color
from raysys.report.page import Cell, Section, Table, render_page

__all__ = ["Cell", "Plot", "Section", "Table", "new_figure", "render_page", "series_color"]
