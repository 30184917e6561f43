"""Pages that explain the codes of diagnostics, one file per code in `explanations/`."""

from __future__ import annotations

from importlib.resources import files

from attnc.spec.codes import CODES


def page(code: str) -> str | None:
    """Return the page of a code as Markdown; None for an unknown code."""
    if code not in CODES:
        return None
    return files("attnc.spec").joinpath("explanations").joinpath(f"{code}.md").read_text(encoding="utf-8")
