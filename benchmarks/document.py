"""A document of headings, paragraphs, tables and pictures, written as Markdown or as one page of HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attnc.runtime.report.markup import Markup, element, joined


@dataclass(frozen=True)
class Heading:
    """A heading of level 1, 2 or 3."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of plain text."""

    text: str


@dataclass(frozen=True)
class DocumentTable:
    """A table whose cells are plain text; columns after the first `words` columns are figures."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1


@dataclass(frozen=True)
class Picture:
    """An SVG with its file name, and a description for readers who do not see it."""

    name: str
    svg: str
    alt: str


Block = Heading | Paragraph | DocumentTable | Picture


def pictures(blocks: Sequence[Block]) -> Mapping[str, str]:
    """Return the SVGs by file name."""
    return {block.name: block.svg for block in blocks if isinstance(block, Picture)}


def as_markdown(blocks: Sequence[Block]) -> str:
    """Return Markdown that refers to its pictures in `performance/`."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Picture(name, _, alt):
            return f"![{alt}](performance/{name})"
        case DocumentTable(head, rows, words):
            rule = [" --- " if i < words else " ---: " for i in range(len(head))]
            lines = [[_cell(cell) for cell in row] for row in (head, *rows)]
            texts = ["| " + " | ".join(line) + " |" for line in lines]
            return "\n".join([texts[0], "|" + "|".join(rule) + "|", *texts[1:]])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; }
th, td { padding: 3px 9px; border-bottom: 1px solid #d1d9e0; text-align: left; vertical-align: top; }
.figure { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
"""


def as_html(blocks: Sequence[Block], title: str) -> str:
    """Return one page that contains its pictures."""
    head = element("head", element("meta", charset="utf-8"), element("title", title), element("style", Markup(STYLE)))
    return "<!doctype html>\n" + element("html", head, element("body", *map(_html, blocks)), lang="en") + "\n"


def _html(block: Block) -> Markup:
    match block:
        case Heading(level, text):
            return element(f"h{level}", text)
        case Paragraph(text):
            return element("p", text)
        case Picture(_, svg, _):
            return element("p", Markup(svg))
        case DocumentTable(head, rows, words):
            top = element("tr", *(element("th", cell) for cell in head))
            return element("table", top, joined(element("tr", *_cells(row, words)) for row in rows))


def _cells(row: Sequence[str], words: int) -> list[Markup]:
    return [element("td", cell, class_="figure" if i >= words else None) for i, cell in enumerate(row)]
