"""Patterns from text and call shapes without tensors, for tests of plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnc.compiler.ir import Pattern
from attnc.compiler.lowering.lower import lower
from attnc.compiler.planning.build_plan import CallShape
from attnc.spec.load import load_program
from attnc.spec.meaning.bind import bind
from attnc.spec.source import SourceFile

LIBRARY = Path(__file__).resolve().parents[2] / "stdlib_patterns"


def from_library(name: str, **values: object) -> Pattern:
    """Return a pattern of the library, without the runtime that finds it."""
    program = load_program(_file(name), lambda wanted, asker: _file(wanted), name)
    return lower(bind(program, values, None))


def _file(name: str) -> SourceFile:
    (path,) = LIBRARY.glob(f"*/{name}.attn")
    return SourceFile(f"{name}.attn", path.read_text(encoding="utf-8"))


def lowered(source: str, **values: object) -> Pattern:
    program = load_program(SourceFile("drawn.attn", source), lambda name, asker: None)
    return lower(bind(program, values, None))


def call(n_q: int, n_k: int, heads: int = 1, kv_heads: int = 1, batch: int = 1, **more: Any) -> CallShape:
    sizes = {"heads": heads, "kv_heads": kv_heads, "group": heads // kv_heads, "dk": 64, "dv": 64}
    return CallShape(
        n_q=n_q,
        n_k=n_k,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        dk=64,
        dv=64,
        dtype=more.pop("dtype", "float32"),
        sizes=sizes | more.pop("sizes", {}),
        inputs=more,
    )
