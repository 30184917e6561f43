"""Every file of the library and every check: format, warnings, mask, output, kernels, machine code, simulation.

A check that does not apply to a pattern has a reason in `without.py`, and the test checks that the reason is true.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import kernel_verdicts
import pytest
import torch

from attnc import UnsupportedError, compile_attention
from attnc.compiler.warnings.pattern_warnings import warnings_of
from attnc.runtime.texts.library import (
    ModuleLoader,
    library_files,
    library_names,
    pattern_names,
    recurrence_names,
    routing_names,
)
from attnc.runtime.toolchain.selection import same_text
from attnc.spec.formatting import formatted
from attnc.spec.load import check_source, load_program
from attnc.spec.meaning.bind import bind
from attnc.spec.reading.source_text import decode
from attnc.spec.source import SourceFile
from cases.case import Case, check_mask, check_output, seen_by
from cases.every import every_case
from emitted_kernels import EMITTED, TARGET, WIDTHS, emitted, kernels_of
from kernel_calls import stages
from library_in_kernels import (
    LINEAR,
    LOOSE,
    OF_CHUNKS,
    check_case,
    check_pattern,
    chosen_calls,
    expected_calls,
    target_for,
    use,
)
from without import CHECKS, WARNED, every_reason, reason

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
LEAST_SHAPES = 3


def source_of(name: str) -> SourceFile:
    path = library_files()[name]
    return decode(path.read_bytes(), path.name)


# --- the text ---------------------------------------------------------------------------------------------------------


def check_form(name: str) -> None:
    source = source_of(name)
    assert formatted(source) == source.text
    if name in library_names():
        assert f"{'recurrence' if name in recurrence_names() else 'pattern'} {name}" in source.text
        assert "Source:" in source.text


def check_warnings(name: str) -> None:
    """Check the warnings of the text, of every preset and, where they are complete, of the defaults."""
    source, loader = source_of(name), ModuleLoader(None)
    assert check_source(source, loader) == ()
    if name not in library_names():
        return
    program = load_program(source, loader, name)
    choices: list[str | None] = [preset.name for preset in program.presets]
    if all(parameter.default is not None for parameter in program.parameters):
        choices.append(None)
    codes = {warning.code for preset in choices for warning in warnings_of(bind(program, {}, preset))}
    assert codes == WARNED.get(name, {}).keys()


# --- the meaning ------------------------------------------------------------------------------------------------------


def check_masks(name: str) -> None:
    cases = [case for case in every_case()[name] if case.mask is not None]
    refused = reason("mask", name)
    if refused:
        assert not cases
        case = every_case()[name][0]
        with pytest.raises(UnsupportedError, match=re.escape(refused.says)):
            seen_by(case.compiled(), case, case.operands())
        return
    assert len({case.shape for case in cases}) >= LEAST_SHAPES
    for case in cases:
        check_mask(case)


def check_outputs(name: str) -> None:
    cases = [case for case in every_case()[name] if case.output is not None]
    assert len({case.shape for case in cases}) >= LEAST_SHAPES
    for case in cases:
        check_output(case)


MOST = 130
"""Maximum number of keys for the reference executor, which is dense."""


def check_reference(name: str) -> None:
    for case in every_case()[name]:
        if case.output is not None and case.shape.n_k <= MOST:
            check_output(case, backend="reference")


# --- kernels ----------------------------------------------------------------------------------------------------------


def middling(name: str) -> Case:
    """Return the smallest case, above trivial sizes, with equal numbers of queries and keys."""
    candidates = [case for case in every_case()[name] if case.output is not None]
    return min(
        [case for case in candidates if 8 < case.shape.n_q == case.shape.n_k] or candidates,
        key=lambda case: case.shape.n_k,
    )


def check_kernels(name: str, patch: pytest.MonkeyPatch) -> None:
    """Check that the kernels ran, and that none ran for a pattern without kernels."""
    patch.setenv("TRITON_INTERPRET", "1")
    case, refused = middling(name), reason("interpreter", name)
    if name in pattern_names():
        use(patch, target_for(name))
        ran = stages(check_pattern(name, torch.float32, LOOSE.get(name)))
        assert not ran if refused else ran >= {"forward", "delta", "dq", "dkdv"}
    else:
        calls = chosen_calls(patch)
        ran = stages(check_case(case))
        assert not ran if refused else ran
        assert name not in LINEAR or ran >= OF_CHUNKS
        assert calls == ([] if refused else expected_calls(case))
    if refused:
        with pytest.raises(UnsupportedError, match=re.escape(refused.says)):
            case.compiled().source("sm_90")


Row = dict[str, Any]


@cache
def table() -> Mapping[str, Row]:
    """Return the rows of the library's kernels for sm_90 by digest, as last recorded."""
    kinds = ("library", "recurrences", "routing")
    paths = [path for kind in kinds for path in RESULTS.glob(f"kernels-{kind}-triton-*.json")]
    paths.sort(key=lambda path: str(json.loads(path.read_text(encoding="utf-8"))["date"]))
    rows = [row for path in paths for row in kernel_verdicts.read(path)]
    return {row["digest"]: row for row in rows if row["target"] == TARGET and "digest" in row}


