"""HTML as a type of its own, so that every text that is not markup is escaped where it is inserted."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape

from attnc.runtime.pictures.svg_parts import printable

VOID = frozenset({"meta", "input", "link", "br"})
"""Elements without an end tag."""


class Markup(str):
    """A text that is HTML."""

    __slots__ = ()


def escaped(text: str) -> Markup:
    """Return a text as HTML; markup is returned unchanged."""
    return text if isinstance(text, Markup) else Markup(escape(printable(text), quote=True))


def element(tag: str, /, *children: str, **attributes: str | float | None) -> Markup:
    """Return an element. In attribute names `_` stands for `-` and a final `_` is dropped; None omits an attribute."""
    attributes_text = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escaped(value if isinstance(value, str) else px(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in VOID:
        return Markup(f"<{tag}{attributes_text}>")
    return Markup(f"<{tag}{attributes_text}>{joined(children)}</{tag}>")


def joined(parts: Iterable[str], between: str = "") -> Markup:
    """Join parts, with `between` between them."""
    return Markup(between.join(map(escaped, parts)))


def embedded_json(data: object) -> Markup:
    """Return JSON that is safe in a script element: ASCII, without characters that start a tag.

    Raises ValueError for NaN.
    """
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def px(value: float) -> str:
    """Return a coordinate to a hundredth of a pixel."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
