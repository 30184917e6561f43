"""Recurrence kernels in Triton's interpreter beyond `test_every_file.py`: states, documents, unsupported patterns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import UnsupportedError, compile_attention
from recurrence_draws import example

pytest.importorskip("triton")


def compiled(name: str, **options: Any) -> Any:
    return compile_attention(name, **options)


def draw_example(name: str, tokens: int) -> tuple[list[Tensor], dict[str, Any]]:
    """Draw q, k and v, and the inputs."""
    q, k, v, all_inputs = example(name, B=2, H=2, T=tokens, dk=10, dv=6, dtype=torch.float32)
    inputs = {
        key: x.clone().requires_grad_(x.is_floating_point()) for key, x in all_inputs.items() if isinstance(x, Tensor)
    }
    return [x.clone().requires_grad_() for x in (q, k, v)], inputs


def run(attend: Any, rows: list[Tensor], inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the results, and the gradients of their sum with fixed weights."""
    out, state = attend(*rows, return_state=True, **inputs)
    results = {"out": out, **state}
    leaves = {**dict(zip("qkv", rows, strict=True)), **{name: x for name, x in inputs.items() if x.requires_grad}}
    draw = torch.Generator().manual_seed(3)
    total = sum((x * torch.randn(x.shape, generator=draw)).sum() for x in results.values() if x.is_floating_point())
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return results, dict(zip(leaves, grads, strict=True))


def errors_above(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 3e-6) -> dict[str, float]:
    """Return the tensors whose error exceeds `tolerance` times their largest entry."""
    assert ours.keys() == expected.keys()
    sizes = {name: float(x.detach().abs().max().clamp(min=1e-3)) for name, x in expected.items()}
    errors = {name: float((ours[name] - expected[name]).detach().abs().max()) / sizes[name] for name in ours}
    return {name: size for name, size in errors.items() if not size <= tolerance}


def test_a_state_passes_between_calls() -> None:
    rows, inputs = draw_example("gated_delta_net", tokens=23)
    attend = compiled("gated_delta_net", backend="triton")
    expected = attend(*rows, return_state=True, **inputs)
    first = attend(*(x[:, :, :9] for x in rows), return_state=True, **{key: x[:, :9] for key, x in inputs.items()})
    rest = attend.step(*(x[:, :, 9:] for x in rows), first[1], **{key: x[:, 9:] for key, x in inputs.items()})
    torch.testing.assert_close(torch.cat([first[0], rest[0]], 2), expected[0], atol=2e-6, rtol=0)
    torch.testing.assert_close(rest[1]["S"], expected[1]["S"], atol=2e-6, rtol=0)


def test_documents_and_half_precision() -> None:
    rows, inputs = draw_example("gla", tokens=24)
    attend = compiled("gla", backend="triton")
    cuts = torch.tensor([0, 5, 5, 24])
    packed = attend(*(x[:1] for x in rows), cu_seqlens=cuts, **{key: x[:1] for key, x in inputs.items()})
    alone = attend(*(x[:1, :, 5:] for x in rows), **{key: x[:1, 5:] for key, x in inputs.items()})
    torch.testing.assert_close(packed[:, :, 5:], alone, atol=2e-6, rtol=0)
    half = [x.detach().half() for x in rows]
    exact = attend(*rows, **inputs).detach()
    result = attend(*half, **inputs).detach()
    assert result.dtype == torch.float16
    torch.testing.assert_close(result.float(), exact, atol=4e-3 * float(exact.abs().max()), rtol=0)


def test_a_branch_with_a_state() -> None:
    rows, _ = draw_example("gla", tokens=21)
    inputs: dict[str, Any] = {}
    attend = compiled("hybrid_window_linear", backend="triton", window=4)
    for tensor in attend.pattern.tensors:
        drawn_one = torch.rand(*(2 if dim in ("batch", "head") else 21 for dim in tensor.dims))
        inputs[tensor.name] = -drawn_one if tensor.refinement == "log_decay" else drawn_one
    result = attend(*rows, **inputs)
    torch.testing.assert_close(result, attend.reference(*rows, **inputs), atol=3e-6, rtol=0)
    assert any("chunk by chunk, by kernels" in reason for reason in attend.plan(21, heads=2).reasons)
    wide = attend.plan(21, heads=2, dtype=torch.float64).reasons
    assert any("as operations of torch: float64 has no kernels" in reason for reason in wide)


def test_decode_of_a_branch_with_a_state() -> None:
    rows, _ = draw_example("gla", tokens=21)
    q, k, v = (x.detach() for x in rows)
    attend = compiled("hybrid_window_linear", backend="triton", window=4)
    g, gate = -torch.rand(2, 21, 2), torch.rand(2, 21, 2)
    state, parts = attend.init_state(2, 2, q.shape[3], v.shape[3]), []
    for start, stop in ((0, 18), (18, 21)):
        more = {"g": g[:, start:stop], "gate": gate[:, start:stop]}
        out, state = attend.prefill(q[:, :, start:stop], k, v, kv_len=stop, state=state, **more)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), attend.reference(q, k, v, g=g, gate=gate), atol=3e-6, rtol=0)
    with torch.no_grad(), pytest.raises(UnsupportedError, match="not supported for several branches; call `prefill`"):
        attend.decode(q[:, :, -1:], k, v, kv_len=21, state=state, g=g[:, -1:], gate=gate[:, -1:])


def test_unsupported_recurrences_run_in_torch_or_are_refused() -> None:
    rows, inputs = draw_example("retention", tokens=19)
    wide = [x.detach().double() for x in rows]
    attend = compiled("retention", backend="triton")
    assert torch.equal(attend(*wide, **inputs), compiled("retention")(*wide, **inputs))
    with pytest.raises(UnsupportedError, match=r"strict: `retention` would run as operations of torch.*float64"):
        compiled("retention", backend="triton", strict=True)(*wide, **inputs)
    with pytest.raises(UnsupportedError, match="strict: `yaad_linear` would run token by token: "):
        compiled("yaad_linear", backend="triton", strict=True)


TWO_WIDTHS = """recurrence two
    state S: [dk, dv]
    state Z: [dk]
    step  S = S + outer(k, v)
    step  Z = Z + q
    read  dot(k, Z) * q @ S
"""


def test_kernel_texts() -> None:
    result = compiled("kimi_delta").source("sm_90", head_dim=64)
    assert {f"rows_comba_{stage}" for stage in ("prepare", "solve", "states", "outputs", "keys")} <= result.keys()
    assert "Heads of 64 and 64 in bfloat16, chunks of 64 rows" in result["rows_comba_keys"]
    two = compiled(TWO_WIDTHS).source("sm_80")
    widths = [two[name].partition("Heads of 64 and ")[2].split()[0] for name in ("plain_states", "plain_states.2")]
    assert sorted(widths) == ["1", "64"]
    beside = compiled("hybrid_window_linear").source("sm_90")
    assert {"scalar_states", "hybrid_window_linear_forward"} <= beside.keys()
    alone = compiled("yaad_linear").source("sm_90", head_dim=64)
    assert set(alone) == {
        f"yaad_linear_token_by_token_{kernel_text}" for kernel_text in ("forward", "forward_kept", "backward")
    }
    with pytest.raises(UnsupportedError, match="float64 has no kernels; on a GPU it runs as operations of torch"):
        compiled("yaad_linear").source(dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="float64 has no kernels; on a GPU it runs as operations of torch"):
        compiled("gla").source(dtype=torch.float64)
