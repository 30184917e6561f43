"""Products of visible pairs only, so that no value of a hidden key or query reaches a result, not even as 0 · NaN.

Kernels multiply tiles that straddle a document's border as a whole. A hidden pair has the weight 0, and 0 times
NaN or an infinity is NaN. So where inputs decide which pairs are hidden, each kernel is followed by its careful
variant: the same text with `add_visible` in place of these products. The careful variant reads the sum of all that
the kernel before it wrote, and does nothing where that sum is finite. A hidden pair that spoils a result makes it NaN,
which no later operation of the kernel removes, so the sum of the results misses none.
"""

from __future__ import annotations

from attnc.compiler.ir import HeadIndex, Index, Lookup, Pattern, Position
from attnc.compiler.ir.rewrite import walk
from attnc.compiler.kernels.kernel_source import KernelArgument

RESULT_SUM = KernelArgument("result_sum", "*fp32")
"""The argument for the sum of all entries that the preceding kernel wrote."""

RETURN_WHERE_FINITE = (
    "# The kernel before has written results that are finite: hidden pairs had no part in them.",
    'if tl.abs(tl.load(result_sum)) < float("inf"):',
    "    return",
)


def helper(precision: str) -> str:
    """Return the text of the function `add_visible`; `precision`: the precision of products, as arguments of tl.dot."""
    return f'''\
@triton.jit
def add_visible(left, right, total, visible):
    """total + left · right over the visible pairs; rows of `right` that are not finite are added one by one."""
    own = tl.where(visible, left, 0.0).to(right.dtype)
    is_finite = tl.abs(right) < float("inf")
    total = tl.dot(own, tl.where(is_finite, right, 0.0).to(right.dtype), total{precision})
    count: tl.constexpr = right.shape[0]
    number = tl.arange(0, count)
    unusual = tl.max(tl.where(is_finite, 0, 1), 1) > 0
    at = tl.min(tl.where(unusual, number, count), 0)
    while at < count:
        here = number[None, :] == at
        seen = tl.max(tl.where(visible & here, 1, 0), 1) > 0
        weight = tl.sum(tl.where(here, own.to(tl.float32), 0.0), 1)
        value = tl.sum(tl.where(number[:, None] == at, right.to(tl.float32), 0.0), 0)
        counted = seen[:, None] & ((tl.abs(value) < float("inf")) == 0)[None, :]
        total += tl.where(counted, weight[:, None] * value[None, :], 0.0)
        at = tl.min(tl.where(unusual & (number > at), number, count), 0)
    return total
'''


def hides_by_inputs(pattern: Pattern) -> bool:
    """Whether documents, or a call's inputs about tokens, decide which pairs are hidden. Selections do not count."""
    if pattern.documents is not None:
        return True
    selected = {item.given for item in pattern.selections}
    lookups = (node for node in walk(pattern.attend.visible) if isinstance(node, Lookup))
    return any(node.tensor not in selected and any(map(_reads_token, node.indices)) for node in lookups)


def _reads_token(index: Index) -> bool:
    return any(isinstance(n, Position) or (isinstance(n, HeadIndex) and n.name == "batch") for n in index.below)
