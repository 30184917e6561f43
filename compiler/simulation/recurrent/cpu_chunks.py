"""The time of a pass's chunks on a CPU, and the executor's choice of chunk: the figures that the ladder shows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from attnc.compiler.planning.rates import AMX, Rates
from attnc.compiler.simulation.recurrent.chunk_work import Chunk, PassForm, backward, forward
from attnc.compiler.simulation.simulation import Pass

LENGTHS = (16, 32, 64)
"""Rows of the executor's chunks, more where a token has more steps. In longer ones weights of pairs that are far apart
are numbers below 1e-38, on which a CPU takes a hundred times as long: with gates around -1 chunks of 128 rows took 3 to
8 times as long as chunks of 64."""

STRETCH = 8192
"""Rows that the executor computes at once."""

CALLS = 30
"""Calls of torch for a stretch."""

CALL_SHARE = 1 / 7
"""The time of a small call of torch, as a share of a call of attention."""

EXP = 4.0
"""The time of an exponential, in units of a copied number."""

WIDTH = 64
"""The head dimension at which the rate of products is taken."""


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of a pass: to copy what it reads and gives, and the states besides; of products and exponentials at
    full rate; of calls one after another, chunk by chunk; of calls for stretches, and of chunks being small."""

    inputs: float
    states: float
    units: float
    chain: float
    rest: float

    @property
    def total(self) -> float:
        """The total time; nothing runs in parallel."""
        return self.inputs + self.states + self.units + self.chain + self.rest


@lru_cache(maxsize=256)
def chunk_on_cpu(form: PassForm, lanes: int, dtype: str) -> int:
    """Rows of a chunk, as a stretch of a forward pass is fastest by `chunk_times`; of equal ones the most.

    From rates that are the same on every machine, so that results are.
    """
    least = 1 << (form.micro - 1).bit_length()
    tokens = max(STRETCH // (max(lanes, 1) * form.micro), 1)

    def ms(chunk: int) -> float:
        return chunk_times(form, lanes, tokens, dtype, AMX, "forward", chunk).total

    return min((length for length in reversed(LENGTHS) if length >= least), key=ms, default=least)


def chunk_times(form: PassForm, lanes: int, tokens: int, dtype: str, rates: Rates, stage: Pass, chunk: int) -> Times:
    """A pass in chunks of so many rows, but for what it is given."""
    copy, one = rates.copy / 1e6, rates.call * CALL_SHARE / 1e6
    chunks = chunks_of(form, tokens, chunk)
    work = work_of(form, stage, chunk).total * (chunks * lanes)
    products = work.flop * flop_ns(dtype, rates) / 1e6
    states = (2 if stage == "backward" else 1) * 2 * lanes * chunks * form.entries
    serial = chunks * one * (4 if form.correction != "none" else 1)
    calls = CALLS * (3 if stage == "backward" else 1) * (2 if form.gate in ("rows", "columns") else 1)
    stretches = ceil(chunks * chunk * lanes / STRETCH)
    rest = stretches * calls * one + products * (_slower(chunk) - 1)
    return Times(0.0, states * copy, products + (EXP * work.exps + work.fma) * copy, serial, rest)


def _slower(chunk: int) -> float:
    """How much longer products take whose matrices are chunks: of 16 rows 2.6 times, of 64 1.2 (measured)."""
    return max(0.74 * (1 + 40 / chunk), 1.0)


def work_of(form: PassForm, stage: Pass, chunk: int) -> Chunk:
    """Return the work of a chunk."""
    return (backward if stage == "backward" else forward)(form, chunk, apart=False)


def chunks_of(form: PassForm, tokens: int, chunk: int) -> int:
    """Return the number of chunks of a sequence."""
    return ceil(tokens / max(chunk // form.micro, 1))


def flop_ns(dtype: str, rates: Rates) -> float:
    """Nanoseconds of an operation in products: a score element of attention has four a number of a head."""
    return rates.best("float64" if dtype == "float64" else "float32", WIDTH) / (4 * WIDTH)
