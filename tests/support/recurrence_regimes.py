"""Calls of the library's recurrences with gates of each regime, and the same calls by independent references.

A regime (`recurrence_cases.REGIMES`) draws log decays, ≤ 0. Every system gets them where it takes decays, in the form
that it takes: unchanged, as a factor, as a step size with a fixed rate, as rising scores. Tensors are drawn in fp64
and rounded to fp32, which both sides use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnc import Attention, compile_attention
from attnc.runtime.texts.library import hybrid_names, library_files
from recurrence_cases import REGIMES
from recurrence_draws import example
from reference.scans import REFERENCES

Tensors = dict[str, Tensor]
Draw = Callable[[str], Tensor]

SIZES: Mapping[str, int] = {"B": 3, "H": 3, "k": 32, "v": 24, "n": 6}
"""The sizes of section 9's table."""
OWN_SIZES: Mapping[str, Mapping[str, int]] = {
    "gated_delta_product": {"n": 2},
    "mesa": {"B": 1, "H": 2, "k": 16, "v": 12},
    "spatial_mamba": {"B": 1, "k": 1},
    "titans_linear": {"B": 1},
    "yaad_linear": {"B": 1},
}
"""Sizes of some systems: two corrections a token; a system that its thirty steps of conjugate gradients solve; one
number per token; and one sequence for slow systems."""
SCALE = 0.25
"""The scale, a power of two, so that multiplying by it rounds nothing."""
CHUNK = 16
"""The chunk of Titans, which is part of its definition."""
PARAMETERS = ("height", "width", "frames", "window", "layer", "chunk")

# --- how a system takes decays ----------------------------------------------------------------------------------------


def as_it_is(gate: str, axes: str) -> Callable[[Tensors, Draw], None]:
    def put(tensors: Tensors, draw: Draw) -> None:
        tensors[gate] = draw(axes)

    return put


def as_factor(gate: str, axes: str) -> Callable[[Tensors, Draw], None]:
    """Put exp of the decays: exactly 0 for -inf, exactly 1 for 0."""

    def put(tensors: Tensors, draw: Draw) -> None:
        tensors[gate] = draw(axes).exp()

    return put


def of_titans(tensors: Tensors, draw: Draw) -> None:
    """Put two decays: one is kept as a factor, the other is given as the forgotten part."""
    tensors["hold"], tensors["forget"] = draw("BTH").exp(), -torch.expm1(draw("BTH"))
    tensors["rate"] = tensors["rate"] / 16  # so that the state does not grow if nothing is forgotten


def as_step_size(tensors: Tensors, draw: Draw) -> None:
    """Put decays as dt · A, A from -2 to -1/2; smaller values v keep the writes dt · v of large steps small.

    A step size is above 0, so log decays of 0 need A = 0. A closed gate is 2000, which leaves exactly 0 of the state.
    """
    steps, values = -draw("BTHv"), tensors["v"].movedim(1, 2)
    if not steps.any():
        tensors["A"] = torch.zeros_like(tensors["A"])
        return
    tensors["A"] = -(2 ** (2 * torch.sigmoid(tensors["A"]) - 1))
    tensors["dt"] = steps.clamp(min=1e-30, max=4000)
    tensors["v"] = (values / tensors["dt"].clamp(min=1)).movedim(1, 2)


def rising(decays: Tensor) -> Tensor:
    """Return scores (B, H, T, …) by which a log-sum-exp from 0 rises by -`decays`: by 110 at a closed gate."""
    decays = decays.clamp(min=-110, max=-1e-17)
    return (-decays).cumsum(2) + (-torch.expm1(decays)).log()


def as_keys(tensors: Tensors, draw: Draw) -> None:
    tensors["k"] = rising(draw("BTHk").movedim(1, 2))


def as_scores(tensors: Tensors, draw: Draw) -> None:
    """Put keys that have exactly these scores: the learned query reads one channel."""
    tensors["w"] = torch.zeros_like(tensors["w"])
    tensors["w"][:, 3] = 1 / SCALE
    tensors["k"][..., 3] = rising(draw("BTH").movedim(1, 2))


