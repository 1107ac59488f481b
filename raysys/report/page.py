"""The HTML page: sections with prose, tables and plots; no scripts, no outside resources."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence
from typing import Literal

from raysys.report.figures import Plot, to_svg
from raysys.report.style import STYLE

Tone = Literal["", "good", "bad", "muted"]
CARD_COLUMNS = 4  # tables from here on do not fit a phone's width


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A table cell; ``tone`` colours it, ``number`` aligns it right."""

    text: str
    tone: Tone = ""
    number: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table; plain strings are shown as they are."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    caption: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of the page.

    Args:
        title: heading; also the entry in the table of contents.
        lead: one or two sentences below it.
        tables, plots: shown in this order.
        notes: small print, one line each.
        command: how to run this for real; shown as code.
        warning: shown prominently, such as why a part did not run.
    """

    title: str
    lead: str = ""
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    notes: Sequence[str] = ()
    command: str = ""
    warning: str = ""


def render_page(title: str, lead: str, sections: Sequence[Section], footer: str = "") -> str:
    """Return a complete HTML document; every text is escaped."""
    contents = "".join(
        f'<li><a href="#s{number}">{_text(section.title)}</a></li>'
        for number, section in enumerate(sections)
    )
    body = "".join(_section(number, section) for number, section in enumerate(sections))
    navigation = f"<nav><ul>{contents}</ul></nav>" if len(sections) > 1 else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>{_text(title)}</h1><p>{_text(lead)}</p>{navigation}</header>"
        f"{body}<footer>{_text(footer)}</footer></main></body></html>\n"
    )


def _section(number: int, section: Section) -> str:
    parts = [f'<section id="s{number}"><h2>{_text(section.title)}</h2>']
    if section.lead:
        parts.append(f"<p>{_text(section.lead)}</p>")
    if section.warning:
        parts.append(f'<p class="warning">{_text(section.warning)}</p>')
    parts += [_table(table) for table in section.tables]
    parts += [_plot(plot) for plot in section.plots]
    if section.notes:
        items = "".join(f"<li>{_text(note)}</li>" for note in section.notes)
        parts.append(f'<ul class="notes">{items}</ul>')
    if section.command:
        parts.append(f"<pre><code>{_text(section.command)}</code></pre>")
    return "".join(parts) + "</section>"


def _table(table: Table) -> str:
    """A table; on a narrow screen one of many columns becomes a list of cards, a row each.

    The roles keep it a table for screen readers when the style changes ``display``.
    """
    heads = "".join(
        f'<th scope="col" role="columnheader">{_text(header)}</th>' for header in table.headers
    )
    rows = "".join(_row(row, table.headers) for row in table.rows)
    caption = f"<caption>{_text(table.caption)}</caption>" if table.caption else ""
    kind = ' class="cards"' if len(table.headers) >= CARD_COLUMNS else ""
    return (
        f'<div class="scroll" tabindex="0"><table{kind} role="table">{caption}'
        f'<thead role="rowgroup"><tr role="row">{heads}</tr></thead>'
        f'<tbody role="rowgroup">{rows}</tbody></table></div>'
    )


def _row(row: Sequence[str | Cell], headers: Sequence[str]) -> str:
    cells = [_cell(value, header) for value, header in zip(row, headers, strict=True)]
    return f'<tr role="row">{"".join(cells)}</tr>'


def _cell(value: str | Cell, header: str) -> str:
    cell = Cell(text=value) if isinstance(value, str) else value
    names = " ".join(name for name in (cell.tone, "number" if cell.number else "") if name)
    attribute = f' class="{names}"' if names else ""
    return f'<td role="cell" data-label="{_text(header)}"{attribute}>{_text(cell.text)}</td>'


def _plot(plot: Plot) -> str:
    return (
        f'<figure role="group" aria-label="{_text(plot.title)}"><h3>{_text(plot.title)}</h3>'
        f'<div class="scroll" tabindex="0">{to_svg(plot.figure)}</div>'
        f"<figcaption>{_text(plot.caption)}</figcaption></figure>"
    )


def _text(value: str) -> str:
    return html.escape(value, quote=True)
