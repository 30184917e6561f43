"""Decode and prefill of patterns with a state: split anywhere, with any cache, they give the result of one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import ArgumentError, ArgumentTypeError, UnsupportedError, compile_attention

B, H, T, D = 2, 4, 23, 6
NEED = 5


def draw(kv_heads: int = H, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(5)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=made, dtype=torch.float64).to(dtype)

    rows = {"q": normal(B, H, T, D), "k": normal(B, kv_heads, T, D), "v": normal(B, kv_heads, T, D)}
    return {**rows, "g": -normal(B, T, H).abs(), "gate": normal(B, T, H).sigmoid()}


PLACES = """pattern p(window: int = 5)
    align end
    input g: log_decay[batch, token, head]
    input gate: unit[batch, query, head]
    branch near
        visible 0 <= q - k < window
    branch far[c in 0 .. 2]
        state S: [dk, dv]
        step  S = (exp(g) if t % (c + 2) == 0 else 1) * S + outer(k, v)
        read  scale * q @ S
    combine gate[q] * near + (1 - gate[q]) * (far[0] - far[1])
"""
"""A pattern with a family of states that count positions."""

PATTERNS = {"library": "hybrid_window_linear", "a family that counts": PLACES}


def attention(name: str, **options: Any) -> Any:
    return compile_attention(PATTERNS[name], window=NEED, **options)


def inputs_of(tensors: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """Return the inputs of a span of tokens."""
    return {name: tensors[name][:, start:stop] for name in ("g", "gate")}


@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("cut", [0, 1, 9, 22])
def test_a_prompt_and_steps_equal_one_call(name: str, cut: int, kv_heads: int) -> None:
    attend, tensors = attention(name), draw(kv_heads)
    q, k, v = (tensors[name_of_tensor] for name_of_tensor in "qkv")
    expected = attend(**tensors)
    state, parts = attend.init_state(B, H, D, D, dtype=torch.float64), []
    if cut:
        out, state = attend.prefill(q[:, :, :cut], k, v, kv_len=cut, state=state, **inputs_of(tensors, 0, cut))
        parts.append(out)
    with torch.no_grad():
        for t in range(cut, T, 2):
            stop = min(t + 2, T)
            out, state = attend.decode(q[:, :, t:stop], k, v, kv_len=stop, state=state, **inputs_of(tensors, t, stop))
            parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["ring", "pages"])
def test_other_caches(kind: str) -> None:
    attend, tensors = attention("library"), draw()
    q, k, v = (tensors[name_of_tensor] for name_of_tensor in "qkv")
    expected, state, parts = attend(**tensors), attend.init_state(B, H, D, D, dtype=torch.float64), []
    table = torch.tensor([[7, 2, 5, 0, 9, 4], [1, 8, 3, 6, 10, 11]])
    caches = [x.new_zeros(*((B, H, NEED) if kind == "ring" else (12, H, 4)), D) for x in (k, v)]
    how: dict[str, Any] = {"ring": True} if kind == "ring" else {"block_table": table}
    for t in range(T):
        for cache, x in zip(caches, (k, v), strict=True):
            if kind == "ring":
                cache[:, :, t % NEED] = x[:, :, t]
            else:
                cache[table[:, t // 4], :, t % 4] = x[:, :, t]
        with torch.no_grad():
            out, state = attend.decode(
                q[:, :, t : t + 1], *caches, kv_len=t + 1, state=state, **how, **inputs_of(tensors, t, t + 1)
            )
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), expected, rtol=1e-10, atol=1e-10)


def test_batch_entries_of_different_lengths() -> None:
    attend, tensors = attention("a family that counts"), draw()
    lengths = (19, 8)
    out, state = None, attend.init_state(B, H, D, D, dtype=torch.float64)
    for entry, length in enumerate(lengths):
        entry_tensors = {
            name_of_tensor: x[entry : entry + 1, :, :length] if x.ndim == 4 else x[entry : entry + 1, :length]
            for name_of_tensor, x in tensors.items()
        }
        begun = {name_of_tensor: x[entry : entry + 1] for name_of_tensor, x in state.items()}
        q, k, v = (entry_tensors[name_of_tensor] for name_of_tensor in "qkv")
        _, states_after = attend.prefill(
            q, k, v, kv_len=length, state=begun, g=entry_tensors["g"], gate=entry_tensors["gate"]
        )
        for name_of_tensor, x in states_after.items():
            state[name_of_tensor][entry] = x[0]
    cache_lengths = torch.tensor(lengths)
    rows = {
        name_of_tensor: torch.stack([tensors[name_of_tensor][i, n] for i, n in enumerate(lengths)])[:, None]
        for name_of_tensor in ("g", "gate")
    }
    q = torch.stack([tensors["q"][i, :, n] for i, n in enumerate(lengths)])[:, :, None]
    with torch.no_grad():
        out, states_after = attend.decode(q, tensors["k"], tensors["v"], kv_len=cache_lengths + 1, state=state, **rows)
    expected = attend(**tensors)
    for i, n in enumerate(lengths):
        torch.testing.assert_close(out[i, :, 0], expected[i, :, n], rtol=1e-10, atol=1e-10)
    assert states_after["far[0].t"].tolist() == [20, 9]


def test_the_reference() -> None:
    attend, tensors = attention("library", backend="reference"), draw()
    q, k, v = (tensors[name_of_tensor] for name_of_tensor in "qkv")
    expected = attention("library")(**tensors)
    state, parts = attend.init_state(B, H, D, D, dtype=torch.float64), []
    for start, stop, run in ((0, 18, attend.prefill), (18, T, attend.decode)):
        more = {"g": tensors["g"][:, :stop], "gate": tensors["gate"][:, start:stop]}
        out, state = run(q[:, :, start:stop], k, v, kv_len=stop, state=state, **more)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), expected, rtol=1e-10, atol=1e-10)


def test_gradients_of_a_prompt_in_chunks() -> None:
    attend, tensors = attention("library"), {name_of_tensor: x.requires_grad_() for name_of_tensor, x in draw().items()}
    q, k, v = (tensors[name_of_tensor] for name_of_tensor in "qkv")
    weights = torch.randn(B, H, T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    state, parts = attend.init_state(B, H, D, D, dtype=torch.float64), []
    for start, stop in ((0, 9), (9, 10), (10, T)):
        more = inputs_of(tensors, start, stop)
        out, state = attend.prefill(q[:, :, start:stop], k, v, kv_len=stop, state=state, **more)
        parts.append(out)
    leaves = list(tensors.values())
    ours = torch.autograd.grad((torch.cat(parts, 2) * weights).sum(), leaves)
    reference_grads = torch.autograd.grad((attend(**tensors) * weights).sum(), leaves)
    for grad, reference_grad in zip(ours, reference_grads, strict=True):
        torch.testing.assert_close(grad, reference_grad, rtol=1e-9, atol=1e-9)


def test_errors() -> None:
    attend, tensors = attention("library"), draw()
    q, k, v = (tensors[name_of_tensor][:, :, :1] for name_of_tensor in "qkv")
    more = inputs_of(tensors, 0, 1)
    state = attend.init_state(B, H, D, D, dtype=torch.float64)
    with pytest.raises(ArgumentTypeError, match=r"has branches with a state: pass `state`, at first attend.init_state"):
        attend.decode(q, k, v, kv_len=1, **more)
    with pytest.raises(ArgumentError, match=r"state has near: expected far\.S"):
        attend.decode(q, k, v, kv_len=1, state={**state, "near": state["far.S"]}, **more)
    with pytest.raises(ArgumentError, match=r"state\['S'\] is \(2, 4, 6, 5\)"):
        attend.prefill(q, k, v, kv_len=1, state={"far.S": state["far.S"][..., :5]}, **more)
    with pytest.raises(UnsupportedError, match="return_lse: the combined output of `hybrid_window_linear` is not a"):
        attend.decode(q, k, v, kv_len=1, state=state, return_lse=True, **more)
    with pytest.raises(UnsupportedError, match="`decode` and `prefill` pass them on, with `state`"):
        attend.step(q, k, v, state, **more)
    with pytest.raises(ArgumentTypeError, match="state: `causal` has no branch with a state"):
        compile_attention("causal").decode(q, k, v, kv_len=1, state=state)
    with pytest.raises(UnsupportedError, match=r"no cache: a recurrence passes its state on by `step`"):
        compile_attention("gla").decode(q, k, v, kv_len=1, g=tensors["g"])
