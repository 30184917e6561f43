"""A batch costs the host about as much as a single entry, and each entry gets the result that it gets alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnc import Attention, compile_attention
from attnc.runtime.call.example_inputs import example_inputs
from attnc.runtime.executors import pattern_attentions
from attnc.runtime.executors.cpu import masked, pooled_attention
from attnc.runtime.executors.selections import choose
from attnc.runtime.values import folded

N, HEADS, KV_HEADS, DIM = 64, 4, 2, 8

SELECTIONS: Mapping[str, Mapping[str, Any]] = {
    "moba": {"block": 8},
    "flash_moba": {"block": 8, "topk": 3},
    "native_sparse": {"block": 8, "topk": 4, "window": 8},
    "deepseek_sparse": {"topk": 9},
    "seer": {"block": 8},
    "minference_blocks": {"block": 8, "topk": 3},
    "hip": {"stages": [16, 4], "kept": [32, 16], "strides": [4, 1], "rows": 16, "sinks": 4, "window": 16},
}
RECURRENCES = ("retention", "gla", "linear_attention", "mamba2_ssd", "delta_net", "gated_delta_net")


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the operators that torch runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _inputs(attend: Attention, batch: int) -> dict[str, Tensor]:
    sizes = {"kv_head": KV_HEADS, "dk": DIM, "dv": DIM}
    examples = example_inputs(attend.bound, N, N, {}, batch=batch, heads=HEADS, sizes=sizes)
    return {name: example.tensor for name, example in examples.items()}


def _is_by_batch(attend: Attention, name: str) -> bool:
    (dims,) = (item.type.dims for item in attend.bound.program.inputs if item.name == name)
    return dims[:1] == ("batch",)


def _vectors(batch: int) -> list[Tensor]:
    """Draw q, k and v; entry 1 has many equal scores and entry 2 equal keys."""
    draw = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(batch, heads, N, DIM, generator=draw) for heads in (HEADS, KV_HEADS, KV_HEADS))
    if batch > 2:
        q[1], k[1], k[2] = q[1].round(), k[1].round(), k[2, :, :1]
    return [q, k, v]


def _results(attend: Any, vectors: list[Tensor], inputs: Mapping[str, Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in vectors]
    q, k, v = leaves
    out = attend(q, k, v, **inputs)
    return [out.detach(), *torch.autograd.grad(out.square().sum() + out.sin().sum(), leaves)]


def _calls(attend: Attention, batch: int) -> int:
    vectors, inputs = _vectors(batch), _inputs(attend, batch)
    _results(attend, vectors, inputs)
    with Calls() as calls:
        _results(attend, vectors, inputs)
    count: int = calls.count
    return count


@pytest.mark.parametrize("name", [*SELECTIONS, *RECURRENCES])
def test_operators_run_for_the_whole_batch(name: str) -> None:
    """Each entry used to add 130 to 4,400 operator calls to a selection; only views of the output's parts remain.

    The recurrences never looped over the batch.
    """
    attend = compile_attention(name, **SELECTIONS.get(name, {}))
    three_entries, twelve_entries = _calls(attend, 3), _calls(attend, 12)
    assert twelve_entries - three_entries <= 4 * 9


@pytest.mark.parametrize("name", SELECTIONS)
def test_entries_equal_separate_calls(name: str) -> None:
    attend = compile_attention(name, **SELECTIONS[name])
    batch = 4
    vectors, inputs = _vectors(batch), _inputs(attend, batch)
    batched = _results(attend, vectors, inputs)
    for i in range(batch):
        entry_inputs = {key: x[i : i + 1] if _is_by_batch(attend, key) else x for key, x in inputs.items()}
        alone = _results(attend, [x[i : i + 1] for x in vectors], entry_inputs)
        for ours, wanted in zip(batched, alone, strict=True):
            torch.testing.assert_close(ours[i : i + 1], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["moba", "native_sparse", "hip"])
def test_a_large_batch_is_split(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries computed one by one, as for long sequences, give the same results as entries computed together."""
    attend = compile_attention(name, **SELECTIONS[name])
    vectors, inputs = _vectors(5), _inputs(attend, 5)
    together = _results(attend, vectors, inputs)
    monkeypatch.setattr(choose, "AT_ONCE", 2 * HEADS * N * N)
    monkeypatch.setattr(folded, "AT_ONCE", 2 * HEADS * N * N)
    for module in (masked, pooled_attention, pattern_attentions):
        monkeypatch.setattr(module, "AT_ONCE", 2 * HEADS * N * N)
    for ours, wanted in zip(_results(attend, vectors, inputs), together, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


def test_entries_at_once() -> None:
    assert list(folded.entries_at_once(5, 10, 29)) == [range(2), range(2, 4), range(4, 5)]
    assert list(folded.entries_at_once(3, 10, 1)) == [range(1), range(1, 2), range(2, 3)]
    assert list(folded.entries_at_once(0, 10, 100)) == []


@pytest.mark.parametrize("name", SELECTIONS)
def test_an_empty_batch(name: str) -> None:
    attend = compile_attention(name, **SELECTIONS[name])
    vectors = [x[:0] for x in _vectors(1)]
    inputs = {key: x[:0] if _is_by_batch(attend, key) else x for key, x in _inputs(attend, 1).items()}
    out, *grads = _results(attend, vectors, inputs)
    assert out.shape == (0, HEADS, N, DIM)
    assert [x.shape for x in grads] == [x.shape for x in vectors]


STAGED = """
pattern staged
    input   allowed: bool[batch, query, key]
    select near
        over    b = k
        from    allowed[q, b]
        keep    rank < 40
        score   0
    select kept
        over    b = k
        score   dot(q, k[b])
        from    b in near
        keep    rank < 2
    visible k in kept
"""


def test_entries_with_few_candidates_beside_others() -> None:
    """A selection with few candidates computes their scores alone; each entry is checked for having few."""
    attend = compile_attention(STAGED)
    vectors = _vectors(3)
    allowed = torch.ones(3, N, N, dtype=torch.bool)
    allowed[1] = torch.arange(N) % 9 == torch.arange(N)[:, None] % 9
    batched = _results(attend, vectors, {"allowed": allowed})
    for i in range(3):
        alone = _results(attend, [x[i : i + 1] for x in vectors], {"allowed": allowed[i : i + 1]})
        for ours, wanted in zip(batched, alone, strict=True):
            torch.testing.assert_close(ours[i : i + 1], wanted, rtol=1e-5, atol=1e-6)


def test_nan_in_keys_that_are_not_selected() -> None:
    attend = compile_attention("moba", block=8, topk=1)
    vectors = _vectors(3)
    clean = _results(attend, vectors, {})
    vectors[2][1, :, 40] = torch.nan
    spoiled = _results(attend, vectors, {})
    before = [(slice(None), slice(None), slice(0, 40))] * 4
    for rows, ours, wanted in zip(before, spoiled, clean, strict=True):
        assert torch.equal(ours[0], wanted[0]) and torch.equal(ours[2], wanted[2])
        assert torch.equal(ours[rows], wanted[rows])


def test_a_later_token_changes_no_bit_of_an_earlier_row() -> None:
    attend = compile_attention("moba", block=8, topk=2)
    q, k, v = _vectors(3)
    before = attend(q, k, v)
    k[:, :, 50:], v[:, :, 50:], q[:, :, 50:] = 3.0, -2.0, 1.0
    assert torch.equal(attend(q, k, v)[:, :, :50], before[:, :, :50])
