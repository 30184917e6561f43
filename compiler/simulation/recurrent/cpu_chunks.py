"""The time of a pass in chunks on a CPU, from which the executor chooses the length of chunks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from attnc.compiler.planning.rates import AMX, Rates
from attnc.compiler.simulation.recurrent.chunk_work import Chunk, PassForm, backward, forward
from attnc.compiler.simulation.simulation import Pass

LENGTHS = (16, 32, 64)
"""Rows of the executor's chunks, more where a token has more steps.

In longer chunks the weights of distant pairs are subnormal numbers (below 1e-38), on which a CPU takes a hundred times
as long: with gates around -1, chunks of 128 rows took 3 to 8 times as long as chunks of 64 rows.
"""

STRETCH = 8192
"""Number of rows, over all heads, that the executor computes at once."""

CALLS = 30
"""Number of calls of torch for a stretch of rows."""

CALL_SHARE = 1 / 7
"""The time of a small call of torch as a share of a call of attention."""

EXP = 4.0
"""The time of an exponential in units of the time of a copied element."""

WIDTH = 64
"""The head dimension for which the rate of products is taken."""


@dataclass(frozen=True, slots=True)
class Times:
    """The milliseconds of a pass by cause.

    `inputs`: copying inputs and outputs. `states`: copying states. `units`: products and exponentials at full rate.
    `chain`: calls one after another, chunk by chunk. `rest`: calls for stretches, and the slowdown by small chunks.
    """

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
    """Return the rows of a chunk for which `chunk_times` of a stretch of a forward pass is least; ties go to more rows.

    The rates are the same on every machine, so that results do not depend on the machine.
    """
    least = 1 << (form.micro - 1).bit_length()
    tokens = max(STRETCH // (max(lanes, 1) * form.micro), 1)

    def ms(chunk: int) -> float:
        return chunk_times(form, lanes, tokens, dtype, AMX, "forward", chunk).total

    return min((length for length in reversed(LENGTHS) if length >= least), key=ms, default=least)


def chunk_times(form: PassForm, lanes: int, tokens: int, dtype: str, rates: Rates, stage: Pass, chunk: int) -> Times:
    """Return the times of a pass in chunks of `chunk` rows, without the time of its inputs."""
    copy, small_call = rates.copy / 1e6, rates.call * CALL_SHARE / 1e6
    chunks = form.kind.chunks(tokens, chunk)
    work = work_per_chunk(form, stage, chunk).total * (chunks * lanes)
    products = work.flop * flop_ns(dtype, rates) / 1e6
    states = (2 if stage == "backward" else 1) * 2 * lanes * chunks * form.entries
    serial = chunks * small_call * (4 if form.kind.is_corrected else 1)
    by_level = form.kind.gate == "rows" or form.kind.columns
    calls = CALLS * (3 if stage == "backward" else 1) * (2 if by_level else 1)
    stretches = ceil(chunks * chunk * lanes / STRETCH)
    other_ms = stretches * calls * small_call + products * (_slower(chunk) - 1)
    return Times(0.0, states * copy, products + (EXP * work.exps + work.fma) * copy, serial, other_ms)


def _slower(chunk: int) -> float:
    """Return the factor by which products of small chunks are slower: 2.6 for 16 rows, 1.2 for 64 rows (measured)."""
    return max(0.74 * (1 + 40 / chunk), 1.0)


def work_per_chunk(form: PassForm, stage: Pass, chunk: int) -> Chunk:
    """Return the work of a chunk of `chunk` rows in a stage."""
    return (backward if stage == "backward" else forward)(form, chunk, apart=False)


def flop_ns(dtype: str, rates: Rates) -> float:
    """Return the nanoseconds of an operation in products; a score element has four per element of the head."""
    return rates.best("float64" if dtype == "float64" else "float32", WIDTH) / (4 * WIDTH)
