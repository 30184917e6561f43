"""Values that read the position of a key, in packed sequences and documents: positions count within each."""

from __future__ import annotations

import pytest
import torch

from attnc import compile_attention

TEXT = """\
pattern p
    {declared}
    learned w: real[head, 4, dv]
    align end
    {documents}
    visible k <= q
    value v[k] + w[k % 4]
"""


@pytest.mark.parametrize("packed", [True, False])
def test_values_by_position(packed: bool) -> None:
    """`make hunt`, part cpu, case 1047: these calls raised ValueError."""
    declared = ("", "") if packed else ("input doc: int[batch, token]", "documents doc")
    text = TEXT.format(declared=declared[0], documents=declared[1])
    attend = compile_attention("\n".join(line for line in text.splitlines() if line.strip()) + "\n")
    lengths = [5, 0, 9, 1]
    q, k, v = (torch.randn(2, h, sum(lengths), 8, requires_grad=True) for h in (4, 2, 2))
    w = torch.randn(4, 4, 8, requires_grad=True)
    if packed:
        out = attend(q, k, v, w=w, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))
    else:
        ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).expand(2, -1)
        out = attend(q, k, v, w=w, doc=ids)
    alone = compile_attention(
        "pattern p\n    learned w: real[head, 4, dv]\n    align end\n    visible k <= q\n    value v[k] + w[k % 4]\n"
    )
    parts = [alone(*of_one, w=w) for of_one in zip(*(torch.split(x, lengths, 2) for x in (q, k, v)), strict=True)]
    torch.testing.assert_close(out, torch.cat(parts, 2))
    weights = torch.randn_like(out)
    ours, wanted = (torch.autograd.grad((x * weights).sum(), (q, k, v, w)) for x in (out, torch.cat(parts, 2)))
    torch.testing.assert_close(ours, wanted)
