"""What the report says of rivals that did not run: the reason, and what they published."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from document import Block, Paragraph, Table
from goals import shown
from part import Row


def beside(rows: Sequence[Row]) -> Iterator[Block]:
    """Rivals of a part that did not run, with the reason; and published figures, which are not measurements of ours."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for name, reason in row.get("absent", {}).items():
            reasons.setdefault(f"{name}: {reason}", []).append(row["key"])
    if reasons:
        told = [text if len(keys) == len(rows) else f"{text} ({len(keys)} rows)" for text, keys in reasons.items()]
        yield Paragraph(f"Not run. {'; '.join(told)}.")
    shown_rows = [
        [
            row["key"],
            one["published"],
            shown(float(one["value"]), str(one["unit"])),
            one["machine"],
            one["configuration"],
            one["source"],
        ]
        for row in rows
        for one in row.get("published", ())
    ]
    if shown_rows:
        yield Table(("row", "published, not measured here", "value", "machine", "configuration", "source"), shown_rows)
