"""Regression tests: calls that kernels computed wrongly, as `make hunt` found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnc import compile_attention
from kernel_calls import check, operands

TEXT = """\
pattern p
    input x: int[batch, token]
    align end
    visible k <= q
    visible x[k] == x[q]
"""


@pytest.mark.parametrize("batch", [1, 3])
def test_runs_of_equal_ids_are_separate(batch: int) -> None:
    """`make hunt`, part triton, case 9: tile lists held every key up to the query."""
    attend: Any = compile_attention(TEXT, backend="triton")
    ids = torch.stack([(torch.arange(70) + 11 * b) // 13 for b in range(batch)])
    check(attend, operands(70, batch=batch), {"x": ids})


def test_rows_without_a_range_beside_rows_with_one() -> None:
    """`make hunt`, part triton, case 153: rows with `q != 3` saw other documents, or too few keys."""
    text = "pattern p\n    align end\n    visible q != 3 or k >= q and head % 2 == 1\n"
    check(compile_attention(text, backend="triton"), operands(9))
    text = text.replace("align end\n", "input doc: int[batch, token]\n    align end\n    documents doc\n")
    check(compile_attention(text, backend="triton"), operands(9), {"doc": (torch.arange(9) // 5)[None]})


def test_bricks_of_relations_that_read_sizes() -> None:
    """`make hunt`, part triton, case 333: the call failed with an AssertionError."""
    text = (
        "pattern p\n    align end\n    tokens y: 4, x: 5\n"
        "    visible abs(q.x - k.x) < 2 and q.y == k.y or keys // 6 % 4 == 2 or head == heads\n"
    )
    check(compile_attention(text, backend="triton"), operands(20))


def test_one_transposed_query_with_a_selection_per_head() -> None:
    """`make hunt`, part triton, case 107: rows of stacked heads were read with the stride of a dimension of size 1."""
    text = (
        "pattern p\n    align end\n    select chosen\n        over b = k // 3\n        score dot(q, max(b.k))\n"
        "        keep rank < 1\n        always q in b\n    visible k in chosen and k <= q\n"
    )
    tensors = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in operands(1, heads=(9, 3)).items()}
    tensors["q"] = torch.randn(1, 1, 9, 16).transpose(1, 2)
    assert tensors["q"].stride(2) != tensors["q"].shape[3]
    check(compile_attention(text, backend="triton"), tensors)


@pytest.mark.parametrize("visible", ["k % group == 0", "k % kv_heads == head % 2", "k % 3 != kv_head"])
@pytest.mark.parametrize("score", ["dot(q, sigmoid(k))", "dot(q, k * w)"])
def test_relations_that_read_groups_beside_computed_keys(visible: str, score: str) -> None:
    """`make hunt`, part triton, case 10081: keys were expanded to query heads, so `group` was 1 in the relation."""
    learned = "    learned w: real[head, dk]\n" if "w" in score else ""
    text = f"pattern p\n{learned}    align end\n    visible {visible}\n    score scale * {score}\n"
    inputs = {"w": torch.randn(4, 16)} if learned else {}
    check(compile_attention(text, backend="triton"), operands(24, heads=(4, 2)), inputs)


def test_values_by_query_head_beside_groups() -> None:
    """The value is multiplied by a learned vector per query head, and the relation reads the kv head."""
    text = "pattern p\n    learned w: real[head, dv]\n    align end\n    visible k % 2 == kv_head\n    value v * w\n"
    check(compile_attention(text, backend="triton"), operands(24, heads=(4, 2)), {"w": torch.randn(4, 16)})


@pytest.mark.parametrize("value", ["v[k] * t", "v[k] * t * u"])
def test_inputs_by_kv_head_with_vectors_by_query_head(value: str) -> None:
    """An input per kv head was required to have an entry for each query head: ArgumentError."""
    score = "dot(q, sigmoid(k) * u)" if value == "v[k] * t" else "scale * dot(q, k)"
    inputs = "    input t: real[kv_head]\n    input u: real[head]\n"
    text = f"pattern p\n{inputs}    align end\n    visible k <= q\n    score {score}\n    value {value}\n"
    tables = {"t": torch.rand(2), "u": torch.rand(6)}
    check(compile_attention(text, backend="triton"), operands(24, heads=(6, 2)), tables)


KV_HEADS = """\
pattern p
    align end
    visible 0 <= q - k < 3 and q != xor(kv_head, 2) and k % group != kv_heads
    score scale * dot(q, sigmoid(k))
"""


def test_computed_keys_keep_the_kv_heads_of_the_call() -> None:
    """`make hunt`, part triton, case 10122: `sigmoid(k)` was computed per query head, so `kv_head` was `head`."""
    check(compile_attention(KV_HEADS, backend="triton"), operands(17, heads=(6, 2)))
    by_head = KV_HEADS.replace("    align", "    learned w: real[head, dk]\n    align").replace("sigmoid(k)", "(w * k)")
    check(compile_attention(by_head, backend="triton"), operands(17, heads=(6, 2)), {"w": torch.randn(6, 16)})


MIXED = """\
pattern p
    input g: unit[batch, head, query]
    align end
    visible SEEN
    weights g[q] * softmax(score) + (1 - g[q]) / count(visible for k)
