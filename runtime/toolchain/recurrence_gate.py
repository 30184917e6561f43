"""The gate of recurrence kernels: the kernels that are compiled, and what their machine code must contain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from attnc.compiler.kernels.targets import TARGETS
from attnc.compiler.recurrences.kernels.recurrence_kernels import emit, stages, walk_stages
from attnc.compiler.recurrences.kernels.recurrence_problem import RecurrenceProblem
from attnc.compiler.recurrences.recurrence_class import RecurrenceClass
from attnc.runtime.toolchain import kernel_gate
from attnc.runtime.toolchain.compiling import CompiledBinary, Outcome
from attnc.runtime.toolchain.kernel_gate import GateCase

SELECTION: Mapping[str, RecurrenceClass] = {
    str(form): form
    for form in (
        RecurrenceClass(),
        RecurrenceClass(gate="constant"),
        RecurrenceClass(gate="scalar"),
        RecurrenceClass(gate="scalar", resets=True),
        RecurrenceClass(gate="rows"),
        RecurrenceClass(columns=True),
        RecurrenceClass(gate="rows", columns=True),
        RecurrenceClass(gate="rows", before=True),
        RecurrenceClass(correction="delta"),
        RecurrenceClass(gate="scalar", correction="delta"),
        RecurrenceClass(gate="scalar", correction="delta", micro=2),
        RecurrenceClass(gate="rows", correction="delta"),
        RecurrenceClass(gate="scalar", correction="comba"),
        RecurrenceClass(gate="rows", correction="comba"),
        RecurrenceClass(gate="scalar", correction="decayed"),
        RecurrenceClass(gate="rows", correction="old"),
    )
}
"""Classes of the library's recurrences, and further classes with more work in one kernel."""

WITHOUT_PRODUCTS = frozenset(
    {"columns", "column_reads", "step", "weights", "joined", "adjoints_joined", "scan", "token_by_token"}
)
"""Kernels that multiply no tiles."""


def cases(
    targets: Sequence[str],
    head_dims: Sequence[int] = (64, 128),
    dtype: str = "bfloat16",
    forms: Sequence[RecurrenceClass] = tuple(SELECTION.values()),
    length: int = 64,
) -> Iterator[GateCase]:
    """Yield the kernels of recurrence classes for chunks of `length` rows; kernels with equal text once."""
    seen = set()
    for target in targets:
        for head_dim in head_dims:
            for form in forms:
                problem = RecurrenceProblem(form, head_dim, head_dim, dtype, length, TARGETS[target])
                for stage in (*stages(form), *walk_stages(problem)):
                    source = emit(problem, stage)
                    text = source.text.partition("@triton.jit")[2].replace(source.function, "")
                    key = (text, target, tuple(source.options.items()))
                    if key not in seen:
                        seen.add(key)
                        yield GateCase(str(form), source, target, head_dim, dtype)


def judge(case: GateCase, outcome: Outcome) -> list[str]:
    """Return the reasons to reject a kernel; empty if it is accepted."""
    reasons = kernel_gate.judge(case, outcome)
    if isinstance(outcome, CompiledBinary) and case.dtype != "float32":
        if case.stage not in WITHOUT_PRODUCTS and not outcome.code.products:
            reasons.append("no tensor-core instruction")
        for loop in outcome.code.loops:
            if loop.local_loads:
                reasons.append(f"{loop.local_loads} local loads in the loop of {loop.instructions} instructions")
    return reasons
