"""Pages about the codes of diagnostics, a file each in `explanations/`: what is wrong, why, and how it is put right."""

from __future__ import annotations

from importlib.resources import files

from attnc.spec.codes import CODES


def page(code: str) -> str | None:
    """The page of a code, as Markdown; None where there is no such code."""
    if code not in CODES:
        return None
    return files("attnc.spec").joinpath("explanations").joinpath(f"{code}.md").read_text(encoding="utf-8")
