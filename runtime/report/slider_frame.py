"""The parts of the page that a slider moves: one point's texts, shapes and rows, by their element ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from attnc.runtime.report.markup import Markup, element

Rows = Sequence[Sequence[str]]
Attributes = Mapping[str, str]


@dataclass(frozen=True)
class SliderFrame:
    """`texts` by name, `shapes`: attributes of SVG elements by their id, `rows` of tables and lists by their id.

    `tiles`: the states of the tiles of the picture, a digit each (0 empty, 1 partial, 2 full), a string a row.
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
        """An element that holds a text which moves."""
        return element(tag, self.texts[name], data_text=name, **attributes)

    def shape(self, tag: str, name: str, /, *children: str, **attributes: str | float | None) -> Markup:
        """An SVG element whose attributes move."""
        return element(tag, *children, id=name, **attributes, **self.shapes[name])
