"""The cost of a tile on an SM, in clocks of each unit, and the tile shapes that fit a kernel.

Registers, shared memory and instructions of the kernels that plans use come from their machine code
(`compiled_figures`). For other tiles, the instructions of a score element were counted in the code that Triton
compiles for sm_90 (d 64 and 128, tiles of 64 to 256 rows); products and shared memory follow from the sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal

from attnc.compiler.kernels.kernel_source import BYTES, TileShape
from attnc.compiler.simulation.compiled_figures import CompiledFigures, find_figures
from attnc.compiler.simulation.machine import Machine, MachineError

Kernel = Literal["forward", "dq", "dkdv"]

ALU_PER_SCORE = 1.8
"""Compares, maxima and conversions of a score element without a mask."""
FMA_PER_SCORE, FMA_PER_SUM = 2.25, 1.5
"""FMA operations of a score element, and of an element of the accumulators that the forward rescales every tile."""
ISSUED_PER_SCORE, ISSUED_PER_SUM = 6.5, 1.75
"""Instructions of a score element, and of an element of the accumulators."""

PRODUCTS: Mapping[Kernel, tuple[int, int]] = {"forward": (1, 1), "dq": (2, 1), "dkdv": (2, 2)}
"""The number of products of a tile with an inner or outer side of dk, and of dv.

forward: scores and values. dq: scores, dp and dq. dkdv: scores, dp, dv and dk.
"""

BITMASK = 5.0
"""Operations of an element of a mask that is computed with the plan; no relation costs more than this."""

Q_TILES, K_TILES = (64, 128, 256), (32, 64, 128)
"""Sides of tiles that are tried, in queries and in keys."""
WARPS, STAGES = (4, 8), (2, 3)
"""Numbers of warps of a program, and of stages (buffers of keys and values), that are tried."""
MOST_REGISTERS = 255
"""Maximum number of registers of a thread."""


@dataclass(frozen=True, slots=True)
class HeadSizes:
    """The dimensions of a head and its dtype."""

    dk: int
    dv: int
    dtype: str

    @property
    def bytes(self) -> int:
        """The bytes of an element."""
        return BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Extra:
    """Operations of a pattern on a score element besides softmax.

    `mask`: operations of its mask, on partial tiles. `score`, `exps`: fused multiply-adds and exponentials of its
    score, on all tiles.
    """

    mask: float = 0.0
    score: float = 0.0
    exps: float = 0.0


@dataclass(frozen=True, slots=True)
class Clocks:
    """The clocks of a tile, by unit of an SM that runs nothing else."""

    products: float
    exps: float
    alu: float
    fma: float
    issue: float
    shared: float
    l2: float

    @property
    def bound(self) -> float:
        """The clocks of the tile if all units run in parallel."""
        return max(self.products, self.exps, self.alu, self.fma, self.issue, self.shared, self.l2)

    @property
    def serial(self) -> float:
        """The clocks of the tile if products and softmax wait for each other, as in Triton's kernels."""
        return max(self.products + max(self.exps, self.alu, self.fma, self.issue), self.shared, self.l2)

    @property
    def limit(self) -> str:
        """The name of the busiest unit."""
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
    """The clocks of the tiles of a kernel on a machine."""

    machine: Machine
    kernel: Kernel
    shape: TileShape
    heads: HeadSizes
    extra: Extra

    @cached_property
    def full(self) -> Clocks:
        """The clocks of a tile without a mask."""
        return self._clocks(0.0)

    @cached_property
    def partial(self) -> Clocks:
        """The clocks of a tile with a mask."""
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
        accumulators = shape.k_tile * (heads.dk + heads.dv) if self.kernel == "dkdv" else shape.q_tile * heads.dv
        rescaled = accumulators if self.kernel == "forward" else 0
        read = (shape.q_tile * heads.dk + shape.k_tile * (heads.dk + heads.dv)) * heads.bytes
        loaded = shape.q_tile if self.kernel == "dkdv" else shape.k_tile
        compiled, threads = machine_code_figures(m, self.kernel, shape, heads), 32 * shape.warps
        if compiled is None:
            exps, alu = scores + shape.q_tile, scores * ALU_PER_SCORE
            fma = scores * FMA_PER_SCORE + FMA_PER_SUM * rescaled
            issued = scores * ISSUED_PER_SCORE + ISSUED_PER_SUM * rescaled
        else:
            exps, alu, fma, issued = (n * threads for n in (compiled.exps, compiled.alu, compiled.fma, compiled.issued))
        return Clocks(
            products=2 * scores * depth / m.tensor_flop(heads.dtype),
            exps=(exps + scores * self.extra.exps) / m["exp_per_clock"],
            alu=(alu + scores * mask) / m["alu_per_clock"],
            fma=(fma + scores * self.extra.score) / m["fma_per_clock"],
            issue=(issued + scores * (mask + self.extra.score)) / m["issue_per_clock"],
            shared=read * (depth / (heads.dk + heads.dv)) / m["shared_bytes_per_clock"],
            l2=loaded * (heads.dk + heads.dv) * heads.bytes * m.sms / m["l2_bytes_per_clock"],
        )


