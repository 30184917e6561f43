"""Draw the branches of a pattern with states side by side: visible pairs, and how long a state keeps a token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from attnc.compiler.ir import Pattern
from attnc.compiler.passes.attentions import stateful_alone
from attnc.compiler.simulation.print_simulation import size
from attnc.runtime.call.call_errors import ArgumentError
from attnc.runtime.call.tensor_checks import TensorSizes, input_tensors
from attnc.runtime.executors.pattern_attentions import PatternAttentions
from attnc.runtime.executors.recurrent.pattern_recurrence import PatternRecurrence
from attnc.runtime.patterns.pattern_analysis import PatternAnalysis
from attnc.runtime.pictures.branch_views import BranchesDrawing, BranchView, Shares
from attnc.runtime.pictures.draw import MOST_CHOSEN, SQUARES, DrawnHead, drawn_case, subtitle_of
from attnc.runtime.pictures.drawing import coarsening, extents, means, percent
from attnc.runtime.pictures.picture_limits import check_drawn_length
from attnc.spec.errors import AttncError

TRIED = 64
"""The maximum number of tokens whose value is followed through a state, at an even distance."""
LARGEST_TRIAL = 1 << 28
"""The maximum size in bytes of the values of all trials together."""
CHANGE = 1e-4
"""The change of a value by which the measurement finds what is left of it; in fp64 it has about four digits."""
HALF = 0.5
WIDTH, FEWEST = 8, 4
"""Head dimensions: for states with a derivation, and for other states, which are computed token by token."""


def make_branches(
    attention: PatternAnalysis, n_q: int, n_k: int, inputs: Mapping[str, object], *, head: int = 0
) -> BranchesDrawing:
    """Return the branches of a head, of the first batch entry.

    Inputs that are not given get example values, which the notes name. Raises ArgumentError for sizes that are too
    large to draw, and for different numbers of queries and keys, and the errors of a call with these sizes.
    """
    check_drawn_length(max(n_q, n_k))
    if n_q != n_k:
        raise ArgumentError(f"{n_q:,} queries and {n_k:,} keys: a picture of a state needs as many queries as keys")
    attentions = (
        PatternAttentions(f"{attention.name}#picture", attention.pattern, False) if attention.pattern.nodes else None
    )
    recurrents = _recurrents(attention.pattern)
    width = FEWEST if any(recurrent.derived is None for recurrent in recurrents) else WIDTH
    case = drawn_case(attention, n_q, n_k, inputs, head, all_inputs=True, width=width)
    if attention.pattern.nodes and n_q * n_k > MOST_CHOSEN:
        raise ArgumentError(
            f"{n_q:,} × {n_k:,} pairs: branches next to a state are drawn pair by pair, up to {MOST_CHOSEN:,} pairs; "
            f"use fewer tokens"
        )
    trial = (TRIED + 1) * n_q * case.heads * width * 8
    if trial > LARGEST_TRIAL:
        raise ArgumentError(
            f"a picture of a state over {n_q:,} tokens of {case.heads} heads would need {size(trial)} for the values "
            f"alone, and the limit is {size(LARGEST_TRIAL)}: draw fewer tokens"
        )
    views = (
        []
        if attentions is None
        else [_branch_view(name, mask) for name, mask in _masks(attention, attentions, n_q, case, width)]
    )
    notes = [
        *case.notes,
        "a state: the share of a token's value that is left, with the same query and key at every token",
    ]
    for recurrent in recurrents:
        try:
            shares = _shares_left(recurrent, n_q, case, width)
        except AttncError as error:
            shares = None
            notes.append(f"`{recurrent.recur.name}` is not drawn: {str(error).splitlines()[0]}")
        views.append(_state_view(recurrent, shares, n_q))
    return BranchesDrawing(attention.name, subtitle_of(attention.bound, case), n_q, n_k, tuple(views), tuple(notes))


def _recurrents(pattern: Pattern) -> list[PatternRecurrence]:
    """Return the recurrence, or the branches with a state."""
    if pattern.recur is not None:
        return [PatternRecurrence(pattern, pattern.recur, strict=False)]
    return [PatternRecurrence(stateful_alone(pattern, recur), recur, strict=False) for recur in pattern.stateful]


def _masks(
    attention: PatternAnalysis, attentions: PatternAttentions, n: int, case: DrawnHead, width: int
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Yield each branch whose keys are tokens, with its relation (queries, keys), of the first batch entry."""
    inputs = dict(case.inputs)
    if attention.pattern.selections:
        q, k = inputs.pop("q"), inputs.pop("k")
        inputs |= attention._compiled.chosen(q, k, k, **inputs)
    sizes = TensorSizes(n, n, 1, case.heads, case.heads, width, width, "float32")
    for node, relations in attentions.relations(sizes, inputs):
        if node.keys is None:
            yield node.name, relations.mask(0, case.head, 0, n, 0, n)


