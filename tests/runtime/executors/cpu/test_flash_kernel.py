"""The claims of `runtime.executors.cpu.flash_kernel` about torch's kernel, and its guards against its faults.

A test that demonstrates a fault fails once torch repairs it; then the guard can be removed.
"""

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from attnc.runtime.executors.cpu import flash_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def cast(dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.to(dtype), k.to(dtype), v.to(dtype)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float = 0.3) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.double() for x in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
    scores = q @ k.transpose(-1, -2) * scale
    scores = scores if mask is None else scores + mask.double()
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def draw_qkv(n_q: int, n_k: int, d: int = 16, heads: tuple[int, int] = (4, 4)) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, heads[0], n_q, d), torch.randn(2, heads[1], n_k, d), torch.randn(2, heads[1], n_k, d)


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> None:
    """Compare the kernel's forward and backward with dense attention in fp64, in the dtype of q."""
    dtype = q.dtype
    shown = mask
    if causal:
        shown = torch.zeros(q.shape[2], k.shape[2], dtype=dtype).masked_fill(
            torch.arange(k.shape[2]) > torch.arange(q.shape[2])[:, None], -math.inf
        )
    out, lse = flash_kernel.attend(q, k, v, mask, causal, 0.3)
    assert out.dtype == dtype and lse.dtype == flash_kernel.lse_dtype(dtype)
    grad = torch.randn(out.shape).to(dtype)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want = dense(leaves[0], leaves[1], leaves[2], shown)
    wanted = torch.autograd.grad(want[0], leaves, grad.double())
    got = flash_kernel.attend_backward(grad, q, k, v, out, lse, mask, causal, 0.3)
    for a, b in zip((out, lse, *got), (*want, *wanted), strict=True):
        assert (a.double() - b).abs().max() <= TOLERANCE[dtype] * max(1, b.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 2, 7, 31, 64, 72, 192])
