"""The problem that kernels of one attention are emitted for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from attnc.compiler.ir import Tensor
from attnc.compiler.kernels.brick_ranges import BrickGrid
from attnc.compiler.kernels.index_text import COLUMNS, ROWS
from attnc.compiler.kernels.kernel_source import VECTOR
from attnc.compiler.kernels.score_formula import Kind, ScoreFormula
from attnc.compiler.kernels.walks import Walk
from attnc.compiler.simulation.gpu_clocks import BYTES
from attnc.compiler.value_nodes import dot, vector

PAIRS = ROWS | COLUMNS
PRODUCT = dot(vector("q"), vector("k"))


@dataclass(frozen=True)
class AttentionProblem:
    """The problem of one attention: how tiles are found, by rows of queries and by rows of keys, and a head's shape.

    `told`: lines about the pattern for the head of the text. `tensors` and `sizes`: inputs and named sizes that the
    walks or scores read. `documents`: each row has a window. `grid`: tiles are bricks of it. `score`: None for the
    plain one; `widths`: dk and dv as it reads them. `tf32`: whether fp32 is multiplied as TF32. `delayed`: values are
    multiplied one tile late. `boxes`: tiles of q, k and v are copied by the hardware (TMA). `guarded`: see `Lines`.
    `grouped`: heads of queries may share a head of keys. `registers`, `specialised`: see `Target`. `careful`: see
    `visible_products`.
    """

    name: str
    told: tuple[str, ...]
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
        """The kind of weights that are computed from a score."""
        return "softmax" if self.score is None else self.score.kind

    @property
    def is_nested(self) -> bool:
        """Whether gradients of keys go through all tiles head by head, as what each head has of its own asks for."""
        of_keys = self.score is not None and self.score.has_terms_of_keys
        return self.grouped and (self.by_key.reads_head or of_keys)

    @property
    def vector(self) -> int:
        """Entries in a unit of strides."""
        return VECTOR // BYTES[self.dtype]

    @property
    def as_careful(self) -> AttentionProblem:
        """The problem of the careful kernels, which are seldom more than a look at one number: slow and simple."""
        return replace(self, careful=True, delayed=False, guarded=False, registers=None, specialised=False)

    @property
    def precision(self) -> str:
        """The precision of fp32 products, as arguments of tl.dot."""
        if self.dtype != "float32":
            return ""
        return f', input_precision="{"tf32" if self.tf32 else "ieee"}"'