@cache
def first_written() -> Mapping[tuple[str, str], str]:
    """Return the digest of the first kernel with each text."""
    return {same_text(kernel): kernel.source.digest for kernel in emitted(None)}


def check_gate(name: str) -> None:
    """Check, without compiling, that the committed tables have rows for the emitted texts.

    If a text has changed: `python benchmarks/kernels.py --changed`, `python benchmarks/recurrent_kernels.py --library`,
    `python benchmarks/chosen_kernels.py --library`.
    """
    refused = reason("gate", name)
    if refused:
        assert name in routing_names() or not kernels_of(name)
        with pytest.raises(UnsupportedError, match=re.escape(refused.says)):
            middling(name).compiled().source(TARGET)
        return
    kernels = kernels_of(name)
    of_both = name in pattern_names() or name in routing_names()
    assert kernels and (not of_both or {kernel.head_dim for kernel in kernels} == {*WIDTHS})
    failed = {}
    for kernel in kernels:
        row = table().get(kernel.source.digest) or table().get(first_written()[same_text(kernel)])
        assert row is not None, (kernel.title, kernel.head_dim)
        if row["verdict"] != "pass":
            failed[kernel.title, kernel.head_dim] = ", ".join(row["reasons"])
    assert failed == {}


# --- simulation -------------------------------------------------------------------------------------------------------


@cache
def headlines() -> Mapping[str, Any]:
    """Return the library at the calls of the catalogue: each with its first preset, or the preset of its headline."""
    path = [str(ROOT / "docs"), *sys.path]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", path)
        pages = importlib.import_module("catalogue_pages")
    return {shown.name: shown for shown in pages.every_shown()}


def check_simulation(name: str) -> None:
    shown, refused = headlines()[name], reason("simulate", name)
    assert (shown.preset is not None) == bool(shown.entry.program.presets)
    if refused:
        assert refused.says in shown.simulation
        return
    assert not isinstance(shown.simulation, str), shown.simulation
    assert shown.simulation.predicted_ms > 0
    assert shown.simulation.rungs
    assert all(rung.speedup > 0 for rung in shown.simulation.rungs)


# --- all checks -------------------------------------------------------------------------------------------------------

DONE: Mapping[str, Callable[[str], None]] = {
    "form": check_form,
    "warnings": check_warnings,
    "mask": check_masks,
    "output": check_outputs,
    "reference": check_reference,
    "gate": check_gate,
    "simulate": check_simulation,
}
WALK = [(name, check) for name in library_names() for check in CHECKS if check != "interpreter"]
CATALOGUE = pytest.mark.xdist_group("catalogue")
"""Tests that simulate the library at the calls of the catalogue, which one worker does once."""
GROUPS = {"simulate": CATALOGUE, "gate": EMITTED}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("name", "check"),
    [pytest.param(name, check, id=f"{name}-{check}", marks=GROUPS.get(check, ())) for name, check in WALK],
)
def test_every_file(name: str, check: str) -> None:
    DONE[check](name)


@pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")
@pytest.mark.parametrize("name", library_names(), ids=[f"{name}-interpreter" for name in library_names()])
def test_every_file_by_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_kernels(name, monkeypatch)


@pytest.mark.parametrize("name", sorted({*library_files()} - {*library_names()}))
def test_modules_of_definitions(name: str) -> None:
    check_form(name)
    check_warnings(name)


def test_every_check_is_made_and_every_reason_is_needed() -> None:
    assert {*DONE, "interpreter"} == set(CHECKS)
    assert every_case().keys() == set(library_names())
    assert {name for _, name in every_reason()} | WARNED.keys() <= set(library_names())


@pytest.mark.parametrize("name", library_names())
def test_a_copy_compiles_by_path(name: str, tmp_path: Path) -> None:
    copy, params = tmp_path / f"{name}.attn", every_case()[name][0].params
    copy.write_bytes(library_files()[name].read_bytes())
    assert compile_attention(copy, **params).name == name
    assert compile_attention(f"{copy}:{name}", **params).name == name
