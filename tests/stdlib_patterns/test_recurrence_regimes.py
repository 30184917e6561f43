"""Recurrences of the library in every regime of gates, by the public call: fp32 errors, documents, split sequences.

Truth is the references written from the papers, in fp64. The figures are from section 9 of RECURRENCES.md.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import UnsupportedError
from attnc.runtime.texts.library import hybrid_names, library_files, recurrence_names
from recurrence_cases import REGIMES, error
from recurrence_regimes import (
    GRIDS,
    SYSTEMS,
    Case,
    Results,
    Tensors,
    arguments,
    by_reference,
    by_us,
    draw_case,
    everything,
    found,
    gradients,
    leaves,
    part,
)

pytestmark = pytest.mark.usefixtures("one_thread")

Figures = tuple[float, float, float]

COLUMNS = ("0", "mixed", "-5", "-100 first", "-88.8 in the middle", "-100 in the middle", "-inf")
# Section 9's "Verified errors", quoted: max|err| / max|truth| in units of 1e-7 for outputs and states, for the
# gradients of q, k, v, r, u, S₀ and bonus, and for gates, each after 200 tokens of 3 heads, dk 32 and dv 24, from a
# state that is not 0; the columns are COLUMNS.
TABLE = """
none       | 2.0/2.4/0.0
scal       | 2.7/2.7/3.1 | 1.3/2.4/0.8 | 1.2/1.2/2.0 | 2.2/2.2/2.1 | 1.7/3.4/1.4 | 2.4/2.8/2.3 | 2.2/4.7/1.4
vec        | 2.0/2.1/2.3 | 1.1/3.0/1.3 | 0.9/1.9/1.0 | 2.3/2.7/1.9 | 1.8/3.2/1.9 | 2.7/2.8/2.0 | 2.2/4.4/1.5
vec both   | 2.0/2.1/2.6 | 1.9/2.2/1.7 | 0.9/1.5/2.2 | 2.2/2.1/2.4 | 1.9/2.6/2.1 | 2.2/3.0/1.9 | 1.7/3.0/2.2
vec rwkv6  | 2.2/2.3/1.5 | 1.4/2.9/1.6 | 1.6/2.9/1.7 | 1.8/2.4/1.7 | 2.3/2.8/2.4 | 2.3/3.1/2.4 | 1.8/3.4/1.4
delta      | 3.5/4.8/0.0
scal delta | 3.9/4.3/3.9 | 1.9/2.8/2.6 | 0.9/1.7/1.4 | 3.5/4.1/3.6 | 3.0/5.4/3.3 | 3.1/3.8/3.5 | 2.2/4.2/1.7
vec delta  | 5.1/4.7/4.6 | 1.1/4.5/1.3 | 1.0/2.5/1.8 | 4.1/4.8/4.1 | 3.0/3.5/2.6 | 3.6/4.2/2.5 | 2.4/4.7/2.3
scal comba | 3.0/4.0/1.8 | 1.7/5.1/0.8 | 1.1/3.2/0.9 | 3.2/3.5/3.3 | 2.4/3.8/2.7 | 2.9/3.6/4.4 | 2.6/4.8/1.3
vec rank1  | 3.1/4.4/3.1 | 1.4/3.2/2.1 | 1.2/1.6/1.1 | 4.2/5.3/3.1 | 3.7/4.3/2.6 | 4.3/4.6/3.5 | 2.2/3.7/2.9
"""
FIGURES: dict[str, dict[str, Figures]] = {
    name.strip(): {
        regime: tuple(map(float, cell.split("/")))  # type: ignore[misc]
        for regime, cell in zip(COLUMNS, cells, strict=False)
    }
    for name, *cells in (line.split("|") for line in TABLE.strip().splitlines())
}

CLASSES = {
    "aaren": "vec",  # its log-sum-exp decays every entry of S
    "comba": "scal comba",
    "delta_net": "delta",
    "gated_delta_net": "scal delta",
    "gated_delta_product": "scal delta",
    "gla": "vec",
    "gsa": "vec both",
    "hgrn": "vec",
    "hgrn2": "vec",
    "hybrid_window_linear": "scal",
    "kimi_delta": "vec delta",
    "lightnet": "vec",
    "lightning": "scal",
    "linear_attention": "none",
    "lingen_ma": "scal",
    "log_linear": "scal",
    "mamba1": "vec",
    "mamba2_ssd": "scal",
    "mamba_mixer": "vec",
    "mesa": "scal",
    "mhs_vm": "vec",
    "retention": "scal",
    "rwkv6": "vec rwkv6",
    "rwkv7": "vec rank1",
    "spatial_mamba": "vec",
    "test_time_regression": "delta",
    "titans_linear": "scal delta",
    "yaad_linear": "scal delta",
}
"""The class of each pattern in the table, or the nearest class."""

AS_THE_LOOP = {
    "gsa": "a softmax between two passes multiplies the errors of its scores",
    "mamba1": "a factor for each entry, rounded separately, as by a token loop",
    "mamba_mixer": "as mamba1",
    "mesa": "a system solved for each token",
    "mhs_vm": "as mamba1",
    "spatial_mamba": "as mamba1",
    "test_time_regression": "an inverse that is updated from token to token",
    "titans_linear": "two states, of which one accumulates the other",
    "yaad_linear": "not linear in its state",
}
"""Patterns whose class the table lacks, and why: their limit is twice the nearest class's figure, or three times the
error of the reference token by token in fp32, if that is more; other orders of summation erred up to 2.8 times it."""

BY_DRAWS = {("scal", "mixed"), ("scal comba", "mixed"), ("scal comba", "-5"), ("scal comba", "-inf")}
"""Cases in which the mean of several draws is compared with twice the table's figure of gates, which is of one draw.

