"""torch's exp, log, sin and their like, settled before threads call them.

Intel's vector functions, which torch calls for these, take their accuracy when one is first called. Where that first
call is made by several threads at once, some of its numbers are of a lower one: with torch 2.13 on a machine with
AVX-512 and 2 threads the first `torch.exp` of a process was off by 1.5e-4 in fp32, by 3e-9 in fp64, in one process of
ten. A call too small to be shared out decides it for good.
"""

from __future__ import annotations

import torch


def settle() -> None:
    """Make the first call."""
    for dtype in (torch.float32, torch.float64):
        torch.exp(torch.zeros(2, dtype=dtype))
