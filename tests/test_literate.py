"""The pages in `literate/`: every quoted output of attnc is its actual output."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from attnc.runtime.texts.diagnosis import diagnosed
from attnc.runtime.texts.library import ModuleLoader
from attnc.spec.errors import SpecError
from attnc.spec.reading.source_text import decode
from attnc.spec.render import render

PAGES = sorted(path for path in (Path(__file__).parent / "literate").glob("*.md") if path.name != "README.md")
EXAMPLE = re.compile(r"```attn\n(?P<source>.*?)```\n(?:\n```text\n(?P<said>.*?)```\n)?", re.DOTALL)


def said(text: str) -> str:
    """Return the output of `attnc check` for a file."""
    try:
        diagnostics = diagnosed(decode(text, "example.attn"), ModuleLoader(None))
    except SpecError as error:
        diagnostics = error.diagnostics
    return "".join(f"{render(diagnostic)}\n\n" for diagnostic in diagnostics).removesuffix("\n")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_page(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    if os.environ.get("ATTNC_UPDATE_GOLDEN"):
        path.write_text(EXAMPLE.sub(_with_what_is_said, page), encoding="utf-8")
        return
    examples = list(EXAMPLE.finditer(page))
    assert len(examples) >= 3
    for example in examples:
        line = page.count("\n", 0, example.start()) + 1
        assert (example["said"] or "") == said(example["source"]), f"{path.name}:{line}"


def _with_what_is_said(example: re.Match[str]) -> str:
    output = said(example["source"])
    return f"```attn\n{example['source']}```\n" + (f"\n```text\n{output}```\n" if output else "")


def test_a_difference_would_be_found(tmp_path: Path) -> None:
    page = PAGES[0].read_text(encoding="utf-8").replace("-->", "->", 1)
    (example, *_) = [e for e in EXAMPLE.finditer(page) if e["said"] and "->" in e["said"]]
    assert example["said"] != said(example["source"])
