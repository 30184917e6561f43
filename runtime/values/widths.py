"""Sizes of vectors and matrices of the IR, found without computing their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from attnc.compiler import ir
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.ir.value_nodes import rank
from attnc.compiler.lowering.specialise import Slices, Window, specialise
from attnc.compiler.planning.build_plan import Relations


@dataclass(frozen=True)
class Widths:
    """Sources of sizes: widths of q, k and v, shapes of real inputs, and integers that are equal for all pairs."""

    vectors: Mapping[str, int]
    inputs: Mapping[str, Sequence[int]]
    integer: Callable[[ir.Index], int]

    def of(self, node: ir.Value) -> tuple[int, ...]:
        """Return the sizes of a value: none for a number, one for a vector, two for a matrix."""
        if not rank(node):
            return ()
        match node:
            case ir.Vec():
                return (self.vectors[node.tensor],)
            case ir.Element():
                return tuple(self.inputs[node.tensor.name][len(node.indices) :])
            case ir.VectorPart():
                return (self.of(node.vector)[0] // node.of,)
            case ir.Outer():
                return (*self.of(node.left), *self.of(node.right))
            case ir.Eye():
                return (self.integer(node.size),) * 2
            case ir.Pick():
                return self.of(node.vector)[1:]
            case _:
                inner = [self.of(c) for c in node.children() if isinstance(c, ir.VALUES) and rank(c) >= rank(node)]
                return max(inner, key=len, default=())


def of_out(relations: Relations, inputs: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    """Return the width of an attention's output without a row to read it from; `inputs`: shapes of real inputs."""
    node, shape = relations.pattern.attend, relations.shape

    def integer(index: ir.Index) -> int:
        window = Window(0, 0, shape.n_q, shape.n_k, 0)
        size = specialise(index, relations.sizes, Slices({}), window, batch=0, head=0, group=1)
        if isinstance(size, ir.Const):
            return size.value
        return int(exact_evaluation.integers(size, (0, 1), (0, 1))[0, 0])

    if node.stack is not None:
        return (integer(node.stack[2]) - integer(node.stack[1]),)
    return Widths({"q": shape.dk, "k": shape.dk, "v": shape.dv}, inputs, integer).of(node.value)
