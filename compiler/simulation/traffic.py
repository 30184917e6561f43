"""The bytes that a kernel moves between memory and chip, and the time of moving them."""

from __future__ import annotations

from math import ceil

from attnc.compiler.kernels.kernel_source import BYTES, TileShape
from attnc.compiler.planning.tile_work import Strips
from attnc.compiler.simulation.gpu_clocks import (
    Kernel,
)
from attnc.compiler.simulation.machine import Machine
from attnc.compiler.simulation.simulation import Shape


def memory_ms(machine: Machine, bytes_: float) -> float:
    """Return the milliseconds of moving bytes at the rate of long copies."""
    return bytes_ / (machine["hbm_tb_per_s"] * machine["hbm_share"] * 1e9)


def tensor_bytes(shape: Shape) -> int:
    """Return the bytes of q, k, v, the output and its log-sum-exp."""
    queries = shape.lanes * shape.n_q * (shape.dk + shape.dv) * BYTES[shape.dtype]
    return queries + key_bytes(shape) + 4 * shape.lanes * shape.n_q


def key_bytes(shape: Shape) -> int:
    """Return the bytes of k and v."""
    return shape.batch * shape.kv_heads * shape.n_k * (shape.dk + shape.dv) * BYTES[shape.dtype]


def least_bytes(shape: Shape, kernel: Kernel) -> int:
    """Return the bytes that a kernel reads and writes once; a gradient also reads the forward's results."""
    result = tensor_bytes(shape)
    if kernel == "forward":
        return result
    if kernel == "dq":
        return result + shape.lanes * shape.n_q * shape.dk * BYTES[shape.dtype]
    return result + key_bytes(shape)


def moved_bytes(machine: Machine, shape: Shape, kernel: Kernel, tiles: TileShape, walked: Strips, programs: int) -> int:
    """Return the bytes that a kernel moves: all once, or a head's keys once per wave if they do not fit in the cache.

    Programs of one wave are neighbours and share the keys that they read.
    """
    size = (shape.dk + shape.dv) * BYTES[shape.dtype]
    tokens, side = (shape.n_q, tiles.q_tile) if kernel == "dkdv" else (shape.n_k, tiles.k_tile)
    least = least_bytes(shape, kernel)
    if tokens * size <= machine["l2_mib"] * 2**20 / 2:
        return least
    waves = ceil(walked.count / (machine.sms * programs))
    return max(least, min(walked.live * side * size, least + waves * tokens * size))
