"""The order of a token's adjoints, and which matrices are on the chip where there is no room for all of them.

They are made where a line reads them, from states and leaves in memory, and made again in the next phase. A phase ends
where a line reads, beside a matrix, what was made in the phase and is not made again, such as a sum over a matrix; and
where it reads other matrices than those there are. Phases are parted by barriers: across one, no compiler takes what is
loaded for what it has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from attnc.compiler.recurrences.step_tape import StepTape


@dataclass
class Phases:
    """The phases of one token. `made`: computed or loaded by the phase; `new`: names that are not computed again.

    `behind`: the vectors and numbers in the adjoint of a matrix, by its name.
    """

    tape: StepTape
    made: set[int] = field(default_factory=set)
    new: set[str] = field(default_factory=set)
    behind: dict[str, frozenset[str]] = field(default_factory=dict)

    def note(self, name: str, reads: Iterable[str] = ()) -> None:
        """Record what a line computed and will not compute again: a vector, number or adjoint, and its reads."""
        if reads:
            self.behind[name] = self.behind.get(name, frozenset()).union(*map(self._sums, reads))
        else:
            self.new.add(name)

    def _sums(self, name: str) -> frozenset[str]:
        """The vectors and numbers that a name stands for."""
        return self.behind.get(name, frozenset((name,)))

    def asked(self, reads: Iterable[str]) -> tuple[bool, list[int]]:
        """Whether a phase begins with a line that reads these names (x3, d4), and the values to be made before it."""
        found = set(reads)
        wanted = self._behind(i for i in remade(self.tape) if f"x{i}" in found)
        missing = [i for i in wanted if i not in self.made]
        others = {f"x{j}" for i in missing for j in self.tape.ops[i].operands} | found
        matrices = self._matrices(wanted)
        sums = bool(matrices) and any(self._sums(name) & self.new for name in others)
        ends = sums or bool(self._matrices(missing) and self._matrices(self.made) - matrices)
        if ends:
            self.made, self.new, missing = set(), set(), wanted
        self.made.update(missing)
        return ends, missing

    def _matrices(self, values: Iterable[int]) -> set[int]:
        return {i for i in values if len(self.tape.ops[i].axes) == 2}

    def _behind(self, wanted: Iterable[int]) -> list[int]:
        """Matrices, those that they are made of, and leaves, in the order in which they are made."""
        found = set(wanted)
        for i in reversed(range(len(self.tape.ops))):
            if i in found:
                found.update(j for j in self.tape.ops[i].operands if j in remade(self.tape))
        return sorted(found)


@lru_cache(maxsize=64)
def remade(tape: StepTape) -> frozenset[int]:
    """The values that are made in each phase that reads them: matrices, and what is made without a sum.

    Products of two matrices cost too much, and are made once.
    """
    found: set[int] = set()
    for i, op in enumerate(tape.ops):
        matrix = len(op.axes) == 2 and op.kind != "product"
        entrywise = op.kind in ("apply", "diagonal") and all(
            j in found or tape.ops[j].kind == "number" for j in op.operands
        )
        if matrix or entrywise or op.kind in ("leaf", "test", "state"):
            found.add(i)
    return frozenset(found)


def backwards(tape: StepTape) -> tuple[int, ...]:
    """The operations as their adjoints are made: each behind all that read it, leaves and states as soon as can be."""
    readers = Counter(j for op in tape.ops for j in set(op.operands))
    ready = {i for i in range(len(tape.ops)) if not readers[i]}
    found = []
    while ready:
        i = max(ready, key=lambda j: (tape.ops[j].kind in ("leaf", "state"), j))
        ready.remove(i)
        found.append(i)
        for j in set(tape.ops[i].operands):
            readers[j] -= 1
            if not readers[j]:
                ready.add(j)
    return tuple(found)


def whole_behind(tape: StepTape, state: int) -> frozenset[int]:
    """The operations behind which the adjoint of a state is whole, and that after the token is no longer read.

    The one may then be written where the other lies.
    """
    users = {j for j, op in enumerate(tape.ops) if state in op.operands}
    return frozenset(users | {j for name, j in tape.after if name == tape.ops[state].of} | {state})


__all__ = ["Phases", "backwards", "remade", "whole_behind"]
