"""HTML as text that cannot be mistaken for text: whatever is not markup is escaped where it is put in."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape

from attnc.runtime.pictures.svg_parts import printable

VOID = frozenset({"meta", "input", "link", "br"})
"""Elements without an end tag."""


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def escaped(text: str) -> Markup:
    """Any text as HTML; markup stays what it is."""
    return text if isinstance(text, Markup) else Markup(escape(printable(text), quote=True))


def element(tag: str, /, *children: str, **attributes: str | float | None) -> Markup:
    """An element; in names of attributes `_` is written for `-`, and one at the end is dropped. None: left out."""
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escaped(value if isinstance(value, str) else px(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in VOID:
        return Markup(f"<{tag}{given}>")
    return Markup(f"<{tag}{given}>{joined(children)}</{tag}>")


def joined(parts: Iterable[str], between: str = "") -> Markup:
    """Parts one after another."""
    return Markup(between.join(map(escaped, parts)))


def embedded_json(data: object) -> Markup:
    """JSON that may stand in a script element: ASCII, and no character that begins a tag. Raises ValueError for NaN."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def px(value: float) -> str:
    """A coordinate, to a hundredth of a pixel."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
