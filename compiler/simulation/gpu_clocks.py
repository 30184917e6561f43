"""The cost of one tile on an SM, in clocks of each of its units, and the tile shapes that a kernel can have.

Registers, shared memory and instructions of the kernels that plans use are those of their machine code
(`compiled_figures`). For other tiles, instructions for a score element were counted in what Triton makes of
such kernels for sm_90 (d 64 and 128, tiles of 64 to 256 rows); products and shared memory follow from the sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal

from attnc.compiler.simulation.compiled_figures import CompiledFigures, find_figures
from attnc.compiler.simulation.machine import Machine, MachineError

Kernel = Literal["forward", "dq", "dkdv"]

ALU_PER_SCORE = 1.8
"""Compares, maxima and conversions of an element of the scores, without a mask."""
FMA_PER_SCORE, FMA_PER_SUM = 2.25, 1.5
"""FMA operations of a score element, and of an element of the sums that the forward rescales with every tile."""
ISSUED_PER_SCORE, ISSUED_PER_SUM = 6.5, 1.75
"""Instructions of each."""

PRODUCTS: Mapping[Kernel, tuple[int, int]] = {"forward": (1, 1), "dq": (2, 1), "dkdv": (2, 2)}
"""Products of a tile whose inner or outer side is dk, and dv: scores and values; scores, dp and dq; scores, dp, dv and
dk."""

BITMASK = 5.0
"""Operations of an element of a mask that was made when the kernel was planned: no relation need cost more."""

Q_TILES, K_TILES = (64, 128, 256), (32, 64, 128)
WARPS, STAGES = (4, 8), (2, 3)
MOST_REGISTERS = 255
BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class TileShape:
    """The tiles of a kernel and how it runs: warps of a program, buffers of keys and values."""

    q_tile: int
    k_tile: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.q_tile}×{self.k_tile}, {self.warps} warps, {self.stages} stages"


@dataclass(frozen=True, slots=True)
class HeadSizes:
    """Sizes of a head, and its dtype."""

    dk: int
    dv: int
    dtype: str

    @property
    def bytes(self) -> int:
        """The bytes of one number."""
        return BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Extra:
    """Operations of a pattern on an element of the scores beside softmax: of its mask on partial tiles, fused
    multiply-adds and exponentials of its score on all."""

    mask: float = 0.0
    score: float = 0.0
    exps: float = 0.0


@dataclass(frozen=True, slots=True)
class Clocks:
    """The clocks of one tile, by unit of an SM that has it alone."""

    products: float
    exps: float
    alu: float
    fma: float
    issue: float
    shared: float
    l2: float

    @property
    def bound(self) -> float:
        """Where all of them run beside each other."""
        return max(self.products, self.exps, self.alu, self.fma, self.issue, self.shared, self.l2)

    @property
    def serial(self) -> float:
        """Where the products wait for the softmax and the softmax for the products, as in Triton's kernels."""
        return max(self.products + max(self.exps, self.alu, self.fma, self.issue), self.shared, self.l2)

    @property
    def limit(self) -> str:
        """The unit that is busiest."""
        named = {
            "tensor cores": self.products,
            "exponentials": self.exps,
            "integer and compare units": self.alu,
            "fp32 units": self.fma,
            "instruction issue": self.issue,
            "shared memory": self.shared,
            "L2": self.l2,
        }
        return max(named, key=lambda name: named[name])


@dataclass(frozen=True)
class TileModel:
    """The clocks of the tiles of one kernel on one machine."""

    machine: Machine
    kernel: Kernel
    shape: TileShape
    heads: HeadSizes
    extra: Extra

    @cached_property
    def full(self) -> Clocks:
        """A tile without a mask."""
        return self._clocks(0.0)

    @cached_property
    def partial(self) -> Clocks:
        """A tile with one."""
        return self._clocks(min(self.extra.mask, BITMASK))

    def predicted(self, clocks: Clocks) -> float:
        """Return the expected clocks of a tile: the serial clocks over the share that kernels reach."""
        share = self.machine.kernel_share(max(self.heads.dk, self.heads.dv))
        return clocks.serial / share

    def _clocks(self, mask: float) -> Clocks:
        m, heads, shape = self.machine, self.heads, self.shape
        scores = shape.q_tile * shape.k_tile
        by_dk, by_dv = PRODUCTS[self.kernel]
        depth = by_dk * heads.dk + by_dv * heads.dv
        own = shape.k_tile * (heads.dk + heads.dv) if self.kernel == "dkdv" else shape.q_tile * heads.dv
        rescaled = own if self.kernel == "forward" else 0
        read = (shape.q_tile * heads.dk + shape.k_tile * (heads.dk + heads.dv)) * heads.bytes
        loaded = shape.q_tile if self.kernel == "dkdv" else shape.k_tile
        seen, threads = seen_of(m, self.kernel, shape, heads), 32 * shape.warps
        if seen is None:
            exps, alu = scores + shape.q_tile, scores * ALU_PER_SCORE
            fma = scores * FMA_PER_SCORE + FMA_PER_SUM * rescaled
            issued = scores * ISSUED_PER_SCORE + ISSUED_PER_SUM * rescaled
        else:
            exps, alu, fma, issued = (n * threads for n in (seen.exps, seen.alu, seen.fma, seen.issued))
        return Clocks(
            products=2 * scores * depth / m.tensor_flop(heads.dtype),
            exps=(exps + scores * self.extra.exps) / m["exp_per_clock"],
            alu=(alu + scores * mask) / m["alu_per_clock"],
            fma=(fma + scores * self.extra.score) / m["fma_per_clock"],
            issue=(issued + scores * (mask + self.extra.score)) / m["issue_per_clock"],
            shared=read * (depth / (heads.dk + heads.dv)) / m["shared_bytes_per_clock"],
            l2=loaded * (heads.dk + heads.dv) * heads.bytes * m.sms / m["l2_bytes_per_clock"],
        )


