"""The site's navigation has every page, and the pages are Markdown that mkdocs can read.

`make docs` builds the site and checks every link and anchor; these tests need no mkdocs.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def navigation() -> list[str]:
    """Return the paths in `nav` of mkdocs.yml."""
    _, _, nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")
    return re.findall(r"^ +- .+: (\S+)$", nav, re.MULTILINE)


@pytest.fixture(scope="module")
def site() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "site.py"))


def test_every_page_is_in_the_navigation_once() -> None:
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    entries = navigation()
    assert pages - set(entries) == set()
    assert len(entries) == len(set(entries))


def test_the_navigation_names_what_is_published(site: dict[str, Any]) -> None:
    names = {
        f"{path.relative_to(ROOT).as_posix()}{'/index.md' if path.is_dir() else ''}" for path in site["published"]()
    }
    assert set(navigation()) - names == set()
    assert {name for name in names if name.endswith(".md")} - set(navigation()) == set()


def test_no_script_of_the_documentation_is_published(site: dict[str, Any]) -> None:
    assert not [path for path in site["published"]() if path.suffix == ".py"]


@pytest.mark.parametrize(
    ("info", "line"),
    [
        ("attn window.attn", '```attn title="window.attn"'),
        ("attn wrong.attn error A106", '```attn title="wrong.attn: error A106"'),
        ("attn error A106", '```attn title="error A106"'),
        ("python needs transformers", "```python"),
        ("console", "```console"),
        ("", "```text"),
    ],
)
def test_code_blocks_open_in_the_syntax_of_mkdocs(site: dict[str, Any], info: str, line: str) -> None:
    block = site["FENCE"].search(f"```{info}\nbody\n```\n")
    assert site["fence"](block) == f"{line}\nbody\n```"
