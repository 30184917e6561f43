"""Scans of complete tensors: `scan_stretches` with the decays and writes as given tensors."""

from __future__ import annotations

from torch import Tensor

from attnc.runtime.executors.recurrent.stretch_scan import scan_stretches


def linear_scan(decay: Tensor, write: Tensor, *, state: Tensor, resets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return x_t = decay_t · x_{t-1} + write_t: (states after each token (B, H, T, …), the final state).

    Args:
        decay: (B, H, T, …), with size 1 along axes on which it is constant, the token axis included.
        write: likewise; T is the larger of both.
        state: the state before the first token (B, H, …).
        resets: bool (B, T) or (B, H, T), as for `scan_stretches`.
    """
    tokens = write.shape[2] if decay.shape[2] == 1 else decay.shape[2]
    (out,), final = scan_stretches(
        lambda decay, write: (decay, write), None, (decay, write), tokens=tokens, state=state, resets=resets
    )
    return out, final
