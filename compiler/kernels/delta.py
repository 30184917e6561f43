"""The kernel that prepares the backward: `delta` of every row, and the row's LSE to base 2."""

from __future__ import annotations

from attnc.compiler.kernels.attention_problem import AttentionProblem
from attnc.compiler.kernels.depth import pieces
from attnc.compiler.kernels.kernel_source import (
    TYPES,
    KernelSource,
    TileShape,
    declaration,
    preface,
    stride_arguments,
    typed_arguments,
)
from attnc.compiler.kernels.text_lines import Lines
from attnc.compiler.kernels.value_text import LOG2_E

ROWS = 64
"""Number of rows of a program."""

_LSE_TEXTS = 'float("-inf")', f'tl.where(blind, float("inf"), own * {LOG2_E})'


def emit_delta(problem: AttentionProblem, lse_gradient: bool) -> KernelSource:
    """Emit the kernel of `delta` = rowsum(dO ∘ out), less dLSE if the LSE has a gradient, and of the LSE to base 2.

    Rows that see nothing get an LSE of inf, so that their weights and all of their gradients are 0. If weights are
    divided by their sum `total`, the kernel writes `share` = 1 / total instead of an LSE, or 0 where total is 0.
    """
    kind, unit = TYPES[problem.dtype], problem.vector
    names = ["out", "dout"]
    arguments = typed_arguments(f"*{kind}", *names)
    is_share = problem.kind == "share"
    source, result = ("total", "share") if is_share else ("lse", "lse2")
    arguments += typed_arguments("*fp32", source, *(["dlse"] if lse_gradient else []), result, "delta")
    arguments += [argument for name in names for argument in stride_arguments(name)]
    arguments += typed_arguments("i32", "lanes", "heads", "queries")
    function = f"{problem.name}_delta"
    lines = Lines()
    lines.add(*preface(*problem.header, f"Before the backward. Heads of {problem.dv} in {problem.dtype}."))
    lines.add(*declaration(function, arguments))
    lines.depth = 1
    lines.add(
        "lane = tl.program_id(0) % lanes",
        f"row = tl.program_id(0) // lanes * {ROWS} + tl.arange(0, {ROWS})",
        "there = row < queries",
        "batch = (lane // heads).to(tl.int64)",
        "head = lane % heads",
        "of_row = lane.to(tl.int64) * queries + row",
    )
    for name in names:
        base = f"(batch * {name}_batch + head * {name}_head) * {unit}"
        lines.add(f"{name}_rows = {name} + {base} + row[:, None] * ({name}_token.to(tl.int64) * {unit})")
    lines.add(f"found = tl.zeros(({ROWS},), tl.float32)")
    for piece in pieces(problem.dv):
        start = f"{piece.start} + " if piece.start else ""
        lines.add(f"entry = ({start}tl.arange(0, {piece.width}))[None, :]")
        lines.add(f"mask = there[:, None] & (entry < {problem.dv})")
        for name in names:
            lines.add(f"{name}_piece = tl.load({name}_rows + entry, mask=mask, other=0.0).to(tl.float32)")
        lines.add("found += tl.sum(out_piece * dout_piece, 1)")
    nothing, shown = ("0.0", "tl.where(blind, 0.0, 1.0 / tl.where(blind, 1.0, own))") if is_share else _LSE_TEXTS
    lines.add(f"own = tl.load({source} + of_row, mask=there, other=0.0)", f"blind = own == {nothing}")
    if lse_gradient:
        lines.add("found -= tl.load(dlse + of_row, mask=there, other=0.0)")
    lines.add("tl.store(delta + of_row, tl.where(blind, 0.0, found), mask=there)")
    lines.add(f"tl.store({result} + of_row, {shown}, mask=there)")
    return KernelSource(
        "delta", function, str(lines), tuple(arguments), TileShape(ROWS, ROWS, 4, 1), registers=problem.registers
    )