# --- the systems ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class System:
    """The arguments of a pattern's calls under a regime.

    `put`: puts decays into its inputs, None if it takes none. `gates`: the inputs that hold them. `states`: their names
    in the pattern, with axes, in the order of the reference. `continued`: whether calls take and return states.
    """

    put: Callable[[Tensors, Draw], None] | None = None
    gates: tuple[str, ...] = ("g",)
    states: tuple[tuple[str, str], ...] = (("S", "kv"),)
    continued: bool = True


UNGATED = System(None, ())
BY_HEAD, BY_ROW = as_it_is("g", "BTH"), as_it_is("g", "BTHk")
SYSTEMS: Mapping[str, System] = {
    "aaren": System(as_scores, (), (("m", "1"), ("S", "v"))),
    "comba": System(BY_HEAD),
    "delta_net": UNGATED,
    "gated_delta_net": System(BY_HEAD),
    "gated_delta_product": System(BY_HEAD),
    "gla": System(BY_ROW),
    "gsa": System(as_it_is("g", "BTHn"), states=(("K", "kn"), ("V", "nv"))),
    "hgrn": System(as_factor("f", "BTHv"), ("f",), (("h", "v"),)),
    "hgrn2": System(as_factor("f", "BTHk"), ("f",)),
    "hybrid_window_linear": System(BY_HEAD, states=(), continued=False),
    "kimi_delta": System(BY_ROW),
    "lightnet": System(as_keys, (), (("z", "k"), ("S", "kv"))),
    "lightning": UNGATED,
    "linear_attention": replace(UNGATED, states=(("S", "kv"), ("z", "k"))),
    "lingen_ma": System(BY_HEAD, states=(), continued=False),
    "log_linear": System(BY_HEAD, states=(), continued=False),
    "mamba1": System(as_step_size, ("dt", "A")),
    "mamba2_ssd": System(BY_HEAD),
    "mamba_mixer": System(as_step_size, ("dt", "A"), states=(), continued=False),
    "mesa": System(BY_HEAD, states=(("A", "kk"), ("B", "kv"))),
    "mhs_vm": System(as_step_size, ("dt", "A"), continued=False),
    "retention": UNGATED,
    "rwkv6": System(BY_ROW),
    "rwkv7": System(as_factor("w", "BTHk"), ("w",)),
    "spatial_mamba": System(as_step_size, ("dt", "A"), states=(), continued=False),
    "test_time_regression": System(None, (), (("P", "kk"), ("n", ""), ("S", "kv"))),
    "titans_linear": System(of_titans, ("hold", "forget"), (("M", "kv"), ("P", "kv"))),
    "yaad_linear": System(as_factor("hold", "BTH"), ("hold",), (("M", "kv"),)),
}
GRIDS: Mapping[str, int] = {"mhs_vm": 2, "spatial_mamba": 2, "lingen_ma": 3}
"""Number of token axes of systems on a grid."""
REVIEWS = 2
"""Number of LinGen's tokens that are outside its grid."""


