"""The gate of attention kernels: requirements on their machine code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attnc.compiler.kernels.kernel_source import BYTES, KernelSource
from attnc.compiler.kernels.targets import TARGETS
from attnc.runtime.toolchain.compiling import CompiledBinary, Failure, Outcome
from attnc.runtime.toolchain.machine_code import Loop

PRODUCTS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC", "gfx942": "MFMA"}
"""Prefix of the names of a target's tensor-core instructions."""
MOST_BARRIERS = 8
MOST_TENSOR_MEMORY = 512
"""Number of tensor-memory columns of an SM."""
OF_PRODUCTS = ("forward", "dq", "dkdv")
"""Kernels whose loops multiply tiles. For the others, `delta` and gradients pair by pair, only memory is judged."""
CLIFF = 32
"""Register count at which ptxas has given up keeping values in registers."""


@dataclass(frozen=True, slots=True)
class GateCase:
    """A kernel, its target and its head dimension. `grouped`: several query heads share a kv head."""

    pattern: str
    source: KernelSource
    target: str
    head_dim: int
    dtype: str
    grouped: bool = False

    @property
    def stage(self) -> str:
        """The stage that the kernel computes."""
        return self.source.stage

    @property
    def title(self) -> str:
        """The stage, marked if the kernel is for head groups."""
        return f"{self.stage} of groups" if self.grouped else self.stage


def judge(case: GateCase, outcome: Outcome) -> list[str]:
    """Return the reasons to reject a kernel; empty if it is accepted."""
    if isinstance(outcome, Failure):
        return [outcome.reason]
    reasons = [*_memory(case, outcome)]
    if case.stage in OF_PRODUCTS and case.dtype != "float32":
        reasons += _products(case, outcome)
    if case.stage == "decode" and case.dtype != "float32":
        reasons += _few_row_reasons(case, outcome)
    return reasons


def _few_row_reasons(case: GateCase, binary: CompiledBinary) -> Iterator[str]:
    """Yield the reasons against a kernel of few rows, which may use any tensor-core instruction."""
    if not binary.code.products:
        yield "no tensor-core instruction"
    elif TARGETS[case.target].maker == "nvidia":
        if not binary.code.loops:
            yield "no loop with tensor-core instructions"
        for loop in binary.code.loops:
            yield from _copies(case, loop)


def _memory(case: GateCase, binary: CompiledBinary) -> Iterator[str]:
    code, max_kib = binary.code, TARGETS[case.target].shared_kib
    if code.stack:
        cliff = " and only 32 registers" if code.registers == CLIFF else ""
        yield f"stack of {code.stack} bytes{cliff}"
    if code.spilled:
        yield f"{code.spilled} registers spilled"
    if binary.shared > max_kib * 1024:
        yield f"{binary.shared / 1024:.1f} KiB of shared memory, the limit is {max_kib}"
    if binary.tensor_memory > MOST_TENSOR_MEMORY:
        yield f"{binary.tensor_memory} columns of tensor memory, the limit is {MOST_TENSOR_MEMORY}"


def _products(case: GateCase, binary: CompiledBinary) -> Iterator[str]:
    wanted = PRODUCTS[case.target]
    if not any(name.startswith(wanted) for name in binary.code.products):
        yield f"no {wanted} instruction"
    elif TARGETS[case.target].maker == "nvidia":
        if not binary.code.loops:
            yield f"no loop with {wanted} instructions"
        for loop in binary.code.loops:
            yield from _loop(case, binary, loop)


def _loop(case: GateCase, binary: CompiledBinary, loop: Loop) -> Iterator[str]:
    where = f"in the loop of {loop.instructions} instructions"
    wanted = PRODUCTS[case.target]
    others = sorted(name for name in loop.products if not name.startswith(wanted))
    if others:
        yield f"{', '.join(others)} in place of {wanted} {where}"
    yield from _copies(case, loop)
    if loop.waits > binary.products:
        yield f"{loop.waits} waits for {binary.products} products {where}"
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
    """Return the bytes of the tile that a loop loads: keys, or queries for the gradients of keys."""
    tiles = case.source.tiles
    return (tiles.q_tile if case.stage == "dkdv" else tiles.k_tile) * case.head_dim * BYTES[case.dtype]
