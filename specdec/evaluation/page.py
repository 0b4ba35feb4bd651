"""The HTML of a page that fetches nothing: style, sections, tables, figures. Every text that goes in is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from specdec.evaluation.plots.style import Plot
from specdec.evaluation.tables import Table

# The browser itself then refuses scripts and anything that is not in the file.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: #20242a; font: 15px/1.55 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 22px; line-height: 1.35; margin: 0 0 8px; font-weight: 650; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 12px; font-weight: 650; }
h3 { font-size: 15px; margin: 18px 0 8px; font-weight: 650; color: #3b4048; }
.lede { color: #5b616b; margin: 0 0 14px; overflow-wrap: anywhere; }
nav { margin: 0 0 20px; font-size: 13px; } nav a { color: #0b5c8f; text-decoration: none; margin-right: 14px; }
nav a:hover { text-decoration: underline; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; }
.card, .panel { background: #fff; border: 1px solid #e1e4e8; border-radius: 8px; padding: 14px 16px; }
.card b { display: block; font-size: 25px; font-weight: 650; font-variant-numeric: tabular-nums; }
.card span { color: #5b616b; font-size: 13px; display: block; line-height: 1.4; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); grid-auto-flow: dense; gap: 12px; }
@media (max-width: 760px) { .plots { grid-template-columns: minmax(0, 1fr); } }
figure { margin: 0; display: flex; flex-direction: column; } figure.wide { grid-column: 1 / -1; }
figcaption { font-weight: 600; margin-bottom: 8px; } figure img { width: 100%; height: auto; margin-bottom: auto; }
.panel { overflow-x: auto; } .panel + .panel { margin-top: 12px; } .plots .panel { margin-top: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th { text-align: left; font-weight: 600; color: #5b616b; font-size: 12.5px; vertical-align: bottom; }
th, td { padding: 6px 16px 6px 0; border-bottom: 1px solid #eef0f2; vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
tr:last-child td { border-bottom: 0; } td { overflow-wrap: anywhere; }
.right td:not(.name), .right th:not(.name) { text-align: right; overflow-wrap: normal; }
.right td:not(.name) { white-space: nowrap; } .name { white-space: pre-wrap; }
.right .name { overflow-wrap: break-word; }
.facts td:first-child { color: #5b616b; white-space: nowrap; }
.warn { border-left: 4px solid #D55E00; } .calm { border-left: 4px solid #009E73; }
.note { color: #5b616b; font-size: 13px; } p { margin: 8px 0; overflow-wrap: anywhere; }
.panel > p:first-child { margin-top: 0; } .panel > p:last-child { margin-bottom: 0; }
@media print { body { background: #fff; } figure, tr, .card { break-inside: avoid; } nav { display: none; } }
"""


def document(title: str, lede: str, sections: Iterable[tuple[str, str]], width: int = 1120) -> str:
    """A whole page. ``sections`` are (heading, HTML); empty ones are left out, those without heading not linked."""
    kept = [(heading, body) for heading, body in sections if body]
    links = "".join(f'<a href="#{_anchor(heading)}">{text(heading)}</a>' for heading, _ in kept if heading)
    blocks = [
        f'<section id="{_anchor(heading)}"><h2>{text(heading)}</h2>{body}</section>' if heading else body
        for heading, body in kept
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head>\n'
        f'<body><main style="max-width: {width}px"><h1>{text(title)}</h1><p class="lede">{text(lede)}</p>'
        f"<nav>{links}</nav>\n" + "\n".join(blocks) + "\n</main></body></html>\n"
    )


def _anchor(heading: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in heading.lower())


def text(value: Any) -> str:
    """Escaped for element content and for quoted attributes."""
    return escape(str(value), quote=True)


def paragraphs(lines: Iterable[str], kind: str = "") -> str:
    """A panel with a paragraph a line; ``kind`` is "warn", "calm" or nothing."""
    return f'<div class="panel {kind}">' + "".join(f"<p>{text(line)}</p>" for line in lines) + "</div>"


def cards(pairs: Iterable[tuple[str, str]]) -> str:
    """A row of large figures; each is (value, what it is)."""
    return (
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{text(value)}</b><span>{text(name)}</span></div>' for value, name in pairs)
        + "</div>"
    )


def table(content: Table | None, names: int = 1) -> str:
    """A table in a panel; ``names`` leading columns hold words, the rest figures when it is numeric."""
    if content is None:
        return ""
    kinds = ["name" if column < names else "" for column in range(len(content.header))]
    head = "".join(
        f'<th class="{kind}"{_width(content, column, kind)}>{text(content.header[column])}</th>'
        for column, kind in enumerate(kinds)
    )
    rows = "".join(
        "<tr>"
        + "".join(f'<td class="{kind}">{text(cell)}</td>' for cell, kind in zip(row, kinds, strict=True))
        + "</tr>"
        for row in content.rows
    )
    note = f'<p class="note">{text(content.note)}</p>' if content.note else ""
    kind = "right" if content.numeric else ""
    return f'<div class="panel"><table class="{kind}"><tr>{head}</tr>{rows}</table>{note}</div>'


def _width(content: Table, column: int, kind: str) -> str:
    """Room for the words of a column, within reason: else the browser breaks them to fit the panel."""
    if content.numeric and not kind:
        return ""  # figures are never broken
    longest = max(len(row[column]) for row in content.rows)
    return f' style="min-width: calc({min(longest, 26)}ch + 20px)"'


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values, without a header."""
    body = "".join(f"<tr><td>{text(name)}</td><td>{text(value)}</td></tr>" for name, value in rows)
    return f'<div class="panel"><table class="facts">{body}</table></div>' if rows else ""


def figures(plots: Sequence[Plot]) -> str:
    """The plots, two in a row, wide ones alone."""
    items = []
    for plot in plots:
        note = f'<p class="note">{text(plot.note)}</p>' if plot.note else ""
        items.append(
            f'<figure class="panel{" wide" if plot.wide else ""}"><figcaption>{text(plot.title)}</figcaption>'
            f'<img src="{plot.uri}" alt="{text(plot.text)}">{note}</figure>'
        )
    return f'<div class="plots">{"".join(items)}</div>' if items else ""