def _branch_view(name: str, mask: NDArray[np.bool_]) -> BranchView:
    """Return the view of a branch with keys."""
    cell = coarsening(max(mask.shape), SQUARES)
    shares = means(mask.astype(np.int64), cell)
    rows = mask.sum(1)
    visible, total = int(mask.sum()), mask.size
    smallest, largest = int(rows.min(initial=mask.shape[1])), int(rows.max(initial=0))
    counts = f"{smallest:,}" if smallest == largest else f"{smallest:,} – {largest:,}"
    words = (f"{percent(visible / max(total, 1))} visible: {visible:,} of {total:,} pairs", f"{counts} keys per row")
    return BranchView(name, shares, cell, words, visible)


def _state_view(recurrent: PatternRecurrence, shares: Shares | None, n: int) -> BranchView:
    """Return the view of a state: the share left of tokens, when half of it is gone, and the derivation."""
    member = "" if recurrent.recur.member is None else f"[{recurrent.recur.member}]"
    cell = -(-n // TRIED)
    left = () if shares is None else _by_distance(shares)
    words = [] if shares is None else [_half_text(left, cell)]
    words += ["derivation:", *recurrent.derivation.splitlines()]
    return BranchView(f"{recurrent.recur.name}{member}", shares, cell, tuple(words), None, left)


def _shares_left(recurrent: PatternRecurrence, n: int, case: DrawnHead, width: int) -> Shares:
    """Measure how much of the value of every `cell`-th token reaches each query, as a share of the largest.

    One batch entry has the original values; in each of the others the value of a single token is changed.
    """
    cell = -(-n // TRIED)
    tokens = torch.arange(0, n, cell)
    count = len(tokens) + 1
    shape = (count, case.heads, n, width)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn((1, *shape[1:]), generator=generator, dtype=torch.float64).repeat(count, 1, 1, 1)
    v[torch.arange(1, count), :, tokens] += CHANGE
    # The entries differ, because a state that is normalised along its rows keeps nothing of a key with equal entries.
    vector = 0.5 + torch.rand(width, generator=generator, dtype=torch.float64)
    repeated = (vector / vector.norm()).expand(shape)
    inputs = {t.name: case.inputs[t.name] for t in recurrent.pattern.tensors if t.name in case.inputs}
    for t in recurrent.pattern.tensors:
        if t.name in inputs and t.dims[:1] == ("batch",):
            x = inputs[t.name][:1]
            inputs[t.name] = x.expand(count, *x.shape[1:])
    with torch.no_grad():
        tensors = input_tensors(recurrent.pattern, inputs)
        out, _ = recurrent.attend(repeated, repeated, v, inputs, tensors, None)
    change = (out[1:, case.head] - out[:1, case.head]).norm(dim=-1).T.numpy() / CHANGE
    rows = np.add.reduceat(change, np.arange(0, n, cell), axis=0) / extents(n, cell)[:, None]
    largest = float(rows.max(initial=0.0))
    # Rounding leaves tiny values of tokens that a query does not see; they count as 0.
    shares: Shares = np.where(rows > largest * 1e-6, rows / largest if largest else rows, 0.0)
    return shares


def _by_distance(shares: Shares) -> tuple[float, ...]:
    """Return the mean share left at each distance, relative to the largest mean, in the state's direction."""
    square = len(shares)
    means = [max(float(np.diagonal(shares, direction * d).mean()) for direction in (1, -1)) for d in range(square)]
    largest = max(means, default=0.0)
    return tuple(mean / largest if largest else 0.0 for mean in means)


def _half_text(left: tuple[float, ...], cell: int) -> str:
    peak = max(range(len(left)), key=left.__getitem__, default=0)
    if not left or not left[peak]:
        return "no query gets any part of another token's value"
    gone = next((d for d in range(peak, len(left)) if left[d] < HALF), None)
    if gone is None:
        return f"more than half of a token's value is left after {(len(left) - 1) * cell:,} tokens"
    tokens = "1 token" if gone * cell == 1 else f"{gone * cell:,} tokens"
    return f"less than half of a token's value is left after {tokens}"
