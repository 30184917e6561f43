"""The order of a token's adjoints, and the phases in which matrices are on the chip if not all of them fit.

A matrix is computed where a line reads it, from states and leaves in memory, and computed again in the next phase. A
phase ends before a line that reads, beside a matrix, a value of this phase that is not recomputed, such as a sum over a
matrix; and before a line that reads matrices other than the current ones. Barriers separate phases: across a barrier,
the compiler does not reuse loaded values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from attnc.compiler.recurrences.step_tape import StepTape


@dataclass
class Phases:
    """The phases of one token. `made`: the values that the current phase has computed or loaded.

    `new`: names that the phase computed and that are not computed again. `behind`: the vectors and numbers that the
    adjoint of a matrix was computed from, by its name.
    """

    tape: StepTape
    made: set[int] = field(default_factory=set)
    new: set[str] = field(default_factory=set)
    behind: dict[str, frozenset[str]] = field(default_factory=dict)

    def note(self, name: str, reads: Iterable[str] = ()) -> None:
        """Record a result that is not computed again: a vector, number or adjoint, and the names that it reads."""
        if reads:
            self.behind[name] = self.behind.get(name, frozenset()).union(*map(self._sums, reads))
        else:
            self.new.add(name)

    def _sums(self, name: str) -> frozenset[str]:
        """Return the vectors and numbers that a name was computed from, or the name itself."""
        return self.behind.get(name, frozenset((name,)))

    def request(self, reads: Iterable[str]) -> tuple[bool, list[int]]:
        """Return whether a line that reads these names (x3, d4) starts a phase, and the values to compute before it."""
        names = set(reads)
        required = self._with_operands(i for i in remade(self.tape) if f"x{i}" in names)
        missing = [i for i in required if i not in self.made]
        others = {f"x{j}" for i in missing for j in self.tape.ops[i].operands} | names
        matrices = self._matrices(required)
        reads_new = bool(matrices) and any(self._sums(name) & self.new for name in others)
        starts_phase = reads_new or bool(self._matrices(missing) and self._matrices(self.made) - matrices)
        if starts_phase:
            self.made, self.new, missing = set(), set(), required
        self.made.update(missing)
        return starts_phase, missing

    def _matrices(self, values: Iterable[int]) -> set[int]:
        return {i for i in values if len(self.tape.ops[i].axes) == 2}

    def _with_operands(self, wanted: Iterable[int]) -> list[int]:
        """Return values and the recomputed values that they depend on, in the order of computation."""
        required = set(wanted)
        for i in reversed(range(len(self.tape.ops))):
            if i in required:
                required.update(j for j in self.tape.ops[i].operands if j in remade(self.tape))
        return sorted(required)


@lru_cache(maxsize=64)
def remade(tape: StepTape) -> frozenset[int]:
    """Return the values that are recomputed in each phase that reads them: matrices, and values without sums.

    Products of two matrices are too expensive to repeat, and are computed once.
    """
    values: set[int] = set()
    for i, op in enumerate(tape.ops):
        matrix = len(op.axes) == 2 and op.kind != "product"
        entrywise = op.kind in ("apply", "diagonal") and all(
            j in values or tape.ops[j].kind == "number" for j in op.operands
        )
        if matrix or entrywise or op.kind in ("leaf", "test", "state"):
            values.add(i)
    return frozenset(values)


def backwards(tape: StepTape) -> tuple[int, ...]:
    """Return the operations in the order of their adjoints: after all readers, leaves and states at once."""
    readers = Counter(j for op in tape.ops for j in set(op.operands))
    ready = {i for i in range(len(tape.ops)) if not readers[i]}
    order = []
    while ready:
        i = max(ready, key=lambda j: (tape.ops[j].kind in ("leaf", "state"), j))
        ready.remove(i)
        order.append(i)
        for j in set(tape.ops[i].operands):
            readers[j] -= 1
            if not readers[j]:
                ready.add(j)
    return tuple(order)


def whole_behind(tape: StepTape, state: int) -> frozenset[int]:
    """Return the operations after which a state's adjoint is complete, and its adjoint after the token not read again.

    The former may then overwrite the latter.
    """
    users = {j for j, op in enumerate(tape.ops) if state in op.operands}
    return frozenset(users | {j for name, j in tape.after if name == tape.ops[state].of} | {state})
