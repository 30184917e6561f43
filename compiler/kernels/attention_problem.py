"""The description of one attention from which its kernels are emitted."""

from __future__ import annotations

from dataclasses import dataclass, replace

from attnc.compiler.ir import Tensor
from attnc.compiler.ir.value_nodes import dot, vector
from attnc.compiler.kernels.brick_ranges import BrickGrid
from attnc.compiler.kernels.index_text import COLUMNS, ROWS
from attnc.compiler.kernels.kernel_source import StrideUnits
from attnc.compiler.kernels.score_formula import Kind, ScoreFormula
from attnc.compiler.kernels.walks import Walk

PAIRS = ROWS | COLUMNS
PRODUCT = dot(vector("q"), vector("k"))


@dataclass(frozen=True)
class AttentionProblem(StrideUnits):
    """The description of one attention: its walks by rows of queries and by rows of keys, and the shape of its heads.

    `header`: header lines about the pattern. `tensors`, `sizes`: inputs and named sizes that the walks or scores read.
    `documents`: each row has a window. `grid`: the grid whose bricks are the tiles, if any. `score`: None for the plain
    score. `widths`: dk and dv as the score reads them. `tf32`: fp32 products may use TF32. `delayed`: values are
    multiplied one tile late. `boxes`: the hardware copies tiles of q, k and v (TMA). `guarded`: see `Lines`. `grouped`:
    query heads may share a kv head. `registers`, `specialised`: see `Target`. `careful`: see `visible_products`.
    """

    name: str
    header: tuple[str, ...]
    by_query: Walk
    by_key: Walk
    dk: int
    dv: int
    dtype: str
    tensors: tuple[Tensor, ...] = ()
    sizes: tuple[str, ...] = ()
    documents: bool = False
    grid: BrickGrid | None = None
    score: ScoreFormula | None = None
    widths: tuple[int, int] = (0, 0)
    tf32: bool = False
    delayed: bool = False
    boxes: bool = False
    guarded: bool = False
    grouped: bool = True
    registers: int | None = None
    specialised: bool = False
    careful: bool = False

    @property
    def kind(self) -> Kind:
        """The kind of weights that are computed from the score."""
        return "softmax" if self.score is None else self.score.kind

    @property
    def is_nested(self) -> bool:
        """Whether key gradients walk all tiles head by head, as heads of a group differ in pairs or key terms."""
        has_key_terms = self.score is not None and self.score.has_terms_of_keys
        return self.grouped and (self.by_key.reads_head or has_key_terms)

    @property
    def as_careful(self) -> AttentionProblem:
        """The problem of the careful kernels: slow and simple, as they seldom do more than look at one number."""
        return replace(self, careful=True, delayed=False, guarded=False, registers=None, specialised=False)