"""


@pytest.mark.parametrize("relation", ["0 < q - k < 3", "k <= q and keys % 2 == 0"])
def test_key_counts_of_rows_without_keys(relation: str) -> None:
    """`make hunt`, part triton, cases 60026 and 60766: the gradient of `g` was NaN, or no row saw a key: ValueError."""
    attend = compile_attention(MIXED.replace("SEEN", relation), backend="triton")
    check(attend, operands(9), {"g": torch.rand(1, 2, 9)}, with_lse=False)


def test_64_bit_range_ends_with_head_indices() -> None:
    """`make hunt`, part triton, case 60942: Triton refused `tl.where(…, 7 * group, 1 << 40)`, 32 bits beside 64."""
    text = "pattern p\n    align end\n    visible not min(0, q if 0 <= q - k < 8 else k) < 7 * max(group, kv_head)\n"
    check(compile_attention(text, backend="triton"), operands(5))


def test_bricks_of_rounded_numbers() -> None:
    """`make hunt`, part triton, case 61483: the call failed with an AssertionError."""
    text = (
        "pattern p\n    align end\n    tokens y: 4, x: 3\n"
        "    visible q - k == floor(log2(abs(q - k) + 1) * 3) % 3 and max(q.x, k) % 2 == 1\n"
    )
    check(compile_attention(text, backend="triton"), operands(12))


def test_keys_with_learned_vectors_by_query_head() -> None:
    """`make hunt`, part triton, case 61721: keys per kv head did not broadcast with vectors per query head."""
    text = (
        "pattern p\n    input x: int[head, 5]\n    learned w: real[6, dk]\n    align end\n    visible k <= q\n"
        "    score scale * dot(q, k) + scale * dot(q, w[x[k % 5] % 6])\n"
    )
    inputs = {"x": torch.arange(30).view(6, 5) % 7, "w": torch.randn(6, 16)}
    check(compile_attention(text, backend="triton"), operands(10, heads=(6, 2)), inputs)


def test_conditions_of_scores_that_need_64_bits() -> None:
    """Products beyond 2³¹ were computed in 32 bits."""
    text = (
        "pattern p\n    align end\n    visible k <= q\n"
        "    score scale * dot(q, k) + (tanh(dot(q, k)) if 2000000011 * q > 3000000019 * k else 0.25)\n"
    )
    check(compile_attention(text, backend="triton"), operands(9))


@pytest.mark.parametrize("ends", [[0, 1, 1, 2], [0, 13, 40, 70]])
def test_inputs_by_token_in_the_score_of_packed_sequences(ends: list[int]) -> None:
    """`make hunt`, part triton, case 80965: an offset per row was added to pairs, and Triton refused the shapes."""
    text = (
        "pattern p\n    input x: int[batch, token]\n    input doc: int[batch, token]\n    align end\n"
        "    documents doc\n    visible 0 <= q - k < 40\n"
        "    score scale * dot(q, k) + (0.5 if x[k] == x[q] else -0.25) + x[k] / 4\n"
    )
    tokens = ends[-1]
    x = torch.arange(tokens)[None] % 3
    doc = torch.repeat_interleave(torch.arange(len(ends) - 1), torch.tensor(ends).diff())[None]
    check(compile_attention(text, backend="triton"), operands(tokens), {"x": x, "doc": doc})


@pytest.mark.parametrize("tokens", [1, 40])
def test_ranges_whose_ends_kernels_cannot_compute_are_listed(tokens: int) -> None:
    """`make hunt`, part triton, case 91144: the call failed with the compiler's own NotInKernelsError."""
    text = "pattern p\n    align start\n    visible 0 <= q - k <= isqrt(keys) and q - k <= isqrt(q + 1)\n"
    attend: Any = compile_attention(text, backend="triton")
    check(attend, operands(tokens))
    assert attend.plan(tokens, heads=2, device="cuda").fallback is None


def test_decode_reads_the_inputs_that_index_a_table() -> None:
    """`make hunt`, part triton, case 91546: decode by kernels failed with a KeyError."""
    text = (
        "pattern p\n    input x: int[batch]\n    input table: real[head, 2]\n    align end\n"
        "    visible 0 <= q - k < 7\n    score scale * dot(q, k) + table[isqrt(abs(x)) % 2]\n"
    )
    q, k, v = operands(33, batch=2).values()
    inputs: dict[str, Any] = {"x": torch.tensor([5, -1]), "table": torch.randn(q.shape[1], 2)}
    attend: Any = compile_attention(text, backend="triton")
    with torch.no_grad():
        last = attend.decode(q[:, :, -1:], k, v, kv_len=33, **inputs)
    torch.testing.assert_close(last, attend.reference(q, k, v, **inputs)[:, :, -1:], rtol=0, atol=1e-5)
