"""Plausibility of rates for a processor: rates that were measured under load are several times too slow."""

from __future__ import annotations

import os

import torch

from attnc.compiler.planning.rates import WIDTHS, Rates

LEAST = {"AVX512": 8.0, "AVX2": 8.0, "DEFAULT": 0.5}
"""Minimum plausible GFLOP/s of a thread in fp32 for a long dense call, by torch's CPU capability.

Two threads with AVX2 do 61 each (`PLAIN`), and a tenth of that on a busy machine, which is below.
"""

MOST = 500.0
"""GFLOP/s of a thread in fp32 that no processor reaches: two multiply-adds of 16 numbers a cycle at 5 GHz are 320."""


def implausible(rates: Rates, threads: int) -> str | None:
    """Return why rates cannot come from this processor with `threads` threads, as a clause; None if they can."""
    if "float32" not in rates.peak:
        return None
    speed = 4 * WIDTHS[0] / rates.peak["float32"][0] / min(threads, os.cpu_count() or threads)
    capability = torch.backends.cpu.get_cpu_capability()
    least = LEAST.get(capability, LEAST["DEFAULT"])
    if least <= speed <= MOST:
        return None
    verdict, bound = ("slow", f"at least {least:g}") if speed < least else ("fast", f"at most {MOST:g}")
    return (
        f"{speed:.2g} GFLOP/s of a thread in fp32 is too {verdict} for a processor with {capability}, "
        f"which does {bound}"
    )
