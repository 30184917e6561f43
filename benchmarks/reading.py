"""Result files in `results/`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import suites
import timing
from benchmark_part import Row


@dataclass(frozen=True)
class Result:
    """A part's file: its rows, and the machine, versions, commit and date in `facts`."""

    part: str
    facts: Mapping[str, object]
    rows: Sequence[Row]

    @property
    def complete(self) -> bool:
        """Whether the part ran to its end."""
        return bool(self.facts["complete"])


def load(folder: Path = timing.RESULTS) -> dict[str, Result]:
    """Return the existing results by part, in the order of the suites."""
    results = {}
    for parts in suites.PARTS.values():
        for part in parts:
            path = folder / f"{part.name}.json"
            if path.exists():
                facts = json.loads(path.read_text(encoding="utf-8"))
                results[part.name] = Result(part.name, facts, facts.pop("rows"))
    return results


def rows(results: Mapping[str, Result]) -> dict[str, Sequence[Row]]:
    """Return only the rows, by part."""
    return {name: result.rows for name, result in results.items()}
