"""Reports: self-contained, escaped, themable."""

from __future__ import annotations

import html.parser
import re

from raysys.report import Cell, Plot, Section, Table, new_figure, render_page, series_color
from raysys.report.figures import GRID, INK, to_svg

VOID = {"meta", "br", "img", "path", "use", "rect", "line", "circle"}


class Checker(html.parser.HTMLParser):
    """Checks that elements close in order, and collects addresses and ids."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self._collect(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._collect(attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def _collect(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("href", "src", "xlink:href"):
                self.addresses.append(str(value))


def page() -> str:
    plots = []
    for number in range(2):
        figure, axes = new_figure()
        axes.plot([0, 1], [number, 2], label="ours", color=series_color(number))
        axes.legend()
        plots.append(Plot(title="Curve & line", caption="a < b", figure=figure))
    table = Table(
        headers=["a", "<b>"], rows=[["<script>", Cell(text="3", tone="good", number=True)]]
    )
    sections = [
        Section(title="One", lead="x", tables=[table], plots=plots, notes=["n"], command="raysys"),
        Section(title="Two", warning="cannot run here"),
    ]
    return render_page("Title & co", "lead", sections, "footer")


def test_page_is_well_formed_and_self_contained() -> None:
    text = page()
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids)
    assert all(address.startswith("#") for address in checker.addresses)
    assert "<script" not in text
    assert not re.search(r"url\((?!#)", text)


def test_text_is_escaped() -> None:
    text = page()
    assert "&lt;script&gt;" in text
    assert "Title &amp; co" in text
    assert re.search(r'<td role="cell" data-label="[^"]*" class="good number">3</td>', text)


def test_only_tables_too_wide_for_a_phone_become_cards() -> None:
    narrow = Section(title="n", tables=[Table(headers=("a", "b"), rows=[("1", "2")])])
    wide = Section(title="w", tables=[Table(headers="abcd", rows=[tuple("1234")])])
    assert 'class="cards"' not in render_page("t", "l", [narrow])
    assert 'data-label="d">4</td>' in render_page("t", "l", [wide])
    assert 'class="cards"' in render_page("t", "l", [wide])


def test_svg_follows_the_theme() -> None:
    figure, axes = new_figure()
    axes.plot([0, 1], [0, 1], label="x")
    axes.legend()
    axes.set_title("t")
    svg = to_svg(figure)
    assert INK not in svg
    assert GRID not in svg
    assert "currentColor" in svg
    assert svg.startswith("<svg")
    assert 'width="100%"' in svg.split(">", 1)[0]


def test_every_reference_of_a_figure_has_its_target() -> None:
    figure, axes = new_figure(1, 2)
    axes[0].bar(["a", "b"], [1, 2])
    axes[1].plot([1, 2], marker="o")
    svg = to_svg(figure)
    targets = set(re.findall(r'id="([^"]+)"', svg))
    used = set(re.findall(r'href="#([^"]+)"', svg)) | set(re.findall(r"url\(#([^)]+)\)", svg))
    assert used
    assert used <= targets
