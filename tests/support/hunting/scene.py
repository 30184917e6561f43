"""The operands of a closure in one call: positions, heads, vectors and inputs, in int64 and fp64."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scene:
    """One call, or one sequence of a packed call.

    `q_at` (1 or B, 1, Nq, 1) and `k_at` (1 or B, 1, 1, Nk): positions. `head` (1, H, 1, 1). `q` (B, H, Nq, dk), `k`
    (B, H, Nk, dk) and `v` (B, H, Nk, dv), where every query head has its kv head.
    """

    q_at: Tensor
    k_at: Tensor
    head: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    inputs: Mapping[str, Tensor]
    kv_heads: int
    together: Tensor | None = None
    """Pairs within one document, bool (B, 1, Nq, Nk); None for all pairs."""
    scale: float | None = None
    """The scale of the call; None for dk^-1/2."""

    @property
    def factor(self) -> float:
        """The value of `scale`."""
        return float(self.q.shape[-1] ** -0.5) if self.scale is None else self.scale

    @property
    def heads(self) -> int:
        """The number of query heads."""
        return self.q.shape[1]

    @property
    def keys(self) -> int:
        """The number of keys."""
        return self.k.shape[2]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the scores, (B, H, Nq, Nk)."""
        return (*self.q.shape[:3], self.keys)

    @property
    def pairs(self) -> Tensor:
        """Return all pairs that documents allow, bool (B, H, Nq, Nk)."""
        every = torch.ones(self.shape, dtype=torch.bool)
        return every if self.together is None else every & self.together

    def real(self, x: Tensor | float) -> Tensor:
        """Convert a number to the precision of the vectors."""
        return torch.as_tensor(x).to(self.q.dtype)


Value = Callable[[Scene], Tensor]


@dataclass(frozen=True)
class Term:
    """An expression as text and as a closure."""

    text: str
    value: Value


@dataclass(frozen=True)
class Input:
    """A declared tensor: `dims` are names or numbers; `kind` says how its entries are drawn."""

    name: str
    type: str
    dims: tuple[str | int, ...]
    kind: str
    learned: bool = False

    @property
    def declaration(self) -> str:
        """Return the line that declares the input."""
        dims = f"[{', '.join(map(str, self.dims))}]" if self.dims else ""
        return f"{'learned' if self.learned else 'input  '} {self.name}: {self.type}{dims}"

    def drawn(self, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
        """Draw the tensor for a call; floating-point tensors are fp64."""
        shape = [dim if isinstance(dim, int) else sizes[dim] for dim in self.dims]
        if self.kind == "flag":
            return torch.rand(shape, generator=generator) < 0.6
        if self.kind.startswith("below "):
            return torch.randint(0, int(self.kind[6:]), shape, generator=generator)
        if self.kind == "place":
            return torch.randint(-2, max(sizes["key"], 1) + 2, shape, generator=generator)
        if self.kind == "runs":
            return (torch.rand(shape, generator=generator) < 0.25).long().cumsum(-1)
        normal = torch.randn(shape, generator=generator, dtype=torch.float64)
        if self.kind == "gate":
            return -normal.abs()
        if self.kind == "strong gate":
            strong = torch.rand(shape, generator=generator)
            drawn = torch.where(strong < 0.1, -1e4 * normal.abs(), -normal.abs())
            return torch.where(strong > 0.95, -torch.inf, drawn)
        if self.kind == "unit":
            return torch.sigmoid(normal)
        assert self.kind == "normal", self.kind
        return normal


@dataclass
class Draft:
    """A text that is being written."""

    rng: random.Random
    align: str | None = None
    grid: tuple[int, ...] | None = None
    inputs: list[Input] = field(default_factory=list)
    variables: int = 0
    indexed: bool = True
    """Whether inputs over queries, keys and tokens may be read; documents, which make positions local, forbid it."""

    def pick(self, *choices: str) -> str:
        """Return one of the choices."""
        return self.rng.choice(choices)

    def chance(self, share: float) -> bool:
        """Return True with this probability."""
        return self.rng.random() < share

    def number(self, low: int, high: int) -> int:
        """Draw an integer from `low` to `high`, both included."""
        return self.rng.randint(low, high)

    def variable(self) -> str:
        """Return a new name for the variable of an aggregate."""
        self.variables += 1
        return f"j{self.variables}"

    def input(self, type: str, dims: tuple[str | int, ...], kind: str, learned: bool = False) -> str:
        """Declare an input and return its name."""
        name = f"{'w' if learned else 'x'}{len(self.inputs)}"
        self.inputs.append(Input(name, type, dims, kind, learned))
        return name


def by_head(x: Tensor) -> Tensor:
    """Spread (H,) over (1, H, 1, 1)."""
    return x.view(1, -1, 1, 1)