The gradient of a scalar gate comes from a few pairs of tokens, sums of 32 and 24 terms in fp32, so its error varies
with the draw. Twelve draws of the table's sizes, mean and maximum (1e-7): mamba2_ssd mixed 0.96 and 2.3; comba mixed
1.2 and 2.2, -5 0.8 and 2.0, -inf 1.6 and 2.4. The reference in fp32, token by token: 1.1 and 2.1; 1.4 and 3.3, 1.3 and
2.3, 2.1 and 3.1.
"""
DRAWS = 8

SHARED = {"A", "D", "decay", "mix", "ridge"}
"""Learned tensors that the table lacks: each of their few gradients is a sum over all tokens, which may cancel.
They are compared with the reference in fp32 as well, and so is aaren's w."""

TOKENS = 200
FEWER = {"log_linear": 80}
"""Numbers of tokens for references that enumerate all pairs."""
LEAST = {"lingen_ma": 3, "log_linear": 2}
"""Minimum numbers of tokens: one that is not a review token; one level."""
TIGHT = 1e-13
VANISHED = 1e-20
"""Size of values that passed only a closed gate, e^-50 or less: they must be small; their digits are not compared."""

TRAINED = {"memora_linear", "moneta_linear", "ttt_linear"}
"""Strongly nonlinear recurrences: the growth of their errors depends on the inputs, not on the gates."""

NAMES = sorted(SYSTEMS)
GATED = [name for name in NAMES if SYSTEMS[name].put]
CONTINUED = [name for name in NAMES if SYSTEMS[name].continued]


def tight(name: str) -> float:
    """Return the tolerance for fp64; scores of two patterns reach the thousands, so that 1e-11 is a few ulp of them."""
    return 1e-11 if name in ("aaren", "lightnet") else TIGHT


def test_every_pattern_has_a_case() -> None:
    """Patterns with complex numbers and trained memories are excepted."""
    texts = {name: library_files()[name].read_text(encoding="utf-8") for name in (*recurrence_names(), *hybrid_names())}
    assert {name for name, text in texts.items() if "complex[" not in text} == set(SYSTEMS) | TRAINED
    assert set(COLUMNS) <= set(REGIMES)
    assert CLASSES.keys() == set(SYSTEMS)


# --- errors -----------------------------------------------------------------------------------------------------------


def group_of(case: Case, result: str) -> str:
    name = result.removeprefix("d ")
    if name == result:
        return "forward"
    if name in SHARED or (case.name, name) == ("aaren", "w"):
        return "shared"
    return "gates" if name in case.system.gates else "gradients"


def errors(case: Case, results: Results, truth: Results) -> dict[str, float]:
    """Return the largest error of each group; NaN counts as an infinite error."""
    worst: dict[str, float] = {}
    for name, expected in truth.items():
        wrong = error(results[name], expected)
        if expected.numel() and expected.abs().max() < VANISHED:
            wrong = 0.0 if results[name].abs().max() < VANISHED else math.inf
        group = group_of(case, name)
        worst[group] = max(worst.get(group, 0.0), wrong)
    return worst


