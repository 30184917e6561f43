"""The parts of the page that a slider changes: the texts, shapes and rows of a point, by element id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from attnc.runtime.report.markup import Markup, element

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
