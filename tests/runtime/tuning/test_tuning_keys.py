"""Tuning keys contain everything that is fixed at compile time, and nothing that varies between calls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnc.compiler
from attnc import compile_attention
from attnc.runtime.call.tensor_checks import TensorSizes
from attnc.runtime.choices import choice_keys
from attnc.runtime.choices.choice_keys import (
    CompiledPattern,
    Key,
    bucket_of,
    emitter,
)
from attnc.runtime.choices.tuned import Tuned, target_name

SIZES = TensorSizes(4096, 4096, 2, 8, 8, 64, 64, "float32")


def tuned_of(*args: Any, **options: Any) -> Tuned:
    tuned = compile_attention(*args, tune="0s", **options).tuned
    assert tuned is not None
    return tuned


def key_of(sizes: TensorSizes = SIZES, spec: str = "sliding_window", **options: Any) -> Key:
    return tuned_of(spec, **options).key(sizes, "cpu")


def test_compile_time_settings_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changing any compile-time setting, or any two, gives a different key."""
    tuned = tuned_of("sliding_window", window=512)
    keys = {
        "itself": tuned.key(SIZES, "cpu"),
        "another parameter": key_of(window=513),
        "a parameter left at its default": key_of(window=512, sinks=1),
        "another pattern": key_of(spec="causal"),
        "strict": key_of(window=512, strict=True),
        "deterministic": key_of(window=512, deterministic=False),
        "dk": tuned.key(replace(SIZES, dk=128), "cpu"),
        "dv": tuned.key(replace(SIZES, dv=128), "cpu"),
        "dtype": tuned.key(replace(SIZES, dtype="bfloat16"), "cpu"),
        "grouped": tuned.key(replace(SIZES, kv_heads=2), "cpu"),
        "executor": _key_for_triton(tuned, monkeypatch),
        "form": Tuned(replace(tuned.compiled, form="packed"), tuned.wanted).key(SIZES, "cpu"),
    }
    with monkeypatch.context() as patched:
        patched.setattr(torch, "get_num_threads", lambda: 77)
        keys["threads"] = tuned.key(SIZES, "cpu")
    with monkeypatch.context() as patched:
        patched.setattr(choice_keys, "emitter", lambda: "another")
        keys["emitter"] = tuned.key(SIZES, "cpu")
    for package in ("torch", "triton"):
        with monkeypatch.context() as patched:
            versions = {"torch": "2.0", "triton": "3.0", package: "0.0"}
            patched.setattr(choice_keys, "installed", versions.get)
            keys[package] = tuned.key(SIZES, "cpu")
    digests = {key.digest for key in keys.values()}
    assert len(digests) == len(keys), "two of them are the same"


CONFIGURATIONS = st.fixed_dictionaries(
    {
        "params": st.fixed_dictionaries({"window": st.sampled_from([8, 9]), "sinks": st.sampled_from([0, 1])}),
        "options": st.fixed_dictionaries({"strict": st.booleans(), "deterministic": st.booleans()}),
        "sizes": st.fixed_dictionaries(
            {
                "dk": st.sampled_from([64, 128]),
                "dv": st.sampled_from([64, 128]),
                "dtype": st.sampled_from(["float32", "bfloat16"]),
                "kv_heads": st.sampled_from([8, 2]),
            }
        ),
        "form": st.sampled_from(["whole", "packed"]),
    }
)


@given(CONFIGURATIONS, CONFIGURATIONS)
def test_keys_are_equal_only_for_equal_settings(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Two draws of all compile-time settings have the same key if and only if they are equal."""
    keys_of = []
    for draw in (first, second):
        tuned = tuned_of("sliding_window", **draw["params"], **draw["options"])
        formed = Tuned(replace(tuned.compiled, form=draw["form"]), tuned.wanted)
        keys_of.append(formed.key(replace(SIZES, **draw["sizes"]), "cpu"))
    assert (keys_of[0] == keys_of[1]) == (first == second)
    assert (keys_of[0].digest == keys_of[1].digest) == (first == second)


def _key_for_triton(tuned: Tuned, monkeypatch: pytest.MonkeyPatch) -> Key:
    with monkeypatch.context() as patched:
        patched.setenv("TRITON_INTERPRET", "1")
        first = tuned.key(SIZES, "triton")
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            assert tuned.key(SIZES, "triton") != first
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        assert "sm_90" in target_name("triton", None)
    return first


@given(st.integers(0, 1 << 24), st.integers(0, 1 << 24), st.integers(1, 4096), st.integers(1, 128))
def test_sizes_of_a_call_are_not_in_the_key(n_q: int, n_k: int, batch: int, heads: int) -> None:
    """Lengths, batch and number of heads leave the key unchanged, as long as grouping stays the same."""
    sizes = replace(SIZES, n_q=n_q, n_k=n_k, batch=batch, heads=heads, kv_heads=heads)
    assert TUNED.key(sizes, "cpu") == TUNED.key(SIZES, "cpu")


TUNED = tuned_of("sliding_window", window=512)


@given(st.integers(1, 1 << 24), st.integers(1, 1 << 24), st.integers(1, 4096))
def test_buckets(n_q: int, n_k: int, lanes: int) -> None:
    """A bucket spans the sizes above one power of two up to the next."""
    sizes = replace(SIZES, n_q=n_q, n_k=n_k, batch=lanes, heads=1, kv_heads=1)
    name = bucket_of(sizes)
    up = [1 << (x - 1).bit_length() for x in (n_q, n_k, lanes)]
    assert name == f"q{up[0]}-k{up[1]}-lanes{up[2]}" + ("-square" if n_q == n_k else "")
    assert all(x <= u < 2 * x for x, u in zip((n_q, n_k, lanes), up, strict=True))


def test_keys_depend_on_values_but_not_on_names_or_layout() -> None:
    text = (
        "pattern own(size: int = 8)\n"
        "    let near = q - k < size\n"
        "    visible near and k <= q  # a window\n"
        "    align end\n"
    )
    other = (
        'pattern own(size: int = 8)\n    """Told."""\n\n    align   end\n'
        "    let close = q - k < size\n\n    visible close and k <= q\n"
    )
    assert key_of(spec=text) == key_of(spec=other)
    assert key_of(spec=text) != key_of(spec=text, size=9)
    unread = text.replace("(size: int = 8)", "(size: int = 8, more: int = 1)")
    assert key_of(spec=unread, more=1) != key_of(spec=unread, more=2), "even a parameter that nothing reads"


def test_differences_are_named() -> None:
    a, b = key_of(window=512), key_of(window=513)
    assert a.differing(a) == []
    parts = [line.partition(":")[0] for line in a.differing(b)]
    assert parts == ["parameters", "program"]
    assert "window=513" in a.differing(b)[0]
    assert "window=512" in str(a)


def test_the_emitter_is_identified_by_its_source_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    first = emitter()
    assert emitter() == first
    texts = list(choice_keys._texts(Path(attnc.compiler.__file__).parent))
    assert len(texts) > 100
    assert any(name.endswith(".json") for name, _ in texts)
    emitter.cache_clear()
    changed = [(name, data + b"#" * (name == "ir/fold.py")) for name, data in texts]
    monkeypatch.setattr(choice_keys, "_texts", lambda folder: changed)
    try:
        assert emitter() != first
    finally:
        emitter.cache_clear()


def test_equal_compiled_patterns_have_equal_programs() -> None:
    pattern = compile_attention("causal").pattern
    first, second = (CompiledPattern(pattern, "whole", False, True) for _ in range(2))
    assert first.program == second.program