# --- what a kernel can have ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resources:
    """The resources of an SM that a program takes. `programs`: how many fit beside each other, 0 for none."""

    shared_kib: float
    registers: int
    programs: int

    @property
    def reason(self) -> str | None:
        """Why none fits."""
        if self.programs:
            return None
        return f"needs {self.shared_kib:.0f} KiB of shared memory and {self.registers} registers a thread"


def seen_of(machine: Machine, kernel: Kernel, shape: TileShape, heads: HeadSizes) -> CompiledFigures | None:
    """Return the figures of a kernel's machine code, None where it was not read."""
    if heads.dk != heads.dv:
        return None
    tiles = shape.q_tile, shape.k_tile, shape.warps, shape.stages
    return find_figures(machine.architecture, kernel, heads.dk, heads.dtype, tiles)


def resources(machine: Machine, kernel: Kernel, shape: TileShape, heads: HeadSizes) -> Resources:
    """Return the resources of a program: by its machine code, else by formulas fitted to other kernels."""
    threads = 32 * shape.warps
    seen = seen_of(machine, kernel, shape, heads)
    if seen is not None:
        by_registers = int(machine["registers"] // (-(-seen.registers // 8) * 8 * threads))
        programs = min(int(machine["shared_kib"] // seen.shared_kib), by_registers, 2048 // threads)
        return Resources(seen.shared_kib, seen.registers, programs)
    both = heads.dk + heads.dv
    kept = {"forward": shape.q_tile * heads.dk, "dq": shape.q_tile * both, "dkdv": shape.k_tile * both}[kernel]
    moving = (shape.q_tile if kernel == "dkdv" else shape.k_tile) * both
    shared = (kept + shape.stages * moving) * heads.bytes / 1024 + 1
    sums = {"forward": shape.q_tile * heads.dv, "dq": shape.q_tile * heads.dk, "dkdv": shape.k_tile * both}[kernel]
    scores = shape.q_tile * shape.k_tile
    per_score, fixed = {"forward": (1.5, 30), "dq": (2.0, 36), "dkdv": (2.5, 40)}[kernel]
    if machine["tensor_memory_kib"]:
        tensor_memory = (sums + scores) * 4 / 1024
        registers = int(per_score * scores / threads) + 60
        fits = tensor_memory <= machine["tensor_memory_kib"]
    else:
        older = 12 if machine.architecture < "sm_90" else 0
        registers = int((sums + per_score * scores) / threads) + fixed + older
        fits = True
    rows = shape.k_tile if kernel == "dkdv" else shape.q_tile
    fits = fits and registers <= MOST_REGISTERS and rows >= 16 * shape.warps / 2
    by_registers = int(machine["registers"] // (-(-registers // 8) * 8 * threads))
    programs = min(int(machine["shared_kib"] // shared), by_registers, 2048 // threads) if fits else 0
    return Resources(shared, registers, programs)


def tile_shapes(machine: Machine, kernel: Kernel, heads: HeadSizes) -> list[TileShape]:
    """The shapes that fit, the one that keeps most programs on an SM for each pair of tiles."""
    best: dict[tuple[int, int], tuple[tuple[int, int], TileShape]] = {}
    for q_tile, k_tile, warps, stages in product(Q_TILES, K_TILES, WARPS, STAGES):
        shape = TileShape(q_tile, k_tile, warps, stages)
        found = resources(machine, kernel, shape, heads)
        if not found.programs or (machine.architecture >= "sm_90" and q_tile < 16 * warps):
            continue
        rank = (min(found.programs, 2), stages)
        if (q_tile, k_tile) not in best or rank > best[q_tile, k_tile][0]:
            best[q_tile, k_tile] = rank, shape
    if not best:
        raise MachineError(
            f"no tile of a head of {heads.dk} and {heads.dv} in {heads.dtype} fits {machine.name}'s shared memory and "
            f"registers"
        )
    wide = {key: value for key, value in best.items() if key[1] > K_TILES[0]} or best
    return [shape for _, shape in wide.values()]


def given_shape(machine: Machine, kernel: Kernel, heads: HeadSizes, q_tile: int, k_tile: int) -> TileShape:
    """The shape with these tiles that fits best. Raises MachineError where none does, saying why."""
    for name, side in (("q", q_tile), ("k", k_tile)):
        if side < 16 or side > 1024 or side & (side - 1):
            raise MachineError(f"a {name} tile of {side}: sides of tiles are powers of two from 16 to 1024")
    found = []
    reason: str | None = None
    for warps, stages in product(WARPS, STAGES):
        shape = TileShape(q_tile, k_tile, warps, stages)
        own = resources(machine, kernel, shape, heads)
        if own.programs:
            found.append(((min(own.programs, 2), stages), shape))
        reason = own.reason if not own.programs else reason
    if not found:
        raise MachineError(
            f"tiles of {q_tile}×{k_tile} do not fit {machine.name} with a head of {heads.dk} and {heads.dv} in "
            f"{heads.dtype}: a program {reason}, of {machine['shared_kib']:g} KiB and {MOST_REGISTERS}"
        )
    return max(found, key=lambda pair: pair[0])[1]