def grid_of(tokens: int, axes: int) -> tuple[int, ...]:
    """Return the most even grid for a number of tokens, its last axis the longest."""
    if axes == 1:
        return (tokens,)
    side = max(math.floor(tokens ** (1 / axes) + 1e-9), 1)
    first = next(size for size in range(side, 0, -1) if tokens % size == 0)
    return (first, *grid_of(tokens // first, axes - 1))


# --- a call -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A call of a pattern: q, k, v, inputs and states (`state S`) by name, in fp32, and numbers separately."""

    name: str
    tensors: Tensors
    numbers: dict[str, Any]

    @property
    def system(self) -> System:
        return SYSTEMS[self.name]

    @property
    def tokens(self) -> int:
        return self.tensors["q"].shape[2]

    def attention(self, text: str | None = None) -> Attention:
        params = {name: x for name, x in self.numbers.items() if name in PARAMETERS}
        if self.name == "log_linear":
            params["levels"] = self.tensors["level"].shape[-1] - 1
        return compile_attention(text or self.name, **params)

    def options(self) -> dict[str, Any]:
        code = library_files()[self.name].read_text(encoding="utf-8").split('"""')[2]
        return {"scale": SCALE} if "scale" in code or self.name in hybrid_names() else {}

    def text(self, *lines: str) -> str:
        """Return the text of the pattern, with lines before all others."""
        title, about, rest = library_files()[self.name].read_text(encoding="utf-8").split('"""')
        return f'{title}"""{about}"""\n' + "".join(f"    {line}\n" for line in lines) + rest.lstrip("\n")

    def without_states(self) -> Case:
        return replace(self, tensors={name: x for name, x in self.tensors.items() if not name.startswith("state ")})


def draw_case(name: str, regime: str, tokens: int, *, batch: int | None = None, seed: int = 5) -> Case:
    system = SYSTEMS[name]
    sizes = {**SIZES, **OWN_SIZES.get(name, {}), "1": 1}
    batch = sizes["B"] = batch or sizes["B"]
    on_grid = max(tokens - REVIEWS, 1) if name == "lingen_ma" else tokens
    grid = grid_of(on_grid, GRIDS[name]) if name in GRIDS else None
    heads, dk, dv, n = (sizes[axis] for axis in "Hkvn")
    q, k, v, inputs = example(name, B=batch, H=heads, T=tokens, dk=dk, dv=dv, n=n, grid=grid, seed=seed)
    tensors = {"q": q, "k": k, "v": v, **{key: x for key, x in inputs.items() if isinstance(x, Tensor)}}
    numbers = {key: x for key, x in inputs.items() if not isinstance(x, Tensor)}
    if name == "titans_linear":
        numbers["chunk"] = CHUNK
    sizes["T"] = q.shape[2]
    source = torch.Generator().manual_seed(seed)

    def gates(axes: str) -> Tensor:
        ordered = ["B", "H", "T", *axes[3:]]
        return REGIMES[regime](tuple(sizes[axis] for axis in ordered), source).movedim(1, 2)

    if system.put is not None:
        system.put(tensors, gates)
    if system.continued:
        for state, axes in system.states:
            size = [sizes[axis] for axis in axes]
            tensors[f"state {state}"] = torch.randn(batch, heads, *size, generator=source, dtype=torch.float64)
    _make_states_reachable(name, tensors)
    return Case(name, {key: x.float() if x.is_floating_point() else x for key, x in tensors.items()}, numbers)


def _make_states_reachable(name: str, tensors: Tensors) -> None:
    """Replace states that no run could leave: sums of features are positive, matrices positive definite, a z is 0."""
    if name == "linear_attention":
        tensors["state z"] = 1 + tensors["state z"].square()
    if name == "mesa":
        x = tensors["state A"]
        tensors["state A"] = x @ x.mT / x.shape[-1]
    if name == "test_time_regression":
        x = tensors["state P"]
        tensors["state P"], tensors["state n"] = (
            x @ x.mT / x.shape[-1] + torch.eye(len(x[0, 0])),
            torch.ones_like(tensors["state n"]),
        )
    if name == "lightnet":
        tensors["state z"] = torch.zeros_like(tensors["state z"])
    if name == "aaren":
        tensors["state m"] = torch.zeros_like(tensors["state m"])
    if name == "rwkv7":  # of length 1, as in the table
        tensors["k"] = torch.nn.functional.normalize(tensors["k"], dim=-1)
    if "beta" in tensors:  # both limits of a step
        tensors["beta"][:, 3::7], tensors["beta"][:, 5::11] = 0, 1


# --- both ways --------------------------------------------------------------------------------------------------------

Results = dict[str, Tensor]


def by_reference(case: Case, tensors: Mapping[str, Tensor]) -> Results:
    """Return `out`, and the states after the last token by name."""
    arguments = symmetric(case, tensors)
    q, k, v = (arguments.pop(state_name) for state_name in "qkv")
    state = (
        tuple(
            arguments.pop(f"state {state_name}")
            for state_name, _ in case.system.states
            if f"state {state_name}" in arguments
        )
        or None
    )
    if case.name == "aaren" and state:
        m, mean = state
        state = (m[..., 0], torch.ones_like(m[..., 0]), mean)
    out, last = REFERENCES[case.name](q, k, v, scale=SCALE, state=state, **arguments, **case.numbers)
    if case.name == "aaren":
        top, total, acc = last
        last = ((top + total.log())[..., None], acc / total[..., None])
    return {"out": out, **{state_name: x for (state_name, _), x in zip(case.system.states, last, strict=False)}}


def by_us(case: Case, tensors: Mapping[str, Tensor], attend: Attention | None = None, **more: Any) -> Results:
    """Return the results of the public call."""
    attend = case.attention() if attend is None else attend
    operands, state = arguments(case, tensors)
    if case.name in hybrid_names():
        return {"out": attend(**operands, **more)}
    out, last = attend(**operands, **more, return_state=True, state=state)
    return found(case, out, last)


def found(case: Case, out: Tensor, last: Mapping[str, Tensor]) -> Results:
    """Return the results of a call in the reference's form."""
    states = {state_name: last[state_name] for state_name, _ in case.system.states}
    if case.name == "aaren":
        states["m"] = states["m"][..., None]
    return {"out": out, **states}


def arguments(case: Case, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], Tensors | None]:
    """Return the arguments of a call, and its states."""
    operands: dict[str, Any] = symmetric(case, tensors)
    state = {
        state_name: operands.pop(f"state {state_name}")
        for state_name, _ in case.system.states
        if f"state {state_name}" in operands
    }
    if case.name == "spatial_mamba":  # one state per channel: B and C are numbers
        operands |= {name: operands[x][..., 0].transpose(1, 2) for name, x in (("b", "k"), ("c", "q"))}
        operands["A"] = operands["A"][:, 0]
    return operands | case.options(), our_states(case, state, operands["v"]) or None


def symmetric(case: Case, tensors: Mapping[str, Tensor]) -> Tensors:
    """Make Mesa's A and the inverse matrix symmetric, as they always are: conjugate gradients read only that part."""
    copies = dict(tensors)
    for state in {"mesa": ["state A"], "test_time_regression": ["state P"]}.get(case.name, []):
        if state in copies:
            copies[state] = (copies[state] + copies[state].mT) / 2
    return copies


def our_states(case: Case, state: Tensors, v: Tensor) -> Tensors:
    """Return the states as a call takes them, with the counters that the pattern adds."""
    if case.name == "aaren" and state:
        return state | {"m": state["m"][..., 0]}
    if case.name == "titans_linear" and state:
        return state | {"first": torch.zeros_like(state["M"]), "t": torch.zeros(len(v), dtype=torch.int64)}
    return state


def part(tensors: Mapping[str, Tensor], tokens: slice, batch: slice = slice(None)) -> Tensors:
    """Return the tensors of some tokens and batch entries."""
    selected, (entries, _, count, _) = {}, tensors["q"].shape
    for name, x in tensors.items():
        if name in ("q", "k", "v"):
            selected[name] = x[batch, :, tokens]
        elif name.startswith("state "):
            selected[name] = x[batch]
        else:
            selected[name] = x[batch, tokens] if x.ndim > 1 and x.shape[:2] == (entries, count) else x
    return selected


def leaves(case: Case, dtype: torch.dtype) -> Tensors:
    return {
        name: x.to(dtype, copy=True).requires_grad_() if x.is_floating_point() else x
        for name, x in case.tensors.items()
    }


def gradients(results: Results, tensors: Tensors) -> Tensors:
    """Return the gradients of a weighted sum over all results; equal shapes have equal fp32 weights."""
    draw = torch.Generator().manual_seed(12)
    total = torch.zeros((), dtype=torch.float64)
    for x in results.values():
        total = total + (x.double() * torch.randn(x.shape, generator=draw).double()).sum()
    wanted = {name: x for name, x in tensors.items() if x.requires_grad}
    gradients_of_leaves = torch.autograd.grad(total, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return {f"d {name}": x for name, x in zip(wanted, gradients_of_leaves, strict=True)}


def everything(case: Case, run: Callable[[Case, Tensors], Results], dtype: torch.dtype) -> Results:
    """Return results and gradients."""
    inputs = leaves(case, dtype)
    results = run(case, inputs)
    return {name: x.detach() for name, x in (results | gradients(results, inputs)).items()}