def test_any_width_and_dtype(d: int, dtype: torch.dtype) -> None:
    check(*cast(dtype, *draw_qkv(37, 41, d)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [5, 6, 7])
def test_grouped_heads(groups: int, dtype: torch.dtype) -> None:
    check(*cast(dtype, *draw_qkv(129, 137, 24, (2 * groups, 2))))


@pytest.mark.parametrize("lengths", [(40, 30), (30, 40), (33, 33), (1, 5), (5, 1)])
def test_causal_is_top_left(lengths: tuple[int, int]) -> None:
    check(*draw_qkv(*lengths), causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks(dtype: torch.dtype) -> None:
    """Masks of any pairs, including masks that hide the first blocks of keys entirely."""
    mask = torch.full((40, 1600), -math.inf, dtype=dtype)
    mask[:20, 1550:], mask[20:30, 10:20], mask[30:, 700:710] = 0, 0, 0
    check(*cast(dtype, *draw_qkv(40, 1600)), mask=mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(100, 100), (70, 300), (300, 70), (800, 1300)])
def test_a_causal_mask_may_set_the_causal_flag(lengths: tuple[int, int], dtype: torch.dtype) -> None:
    """A mask that hides every key above the diagonal gives the same bits when the kernel is told to skip that part."""
    rows, keys = lengths
    visible = (torch.rand(rows, keys) < 0.5) & torch.ones(rows, keys, dtype=torch.bool).tril()
    visible[:, 0] = True
    mask = torch.zeros(rows, keys, dtype=dtype).masked_fill_(~visible, -math.inf)
    q, k, v = cast(dtype, *draw_qkv(rows, keys))
    grad = torch.randn_like(q)
    results = []
    for causal in (False, True):
        out, lse = flash_kernel.attend(q, k, v, mask, causal, 0.3)
        results.append((out, lse, *flash_kernel.attend_backward(grad, q, k, v, out, lse, mask, causal, 0.3)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_mask_dtypes() -> None:
    q, k, v = draw_qkv(9, 9)
    hidden = torch.zeros(9, 9).masked_fill(torch.rand(9, 9) < 0.3, -math.inf)
    for wrong in (torch.bool, torch.bfloat16, torch.float64):
        with pytest.raises(RuntimeError, match="Attention mask"):
            flash_kernel.attend(q, k, v, hidden.to(wrong), False, 0.3)
    # fp64 with a mask of another dtype is accepted, and correct or not depending on the machine
    flash_kernel.attend(*cast(torch.float64, q, k, v), hidden, False, 0.3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_keys(dtype: torch.dtype) -> None:
    """LSE is 0 and not −inf; gradients are NaN with LSE −inf, and finite with the LSE of `without_blind_rows`."""
    q, k, v = cast(dtype, *draw_qkv(37, 37))
    mask = torch.zeros(37, 37, dtype=dtype)
    mask[5] = -math.inf
    out, lse = flash_kernel.attend(q, k, v, mask, False, 0.3)
    assert not out[:, :, 5].any() and not lse[:, :, 5].any()
    lse[:, :, 5] = -math.inf
    huge = torch.full_like(out, torch.finfo(dtype).max / 2).where(lse[..., None].isinf(), torch.ones_like(out))
    plain = flash_kernel.attend_backward(torch.ones_like(out), q, k, v, out, lse, mask, False, 0.3)
    assert all(g.isnan().any() for g in plain)
    safe_lse, safe_grad, _ = flash_kernel.without_blind_rows(lse, huge, None)
    got = flash_kernel.attend_backward(safe_grad, q, k, v, out, safe_lse, mask, False, 0.3)
    assert all(g.isfinite().all() for g in got) and not got[0][:, :, 5].any()
    visible = torch.arange(37) != 5
    grads_of_visible = flash_kernel.attend_backward(
        torch.ones_like(out)[:, :, visible],
        q[:, :, visible],
        k,
        v,
        out[:, :, visible],
        lse[:, :, visible],
        None,
        False,
        0.3,
    )
    for a, b in zip(got[1:], grads_of_visible[1:], strict=True):
        assert (a - b).abs().max() <= TOLERANCE[dtype] * 4 * b.abs().max()


def test_nonfinite_hidden_values_make_the_row_nan() -> None:
    q, k, v = draw_qkv(9, 9)
    v[:, :, 4] = math.nan
    mask = torch.zeros(9, 9)
    mask[:, 4] = -math.inf
    assert flash_kernel.attend(q, k, v, mask, False, 0.3)[0].isnan().any()


def test_strides() -> None:
    """The last dimension must be contiguous and tokens must not overlap; other strides are free, 0 included."""
    q, k, v = draw_qkv(8, 37)
    far = torch.randn(16, 2, 4, 8).permute(1, 2, 3, 0)
    over = torch.randn(512).as_strided((2, 4, 8, 16), (32, 8, 1, 1))
    for x in (far, over):
        # the kernel may read beyond the tensor: any numbers, NaN too
        wrong = flash_kernel.attend(x, k, v, None, False, 0.3)[0]
        assert not torch.allclose(wrong.double(), dense(x, k, v)[0], atol=0.1)
        check(flash_kernel.padded(x, 16), k, v)
    base = torch.randn(2, 4, 100, 16)
    windows = base.as_strided((2, 4, 37, 16), (1600, 0, 16, 1))
    spaced = base.as_strided((2, 4, 37, 16), (1600, 16, 32, 1))
    for x in (windows, spaced):
        assert flash_kernel.padded(x, 16) is x
        check(q, x, v)
        check(q, k, x)
    out, lse = flash_kernel.attend(q, k, v, None, False, 0.3)
    grad = torch.randn(1, 1, 1, 16).expand_as(out)
    got = flash_kernel.attend_backward(grad, q, k, v, out.contiguous(), lse.contiguous(), None, False, 0.3)
    want = flash_kernel.attend_backward(grad.contiguous(), q, k, v, out, lse, None, False, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 2, 0, 3), (2, 1, 0, 3)])
@pytest.mark.parametrize("masked", [True, False])
def test_the_layout_of_the_output(order: tuple[int, ...], masked: bool) -> None:
    back = [order.index(i) for i in range(4)]
    for heads, spare in ((4, 0), (4, 3), (1, 0), (1, 2)):
        shape = [(2, heads + spare, 9, 16)[i] for i in order]
        q, k, v = (torch.randn(shape).permute(back)[:, :heads] for _ in range(3))
        out, _ = flash_kernel.attend(q, k, v, torch.zeros(9, 9) if masked else None, False, 0.3)
        assert out.stride() == flash_kernel.strides_of_out(q)


def test_unequal_widths_are_refused_and_padding_is_the_remedy() -> None:
    q, k, v = draw_qkv(9, 9)
    with pytest.raises(RuntimeError, match="same head size"):
        flash_kernel.attend(q, k, v[..., :8], None, False, 0.3)
    out, _ = flash_kernel.attend(q, k, flash_kernel.padded(v[..., :8], 16), None, False, 0.3)
    assert (out[..., :8] - dense(q, k, v[..., :8])[0]).abs().max() < 2e-6 and not out[..., 8:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(16, 16), (16, 9), (9, 16), (1, 1)])
def test_lse_gradient(widths: tuple[int, int], dtype: torch.dtype) -> None:
    """The LSE's gradient is exact in fp64, and in half precision as accurate as the gradient through the output."""
    dk, dv = widths
    q, k, v = (x.to(dtype) for x in (torch.randn(2, 4, 9, dk), torch.randn(2, 2, 13, dk), torch.randn(2, 2, 13, dv)))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = dense(leaves[0], leaves[1], leaves[2])
    grad_out = torch.randn(out.shape).to(dtype)
    grad_lse = 100 * torch.randn(lse.shape, dtype=flash_kernel.lse_dtype(dtype))
    wanted = torch.autograd.grad((out, lse), leaves, (grad_out.double(), grad_lse.double()))
    args = flash_kernel.with_lse_gradient(grad_lse, grad_out, q, k, v, out.detach().to(dtype))
    got = flash_kernel.attend_backward(*args, lse.detach().to(grad_lse.dtype), None, False, 0.3)
    for a, b, width in zip(got, wanted, (dk, dk, dv), strict=True):
        assert (a[..., :width].double() - b).abs().max() <= TOLERANCE[dtype] * b.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("shapes", ["(1,1,2,4),(1,1,0,4)", "(1,1,0,4),(1,1,2,4)", "(1,0,2,4),(1,0,2,4)"])
def test_empty_operands_crash_the_process(shapes: str) -> None:
    code = (
        f"import torch; q, k = map(torch.zeros, [{shapes}]);"
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, k)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode < 0


def grads_in_fp64(out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, causal: bool) -> tuple[Tensor, ...]:
    """Return the gradients computed in fp64."""
    out, q, k, v, lse = (x.double() for x in (out, q, k, v, lse))
    return flash_kernel.attend_backward(out, q, k, v, out, lse, None, causal, 0.3)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_in_parts(parts: int, dtype: torch.dtype) -> None:
    """Parts of a multiple of 32 rows give the same bits in the forward; the gradients of keys are added up."""
    q, k, v = (x[:1].to(dtype) for x in draw_qkv(parts * 288, 80, 64, (3, 1)))
    out, lse = flash_kernel.attend(q, k, v, None, False, 0.3)
    for order in (q, q.transpose(1, 2).contiguous().transpose(1, 2)):
        parted = flash_kernel.attend_in_parts(order, k, v, None, False, 0.3, parts)
        assert torch.equal(parted[0], out) and torch.equal(parted[1], lse)
    expected_grads = grads_in_fp64(out, q, k, v, lse, causal=False)
    grads = flash_kernel.backward_in_parts(out, q, k, v, out, lse, None, False, 0.3, parts)
    for expected, actual in zip(expected_grads, grads, strict=True):
        assert float((actual - expected).abs().max()) <= TOLERANCE[dtype] * float(expected.abs().max())


@pytest.mark.parametrize("threads", [1, 2])
def test_few_key_heads_on_many_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients agree to rounding whether or not every thread has a kv head."""
    q, k, v = draw_qkv(96, 80, 64, (4, 1))
    q, k, v = q[:1], k[:1], v[:1]
    out, lse = flash_kernel.attend(q, k, v, None, True, 0.3)
    expected_grads = grads_in_fp64(out, q, k, v, lse, causal=True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for expected, actual in zip(
        expected_grads, flash_kernel.attend_backward(out, q, k, v, out, lse, None, True, 0.3), strict=True
    ):
        assert float((actual - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
