"""The memory of calls of the triton executor: what `executor` allocates.

With e bytes an element and R rows of queries over batch and heads:

- saved: e · (q + k + v + out) + 4 · lse, in elements;
- forward: nothing, plus copies of q, k, v and out if their rows do not begin at multiples of 16 bytes;
- backward: 8 · R for the LSE and delta that kernels read, plus copies of q, k, v, out, its gradient and the gradients
  of q, k and v if they do not fit.

The tables that kernels read are cached (`SETTINGS.table_bytes`).
"""

from __future__ import annotations

from attnc.compiler.kernels.kernel_source import VECTOR
from attnc.compiler.planning.cpu_plan import Memory
from attnc.runtime.call.tensor_checks import TensorSizes


def memory_on_gpu(sizes: TensorSizes) -> Memory:
    """Return the memory of a call of one softmax over plain scores, with contiguous tensors and a positive scale."""
    element = 4 if sizes.dtype == "float32" else 2
    rows, keys = sizes.batch * sizes.heads * sizes.n_q, sizes.batch * sizes.kv_heads * sizes.n_k
    of_dk, of_dv = (_copied(width * element) for width in (sizes.dk, sizes.dv))
    saved = element * (rows + keys) * (sizes.dk + sizes.dv) + 4 * rows
    forward = (rows + keys) * (of_dk + of_dv)
    backward = 8 * rows + 2 * (rows + keys) * of_dk + (2 * rows + 2 * keys) * of_dv
    return Memory(saved, forward, backward)


def _copied(row: int) -> int:
    """Return the bytes of a row that must be copied; 0 if rows fit."""
    return -(-row // VECTOR) * VECTOR if row % VECTOR else 0