def limits(case: Case, regime: str | None, truth: Results) -> dict[str, float]:
    """Return the limits by group in fp32: the table's for 200 tokens, or without `regime` the class's largest."""
    figures = FIGURES[CLASSES[case.name]]
    columns = figures.values() if regime is None else [figures[regime]]
    forward, rest, gates = (max(column) for column in zip(*columns, strict=True))
    by_group = {"forward": forward, "gradients": rest, "gates": gates, "shared": rest}
    if case.name in AS_THE_LOOP or {"d " + name for name in SHARED} & truth.keys() or case.name == "aaren":
        loop = errors(case, everything(case, by_reference, torch.float32), truth)
        for group, wrong in loop.items():
            if case.name in AS_THE_LOOP or group == "shared":
                by_group[group] = max(by_group[group], (1.5 if case.name in AS_THE_LOOP else 1) * wrong * 1e7)
    return {group: 2e-7 * figure for group, figure in by_group.items()}


def assert_within(case: Case, regime: str | None) -> None:
    """Check the errors in fp64 and fp32; no gradient may be NaN."""
    truth = everything(case, by_reference, torch.float64)
    wide = errors(case, everything(case, by_us, torch.float64), truth)
    assert max(wide.values()) <= tight(case.name), wide
    narrow, maximum = errors(case, everything(case, by_us, torch.float32), truth), limits(case, regime, truth)
    if (CLASSES[case.name], regime) in BY_DRAWS:
        narrow["gates"] = sum(error_of_gates(case, str(regime), seed) for seed in range(DRAWS)) / DRAWS
    assert {group: (x, maximum[group]) for group, x in narrow.items() if not x <= maximum[group]} == {}


def error_of_gates(like: Case, regime: str, seed: int) -> float:
    """Return the error of the gates' gradients for another draw."""
    case = draw_case(like.name, regime, like.tokens, seed=seed)
    truth = everything(case, by_reference, torch.float64)
    return errors(case, everything(case, by_us, torch.float32), truth)["gates"]


@pytest.mark.parametrize("regime", COLUMNS)
@pytest.mark.parametrize("name", GATED)
def test_regimes(name: str, regime: str) -> None:
    """Outputs, states, and every gradient, including that of the initial state."""
    assert_within(draw_case(name, regime, FEWER.get(name, TOKENS)), regime)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 100, 257])
@pytest.mark.parametrize("name", NAMES)
def test_lengths(name: str, tokens: int) -> None:
    tokens = max(min(tokens, FEWER.get(name, tokens)), LEAST.get(name, 1))
    case = draw_case(name, "mixed", tokens)
    assert case.tokens == tokens
    assert_within(case, None)


# --- documents and resets ---------------------------------------------------------------------------------------------

STARTS = (0, 77, 128, 150, TOKENS)


def in_pieces(case: Case, tensors: Tensors, starts: tuple[int, ...]) -> Results:
    """Run the reference with a new state at each start but the first; the states are those after the last piece."""
    pieces: list[Results] = []
    for low, high in itertools.pairwise(starts):
        piece_tensors = part(tensors, slice(low, high))
        if low:
            piece_tensors = {name: x for name, x in piece_tensors.items() if not name.startswith("state ")}
        pieces.append(by_reference(case, piece_tensors))
    return {**pieces[-1], "out": torch.cat([piece["out"] for piece in pieces], 2)}


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(GRIDS)))
def test_documents(name: str) -> None:
    """Nothing crosses a border of documents, though the gates are almost open."""
    case = draw_case(name, "mild" if name in GATED else "0", TOKENS).without_states()
    truth = everything(case, lambda case, tensors: in_pieces(case, tensors, STARTS), torch.float64)

    def by_call(case: Case, tensors: Tensors) -> Results:
        return by_us(case, tensors, cu_seqlens=torch.tensor(STARTS))

    wide = errors(case, everything(case, by_call, torch.float64), truth)
    assert max(wide.values()) <= tight(name), wide
    narrow = errors(case, everything(case, by_call, torch.float32), truth)
    maximum = limits(case, "-inf" if name in GATED else "0", truth)
    assert {group: (x, maximum[group]) for group, x in narrow.items() if not x <= maximum[group]} == {}


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_grids_have_no_documents(name: str) -> None:
    case = draw_case(name, "mixed", 20)
    with pytest.raises(UnsupportedError, match="cu_seqlens"):
        by_us(case, leaves(case, torch.float64), cu_seqlens=torch.tensor([0, 10, 20]))


