"""HTML as a type of its own, so that every text that is not markup is escaped, and the parts that a slider changes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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


Rows = Sequence[Sequence[str]]
Attributes = Mapping[str, str]


@dataclass(frozen=True)
class SliderFrame:
    """The changeable parts of the page at a point.

    `texts` by name; `shapes`: attributes of SVG elements by id; `rows` of tables and lists by id. `tiles`: the states
    of the picture's tiles, a digit each (0 empty, 1 partial, 2 full), one string per row.
    """

    texts: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, Attributes] = field(default_factory=dict)
    rows: Mapping[str, Rows] = field(default_factory=dict)
    tiles: Sequence[str] = ()

    def __or__(self, other: SliderFrame) -> SliderFrame:
        return SliderFrame(
            {**self.texts, **other.texts},
            {**self.shapes, **other.shapes},
            {**self.rows, **other.rows},
            self.tiles or other.tiles,
        )

    def text(self, tag: str, name: str, /, **attributes: str | float | None) -> Markup:
        """Return an element with a text that sliders change."""
        return element(tag, self.texts[name], data_text=name, **attributes)

    def shape(self, tag: str, name: str, /, *children: str, **attributes: str | float | None) -> Markup:
        """Return an SVG element with attributes that sliders change."""
        return element(tag, *children, id=name, **attributes, **self.shapes[name])
