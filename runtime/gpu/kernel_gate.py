"""Which kernels may go out: what their machine code must be like."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attnc.compiler.kernels.kernel_source import KernelSource
from attnc.compiler.kernels.targets import TARGETS
from attnc.compiler.simulation.gpu_clocks import BYTES
from attnc.runtime.gpu.compiling import CompiledBinary, Failure, Outcome
from attnc.runtime.gpu.machine_code import Loop

PRODUCTS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC", "gfx942": "MFMA"}
"""How the names of a target's tensor-core instructions begin."""
MOST_BARRIERS = 8
MOST_TENSOR_MEMORY = 512
"""Columns of an SM's."""
OF_PRODUCTS = ("forward", "dq", "dkdv")
"""Kernels whose loops multiply tiles. Of others, `delta` and gradients pair by pair, only memory is judged."""
CLIFF = 32
"""Registers where ptxas has given up keeping anything in them."""


@dataclass(frozen=True, slots=True)
class GateCase:
    """A kernel, what it was made for, and the width of its heads. `grouped`: heads of queries share those of keys."""

    pattern: str
    source: KernelSource
    target: str
    head_dim: int
    dtype: str
    grouped: bool = False

    @property
    def stage(self) -> str:
        """What it makes."""
        return self.source.stage

    @property
    def title(self) -> str:
        """What it makes, and of which heads where that matters."""
        return f"{self.stage} of groups" if self.grouped else self.stage


def judge(case: GateCase, outcome: Outcome) -> list[str]:
    """The reasons why a kernel may not go out; none: it may."""
    if isinstance(outcome, Failure):
        return [outcome.reason]
    reasons = [*_memory(case, outcome)]
    if case.stage in OF_PRODUCTS and case.dtype != "float32":
        reasons += _products(case, outcome)
    if case.stage == "decode" and case.dtype != "float32":
        reasons += _of_few_rows(case, outcome)
    return reasons


def _of_few_rows(case: GateCase, found: CompiledBinary) -> Iterator[str]:
    """Few rows are multiplied by whatever tensor-core instruction takes them; what counts is how keys come in."""
    if not found.code.products:
        yield "no tensor-core instruction"
    elif TARGETS[case.target].maker == "nvidia":
        if not found.code.loops:
            yield "no loop with tensor-core instructions"
        for loop in found.code.loops:
            yield from _copies(case, loop)


def _memory(case: GateCase, found: CompiledBinary) -> Iterator[str]:
    code, most = found.code, TARGETS[case.target].shared_kib
    if code.stack:
        cliff = " and only 32 registers" if code.registers == CLIFF else ""
        yield f"stack of {code.stack} bytes{cliff}"
    if code.spilled:
        yield f"{code.spilled} registers spilled"
    if found.shared > most * 1024:
        yield f"{found.shared / 1024:.1f} KiB of shared memory, there are {most}"
    if found.tensor_memory > MOST_TENSOR_MEMORY:
        yield f"{found.tensor_memory} columns of tensor memory, there are {MOST_TENSOR_MEMORY}"


def _products(case: GateCase, found: CompiledBinary) -> Iterator[str]:
    wanted = PRODUCTS[case.target]
    if not any(name.startswith(wanted) for name in found.code.products):
        yield f"no {wanted} instruction"
    elif TARGETS[case.target].maker == "nvidia":
        if not found.code.loops:
            yield f"no loop with {wanted} instructions"
        for loop in found.code.loops:
            yield from _loop(case, found, loop)


def _loop(case: GateCase, found: CompiledBinary, loop: Loop) -> Iterator[str]:
    where = f"in the loop of {loop.instructions} instructions"
    wanted = PRODUCTS[case.target]
    others = sorted(name for name in loop.products if not name.startswith(wanted))
    if others:
        yield f"{', '.join(others)} in place of {wanted} {where}"
    yield from _copies(case, loop)
    if loop.waits > found.products:
        yield f"{loop.waits} waits for {found.products} products {where}"
    if loop.barriers > MOST_BARRIERS:
        yield f"{loop.barriers} barriers {where}"


def _copies(case: GateCase, loop: Loop) -> Iterator[str]:
    where = f"in the loop of {loop.instructions} instructions"
    if loop.local_loads:
        yield f"{loop.local_loads} local loads {where}"
    if not loop.copies:
        yield f"no asynchronous copy {where}"
    copied, tile = loop.copied * 32 * case.source.tiles.warps, _tile_bytes(case)
    if 2 * copied >= tile:
        yield f"{copied} bytes copied through registers {where}, a tile is {tile}"


def _tile_bytes(case: GateCase) -> int:
    """Of what a loop takes in: keys, or queries for the gradients of keys."""
    tiles = case.source.tiles
    return (tiles.q_tile if case.stage == "dkdv" else tiles.k_tile) * case.head_dim * BYTES[case.dtype]