# --- tile shapes that fit ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resources:
    """The resources of a program; `programs`: the number of programs that fit on an SM at once, possibly 0."""

    shared_kib: float
    registers: int
    programs: int

    @property
    def reason(self) -> str | None:
        """Why no program fits on an SM, None if one does."""
        if self.programs:
            return None
        return f"needs {self.shared_kib:.0f} KiB of shared memory and {self.registers} registers a thread"


def machine_code_figures(
    machine: Machine, kernel: Kernel, shape: TileShape, heads: HeadSizes
) -> CompiledFigures | None:
    """Return the figures of a kernel's machine code, None where they are not recorded."""
    if heads.dk != heads.dv:
        return None
    tiles = shape.q_tile, shape.k_tile, shape.warps, shape.stages
    return find_figures(machine.architecture, kernel, heads.dk, heads.dtype, tiles)


def resources(machine: Machine, kernel: Kernel, shape: TileShape, heads: HeadSizes) -> Resources:
    """Return the resources of a program: by its machine code, else by formulas fitted to other kernels."""
    threads = 32 * shape.warps
    compiled = machine_code_figures(machine, kernel, shape, heads)
    if compiled is not None:
        by_registers = int(machine["registers"] // (-(-compiled.registers // 8) * 8 * threads))
        programs = min(int(machine["shared_kib"] // compiled.shared_kib), by_registers, 2048 // threads)
        return Resources(compiled.shared_kib, compiled.registers, programs)
    head_dims = heads.dk + heads.dv
    resident = {"forward": shape.q_tile * heads.dk, "dq": shape.q_tile * head_dims, "dkdv": shape.k_tile * head_dims}[
        kernel
    ]
    staged = (shape.q_tile if kernel == "dkdv" else shape.k_tile) * head_dims
    shared = (resident + shape.stages * staged) * heads.bytes / 1024 + 1
    accumulators = {
        "forward": shape.q_tile * heads.dv,
        "dq": shape.q_tile * heads.dk,
        "dkdv": shape.k_tile * head_dims,
    }[kernel]
    scores = shape.q_tile * shape.k_tile
    per_score, fixed = {"forward": (1.5, 30), "dq": (2.0, 36), "dkdv": (2.5, 40)}[kernel]
    if machine["tensor_memory_kib"]:
        tensor_memory = (accumulators + scores) * 4 / 1024
        registers = int(per_score * scores / threads) + 60
        fits = tensor_memory <= machine["tensor_memory_kib"]
    else:
        extra_registers = 12 if machine.architecture < "sm_90" else 0
        registers = int((accumulators + per_score * scores) / threads) + fixed + extra_registers
        fits = True
    rows = shape.k_tile if kernel == "dkdv" else shape.q_tile
    fits = fits and registers <= MOST_REGISTERS and rows >= 16 * shape.warps / 2
    by_registers = int(machine["registers"] // (-(-registers // 8) * 8 * threads))
    programs = min(int(machine["shared_kib"] // shared), by_registers, 2048 // threads) if fits else 0
    return Resources(shared, registers, programs)


def tile_shapes(machine: Machine, kernel: Kernel, heads: HeadSizes) -> list[TileShape]:
    """Return the tile shapes that fit: for each pair of sides, the warps and stages with most programs on an SM."""
    best: dict[tuple[int, int], tuple[tuple[int, int], TileShape]] = {}
    for q_tile, k_tile, warps, stages in product(Q_TILES, K_TILES, WARPS, STAGES):
        shape = TileShape(q_tile, k_tile, warps, stages)
        program = resources(machine, kernel, shape, heads)
        if not program.programs or (machine.architecture >= "sm_90" and q_tile < 16 * warps):
            continue
        rank = (min(program.programs, 2), stages)
        if (q_tile, k_tile) not in best or rank > best[q_tile, k_tile][0]:
            best[q_tile, k_tile] = rank, shape
    if not best:
        raise MachineError(
            f"no tile with head dimensions {heads.dk} and {heads.dv} in {heads.dtype} fits the shared memory and "
            f"registers of {machine.name}"
        )
    wide = {key: value for key, value in best.items() if key[1] > K_TILES[0]} or best
    return [shape for _, shape in wide.values()]


def given_shape(machine: Machine, kernel: Kernel, heads: HeadSizes, q_tile: int, k_tile: int) -> TileShape:
    """Return the shape with these sides and most programs on an SM. Raises MachineError if none fits, saying why."""
    for name, side in (("q", q_tile), ("k", k_tile)):
        if side < 16 or side > 1024 or side & (side - 1):
            raise MachineError(f"a {name} tile of {side} is not supported: use a power of two from 16 to 1024")
    candidates = []
    reason: str | None = None
    for warps, stages in product(WARPS, STAGES):
        shape = TileShape(q_tile, k_tile, warps, stages)
        program = resources(machine, kernel, shape, heads)
        if program.programs:
            candidates.append(((min(program.programs, 2), stages), shape))
        reason = program.reason if not program.programs else reason
    if not candidates:
        raise MachineError(
            f"tiles of {q_tile}×{k_tile} with head dimensions {heads.dk} and {heads.dv} in {heads.dtype} do not fit "
            f"{machine.name}: a program {reason}; the limits are {machine['shared_kib']:g} KiB and {MOST_REGISTERS}"
        )
    return max(candidates, key=lambda pair: pair[0])[1]
