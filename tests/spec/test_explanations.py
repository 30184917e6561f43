"""Every code has a page whose wrong example is reported with the code and whose right example compiles."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from attnc.compiler.warnings.pattern_warnings import warnings_of
from attnc.spec.codes import CODES, page
from attnc.spec.errors import EvaluationError, SpecError
from attnc.spec.load import check_source, load_program, load_programs
from attnc.spec.meaning.bind import bind
from attnc.spec.meaning.evaluate import Evaluator
from attnc.spec.reading.source_text import decode
from attnc.spec.source import SourceFile

PAGES = Path(__file__).parents[2] / "spec" / "explanations"
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
MODULES = {"windows": "def near(x, y, window) = abs(x - y) < window\n\npattern banded(w: int)\n    visible q - k < w\n"}
DEPTH = 20
MODULES |= {f"depth_{n}": f"use depth_{n + 1} (near)\n" for n in range(1, DEPTH)}
MODULES[f"depth_{DEPTH}"] = MODULES["windows"].split("\n", 1)[0] + "\n"
SHIFTED = "def shifted(x, y, _length, window) = x - window // 2 <= y and y < x - window // 2 + window\n"
MODULES["windows"] += f"\n{SHIFTED}"
"""Modules that examples may `use`."""


def load(name: str, asking: SourceFile) -> SourceFile | None:
    if name in MODULES:
        return SourceFile(f"{name}.attn", MODULES[name])
    return SourceFile(f"{name}.attn", asking.text) if name in ("left", "right") else None


def example(code: str, heading: str) -> tuple[bytes, dict[str, Any]]:
    """Return the text under a heading, and the parameters and inputs of its call."""
    text = page(code)
    assert text is not None
    _, _, rest = text.partition(f"## {heading}\n")
    section = rest.split("\n## ")[0]
    code_blocks = BLOCK.findall(section)
    assert code_blocks, f"{code}: nothing under `{heading}`"
    (kind, body), *more = code_blocks
    parameters = json.loads(more[0][1]) if more else {}
    if kind == "python":  # an example too large for a page
        return eval(body, {"__builtins__": {}}).encode(), parameters
    if kind == "escaped":  # an example with characters that cannot be shown
        return body.encode().decode("unicode_escape").encode("latin-1"), parameters
    assert kind == "attn", kind
    return body.encode(), parameters


def codes_of(data: bytes, parameters: dict[str, Any]) -> list[str]:
    """Return the codes of all diagnostics of a text that is bound and called as the page says."""
    try:
        source = decode(data, "example.attn")
        code_list = [d.code for d in check_source(source, load)]
        if any(code < "W" for code in code_list):
            return code_list
        programs = load_programs(source, load)
        if not programs:
            load_program(source, load)
        for program in programs:
            values, preset = parameters.get("parameters", {}), parameters.get("preset")
            if (
                any(p.default is None and p.name not in values for p in program.parameters)
                and "parameters" not in parameters
            ):
                continue
            bound = bind(program, values, preset)
            if not parameters:
                code_list += [d.code for d in warnings_of(bound)]
            if "queries" in parameters:
                call = {k: v for k, v in parameters.items() if k not in ("parameters", "preset")}
                Evaluator(bound, **call).mask()
    except SpecError as error:
        return [d.code for d in error.diagnostics]
    except EvaluationError as error:
        return re.findall(r"\b[AW]\d{3}\b", str(error))[:1]
    return code_list


@pytest.mark.parametrize("code", CODES)
def test_a_page_and_its_examples(code: str) -> None:
    text = page(code)
    assert text is not None
    assert text.startswith(f"# {code}: {CODES[code]}\n"), f"the title of {code} is {CODES[code]!r}"
    assert all(len(line) <= 120 for line in text.splitlines())
    wrong, right = (codes_of(*example(code, heading)) for heading in ("Wrong", "Right"))
    assert code in wrong, f"the wrong example gives {wrong}"
    assert right == [], f"the right example gives {right}"


def test_every_page_belongs_to_a_code() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} == set(CODES)


def test_unknown_codes_have_no_page() -> None:
    assert page("A000") is None
    assert page("../README") is None