@pytest.mark.parametrize("name", CONTINUED)
def test_resets(name: str) -> None:
    """States are reset at other tokens in each batch entry, starting from a nonzero state; Titans' at chunk starts."""
    case = draw_case(name, "mild" if name in GATED else "0", 160, batch=2)
    places = [(80, 96), (64, 128)] if name == "titans_linear" else [(77, 78, 150), (64, 65)]
    fresh = torch.zeros(2, 160, dtype=torch.bool)
    for entry, resets in enumerate(places):
        fresh[entry, list(resets)] = True
    attend = case.attention(case.text("input fresh: bool[batch, token]", "reset fresh"))

    def by_entries(case: Case, tensors: Tensors) -> Results:
        results_by_entry = [
            in_pieces(case, part(tensors, slice(None), slice(entry, entry + 1)), (0, *resets, 160))
            for entry, resets in enumerate(places)
        ]
        return {
            result: torch.cat([entry_results[result] for entry_results in results_by_entry])
            for result in results_by_entry[0]
        }

    truth = everything(case, by_entries, torch.float64)
    ours = everything(case, lambda case, resets: by_us(case, resets, attend, fresh=fresh), torch.float64)
    wrong = errors(case, ours, truth)
    assert max(wrong.values()) <= tight(name), wrong


# --- split sequences --------------------------------------------------------------------------------------------------

LENGTH = 100
CUTS: dict[str, list[tuple[int, ...]]] = {
    "in two": [(at,) for at in (1, 63, 64, 65, 77, 99)],
    "in many": [tuple(range(32, LENGTH, 32)), tuple(range(7, LENGTH, 7)), (1, 2, 66, 67, 90)],
    "token by token": [tuple(range(1, LENGTH))],
}


def in_calls(case: Case, tensors: Tensors, cuts: tuple[int, ...]) -> Results:
    """Run successive calls that continue each other's state: the first by `state`, the others by `step`."""
    attend = case.attention()
    outs: list[Tensor] = []
    state: Any = None
    for low, high in itertools.pairwise((0, *cuts, LENGTH)):
        operands, begun = arguments(case, part(tensors, slice(low, high)))
        if low:
            out, state = attend.step(**operands, state=state)
        else:
            out, state = attend(**operands, state=begun, return_state=True)
        outs.append(out)
    return found(case, torch.cat(outs, 2), state)


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("name", CONTINUED)
def test_a_split_sequence_equals_a_whole_one(name: str, how: str) -> None:
    """Outputs and final states, in fp64, with closed gates at the first token of a call and before it."""
    case = draw_case(name, "mixed", LENGTH)
    for gate in {"g", "f", "w"} & set(case.system.gates):
        case.tensors[gate][:, [64, 76, 77]] = 0 if gate != "g" else -math.inf
    tensors = {key: x.double() for key, x in case.tensors.items()}
    with torch.no_grad():
        whole, truth = by_us(case, tensors), by_reference(case, tensors)
        for cuts in CUTS[how]:
            ours = in_calls(case, tensors, cuts)
            for result, x in ours.items():
                assert error(x, whole[result]) <= tight(name), (cuts, result)
                assert error(x, truth[result]) <= tight(name), (cuts, result)


@pytest.mark.parametrize("name", CONTINUED)
def test_gradients_pass_through_states_between_calls(name: str) -> None:
    case = draw_case(name, "mixed", LENGTH)
    truth = everything(case, by_reference, torch.float64)
    inputs = leaves(case, torch.float64)
    results = in_calls(case, inputs, (1, 50, 64))
    wrong = errors(case, {**results, **gradients(results, inputs)}, truth)
    assert max(wrong.values()) <= tight(name), wrong


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(CONTINUED)))
def test_recurrences_that_cannot_be_split(name: str) -> None:
    """Routes over a picture need the whole picture; states of branches cannot be passed on yet."""
    case = draw_case(name, "mixed", 20)
    operands, _ = arguments(case, leaves(case, torch.float64))
    with pytest.raises(UnsupportedError):
        case.attention()(**operands, state={"S": torch.zeros(1)})
