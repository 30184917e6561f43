"""Scans against token loops: states, reads by stretch, gradients, resets, errors of fp32, running maxima and sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError, UnsupportedError
from attnc.runtime.executors.recurrent import prefixes, stretch_scan
from attnc.runtime.executors.recurrent.monoids import running_log_sum, running_max
from attnc.runtime.executors.recurrent.stretch_scan import StretchStates, scan_stretches
from linear_scans import linear_scan
from recurrence_cases import error

pytestmark = pytest.mark.usefixtures("one_thread")

TIGHT = 1e-12
LENGTHS = [0, 1, 63, 64, 65, 100, 257]
DTYPES = {"real": torch.float64, "complex": torch.complex128}
# Shapes of decays that are equal along some axes: batch, heads, tokens, two axes of the state.
BROADCASTS = [(2, 3, 0, 4, 5), (2, 3, 1, 4, 5), (1, 1, 1, 4, 5), (2, 1, 0, 1, 1), (1, 3, 0, 4, 1), (2, 3, 0, 1, 5)]
Pair = tuple[Tensor, Tensor]


@pytest.fixture(params=["token by token", "in chunks"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "LARGE", 0 if request.param == "token by token" else 1 << 30)


def truth(decay: Tensor, write: Tensor, state: Tensor, resets: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the states before each token, after each token, and the last state, computed token by token."""
    tokens = write.shape[2] if decay.shape[2] == 1 else decay.shape[2]
    befores, afters, current = [], [], state
    for t in range(tokens):
        if resets is not None:
            reset_at = resets[:, None, t] if resets.ndim == 2 else resets[:, :, t]
            current = torch.where(reset_at.reshape(*reset_at.shape, *(1,) * (state.ndim - 2)), 0, current)
        befores.append(current)
        current = decay[:, :, min(t, decay.shape[2] - 1)] * current + write[:, :, min(t, write.shape[2] - 1)]
        afters.append(current)
    if not tokens:
        empty = state[:, :, None][:, :, :0]
        return empty, empty, state
    return torch.stack(befores, 2), torch.stack(afters, 2), current


def draw_case(
    tokens: int, kind: str = "real", decay_shape: Sequence[int] = (2, 3, 0, 4, 5), shape: Sequence[int] = (4, 5)
) -> list[Tensor]:
    """Draw (decay, write, state) with B 2, H 3; a 0 in the decay's shape means all tokens. |decay| ≤ 1, some 0."""
    draw = torch.Generator().manual_seed(tokens)
    sizes = [tokens if size == 0 else size for size in decay_shape]

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=draw, dtype=DTYPES[kind])

    decay = normal(*sizes)
    decay = decay / decay.abs() * torch.rand(sizes, generator=draw, dtype=torch.float64).pow(0.2)
    decay = torch.where(torch.rand(sizes, generator=draw) < 0.02, 0, decay)
    return [decay, normal(2, 3, tokens, *shape), normal(2, 3, *shape)]


def draw_resets(tokens: int, heads: bool = False) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.rand((2, 3, tokens) if heads else (2, tokens), generator=draw) < 0.05


def leaves(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]


def gradients(results: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of all results under fixed weights."""
    draw = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=draw, dtype=torch.complex128).to(x.device) for x in results]
    weights_by_result = [(w if x.is_complex() else w.real).to(x.dtype) for w, x in zip(weights, results, strict=True)]
    pairs = [(x, w) for x, w in zip(results, weights_by_result, strict=True) if x.requires_grad]
    grads = torch.autograd.grad(
        [x for x, _ in pairs], list(tensors), [w for _, w in pairs], allow_unused=True, materialize_grads=True
    )
    return list(grads)


def assert_close(ours: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = TIGHT) -> None:
    """Check shape, dtype, and an error of at most `tolerance` times the largest entry."""
    for actual, reference in zip(ours, expected, strict=True):
        assert (actual.shape, actual.dtype) == (reference.shape, reference.dtype)
        if actual.numel():
            off, largest = ((actual - reference).detach().abs().max(), reference.detach().abs().max())
            assert off <= tolerance * largest.clamp(min=1e-30)


def assert_scans(case: Sequence[Tensor], resets: Tensor | None = None) -> None:
    ours, theirs = leaves(case), leaves(case)
    mine = linear_scan(*ours[:2], state=ours[2], resets=resets)
    other = truth(theirs[0], theirs[1], theirs[2], resets)[1:]
    assert_close(mine, other)
    assert_close(gradients(mine, ours), gradients(other, theirs))


# --- linear_scan ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_lengths(tokens: int, kind: str) -> None:
    assert_scans(draw_case(tokens, kind))


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("axes", BROADCASTS)
def test_broadcast_decays(axes: tuple[int, ...], kind: str) -> None:
    assert_scans(draw_case(100, kind, axes))
    assert_scans(draw_case(100, kind, axes), draw_resets(100))


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_resets(tokens: int, heads: bool, kind: str) -> None:
    assert_scans(draw_case(tokens, kind), draw_resets(tokens, heads))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 2)])
def test_any_state(shape: tuple[int, ...]) -> None:
    assert_scans(draw_case(130, "real", (2, 3, 0, *shape), shape), draw_resets(130))


def test_broadcast_writes() -> None:
    decay, write, state = draw_case(70)
    assert_scans([decay, write[:1, :, :1, :, :1], state])
    assert_scans([decay[:, :, :1], write[:, :1, :, :1], state])


def test_an_expanded_decay() -> None:
    """A decay that is equal at all tokens may be expanded instead of having a size of 1."""
    decay, write, state = draw_case(70, "complex", (2, 3, 1, 4, 5))
    assert_scans([decay.expand_as(write), write, state])


@pytest.mark.parametrize("kind", DTYPES)
def test_stretches(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stretches of 11 tokens, the last one shorter; some begin at a reset."""
    case, resets = draw_case(135, kind), draw_resets(135)
    resets[:, 22] = True
    monkeypatch.setattr(stretch_scan, "OF_VECTORS", 1)
    monkeypatch.setattr(stretch_scan, "STRETCH", 11 * case[2].numel() * case[2].element_size())
    assert_scans(case, resets)
    assert_scans(case)


def test_real_decays_and_writes_of_a_complex_state() -> None:
    decay, write, _ = draw_case(80)
    state = draw_case(80, "complex")[2]
    ours, theirs = leaves([decay, write, state]), leaves([decay, write, state])
    mine, other = linear_scan(*ours[:2], state=ours[2]), truth(*theirs)[1:]
    assert_close(mine, other)
    assert_close(gradients(mine, ours), gradients(other, theirs))


@pytest.mark.parametrize("size", [1.0, 1.5, 30.0])
def test_decays_above_1(size: float) -> None:
    """Growing decays are not computed in chunks: a product of decays would overflow or be mere rounding error."""
    decay, write, state = draw_case(150)
    assert_scans([decay.sign() * size, write, state])
    fixed = linear_scan(torch.full_like(write, 2), torch.full_like(write, -1), state=torch.ones_like(state))[0]
    assert torch.equal(fixed, torch.ones_like(fixed))


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_reset_removes_nan_and_infinity(bad: float) -> None:
    """After a reset no NaN or infinity of the state remains, neither in states nor in gradients."""
    decay, write, state = draw_case(150)
    resets = torch.zeros(2, 150, dtype=torch.bool)
    resets[:, 0], resets[:, 77] = True, True
    spoiled = torch.full_like(state, bad)
    write = write.clone()
    write[:, :, 76] = bad
    ours, theirs = leaves([decay, write, spoiled]), leaves([decay, write, torch.zeros_like(state)])
    results = linear_scan(*ours[:2], state=ours[2], resets=resets)
    expected = truth(theirs[0], theirs[1], theirs[2], resets)[1:]
    assert_close([results[0][:, :, 77:], results[1]], [expected[0][:, :, 77:], expected[1]])
    assert_close([results[0][:, :, :76]], [expected[0][:, :, :76]])
    mine, other = gradients([results[0][:, :, 77:]], ours), gradients([expected[0][:, :, 77:]], theirs)
    assert_close(mine, other)
    assert not mine[2].any()


def test_no_gradient_passes_a_decay_of_0() -> None:
    """Gradients of tokens and states before a decay of 0 are exactly 0."""
    decay, write, state = draw_case(90)
    decay[:, :, 40] = 0
    ours = leaves([decay, write, state])
    after = linear_scan(*ours[:2], state=ours[2])[0]
    grads = torch.autograd.grad(after[:, :, 40:].sum(), ours)
    assert not grads[0][:, :, :40].any()
    assert not grads[1][:, :, :40].any()
    assert not grads[2].any()


@pytest.mark.parametrize("kind", DTYPES)
def test_gradcheck(kind: str) -> None:
    decay, write, state = draw_case(5, kind, (1, 1, 0, 2), (2,))
    resets = torch.zeros(2, 5, dtype=torch.bool)
    resets[1, 3] = True
    case = leaves([decay, write, state])
    assert torch.autograd.gradcheck(lambda a, b, s: linear_scan(a, b, state=s, resets=resets), case)


NARROW = {torch.float64: torch.float32, torch.complex128: torch.complex64}


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("axes", [(2, 3, 0, 4, 5), (2, 3, 1, 4, 5)])
def test_errors_of_fp32(axes: tuple[int, ...], kind: str) -> None:
    case = [x.to(NARROW[x.dtype]) for x in draw_case(257, kind, axes)]
    ours, theirs = leaves(case), leaves(case, DTYPES[kind])
    mine, other = linear_scan(*ours[:2], state=ours[2]), truth(*theirs)[1:]
    for x, y in zip([*mine, *gradients(mine, ours)], [*other, *gradients(other, theirs)], strict=True):
        assert (x - y).detach().abs().max() <= (6e-7 if axes[2] == 0 else 2e-6) * y.detach().abs().max()


def test_a_slow_constant_decay_does_not_drift() -> None:
    """A decay that all tokens share would err alike in every chunk, so its power is rounded once."""
    draw = torch.Generator().manual_seed(0)
    decay = torch.exp(-0.001 * torch.rand(1, 2, 1, 16, generator=draw))
    write = torch.randn(1, 2, 4000, 16, generator=draw)
    state = torch.zeros(1, 2, 16)
    ours, theirs = leaves([decay, write]), leaves([decay, write], torch.float64)
    mine = linear_scan(*ours, state=state)
    other = linear_scan(*theirs, state=state.double())
    for x, y in zip([*mine, *gradients(mine, ours)], [*other, *gradients(other, theirs)], strict=True):
        assert error(x, y) < 1.2e-6


def test_16_bits() -> None:
    """Inputs have 16 bits, states the state's dtype, gradients the inputs' dtypes."""
    decay, write, state = draw_case(70, "real", (2, 3, 1, 4, 5))
    ours = [*leaves([decay, write], torch.bfloat16), *leaves([state], torch.float32)]
    theirs = leaves(ours, torch.float64)
    mine, other = linear_scan(*ours[:2], state=ours[2]), truth(*theirs)[1:]
    assert [x.dtype for x in mine] == [torch.float32] * 2
    assert max(error(x, y) for x, y in zip(mine, other, strict=True)) < 1e-6
    for x, y, leaf in zip(gradients(mine, ours), gradients(other, theirs), ours, strict=True):
        assert x.dtype == leaf.dtype
        assert error(x, y) < 2**-7


def test_same_bits() -> None:
    case = leaves([x.float() for x in draw_case(200)])
    runs = []
    for _ in range(2):
        results = linear_scan(*case[:2], state=case[2])
        runs.append([*results, *gradients(results, case)])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_no_batch_and_no_heads() -> None:
    for lead in ((0, 2), (2, 0)):
        x = torch.zeros(*lead, 40, 4)
        out, state = linear_scan(x, x, state=x[:, :, 0])
        assert (out.shape, state.shape) == (x.shape, (*lead, 4))


# --- scan_stretches ---------------------------------------------------------------------------------------------------


def selective(tokens: int) -> list[Tensor]:
    """Draw q, k, v, dt, A and the state of a Mamba with dk 3 and dv 4."""
    draw = torch.Generator().manual_seed(tokens)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=draw, dtype=torch.float64)

    q, k, v = normal(2, 3, tokens, 3), normal(2, 3, tokens, 3), normal(2, 3, tokens, 4)
    dt = torch.nn.functional.softplus(normal(2, 1, tokens, 4))
    return [q, k, v, dt, -normal(1, 3, 1, 3, 4).exp(), normal(2, 3, 3, 4)]


def make(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, rate: Tensor) -> Pair:
    return torch.exp(dt[..., None, :] * rate), k[..., :, None] * (dt * v)[..., None, :]


def read_after(states: StretchStates, q: Tensor, *_: Tensor) -> list[Tensor]:
    return [(q[..., None, :] @ states.after).squeeze(-2)]


def read_both(states: StretchStates, q: Tensor, k: Tensor, v: Tensor, dt: Tensor, rate: Tensor) -> list[Tensor]:
    """Return reads before the step with a bonus, squares after it, and a read that depends on no state."""
    before = (q[..., None, :] @ states.before).squeeze(-2) + (q * k).sum(-1, keepdim=True) * v
    return [before, (states.after.square() * rate).sum((-1, -2)), dt.exp()]


READS: dict[str, Callable[..., list[Tensor]]] = {"after": read_after, "both": read_both}


def selective_truth(read: Callable[..., list[Tensor]], case: Sequence[Tensor], resets: Tensor | None) -> list[Tensor]:
    *tensors, state = case
    before, after, final = truth(*make(*tensors), state, resets)
    states = StretchStates(after, state, None)
    states.taken = before
    return [*(x.expand(2, 3, *x.shape[2:]) for x in read(states, *tensors)), final]


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("length", [None, 1, 7])
@pytest.mark.parametrize("tokens", [0, 1, 64, 100])
def test_reads(tokens: int, length: int | None, name: str) -> None:
    for resets in (None, draw_resets(tokens)):
        ours, theirs = leaves(selective(tokens)), leaves(selective(tokens))
        out, final = scan_stretches(
            make, READS[name], ours[:5], tokens=tokens, state=ours[5], resets=resets, length=length
        )
        other = selective_truth(READS[name], theirs, resets)
        assert_close([*out, final], other)
        assert_close(gradients([*out, final], ours), gradients(other, theirs))


def test_gradients_of_some_inputs() -> None:
    """Decays may depend on nothing that requires a gradient; only some results may have a gradient."""
    for wanted in range(6):
        case, theirs = selective(30), selective(30)
        case[wanted].requires_grad_()
        theirs[wanted].requires_grad_()
        out, final = scan_stretches(make, read_both, case[:5], tokens=30, state=case[5], length=8)
        other = selective_truth(read_both, theirs, None)
        mine = gradients([*out[:2], final], case[wanted : wanted + 1])
        assert_close(mine, gradients([*other[:2], other[3]], theirs[wanted : wanted + 1]))


def test_integer_inputs() -> None:
    """Integer inputs are cut into stretches like other inputs."""
    place = torch.arange(50)[None, None, :, None]
    write = draw_case(50, "real", shape=(4,))[1].requires_grad_()
    start = torch.zeros(2, 3, 4, dtype=torch.float64)

    def steps(place: Tensor, write: Tensor) -> Pair:
        return 1 / (place + 2.0).double(), write

    (out,), _ = scan_stretches(steps, None, [place, write], tokens=50, state=start, length=9)
    again = write.detach().requires_grad_()
    expected = truth(1 / (place + 2.0).double(), again, start)[1]
    assert_close([out], [expected])
    assert_close(gradients([out], [write]), gradients([expected], [again]))


def test_no_reads() -> None:
    """A scan without reads has no outputs, but a final state."""
    case = leaves(selective(40))
    out, final = scan_stretches(make, lambda *_: [], case[:5], tokens=40, state=case[5], length=16)
    assert list(out) == []
    other = leaves(selective(40))
    expected = selective_truth(read_after, other, None)[1]
    assert_close([final], [expected])
    assert_close(gradients([final], case), gradients([expected], other))


def test_memory_is_limited_to_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is as large as the states of all tokens, and few states are kept."""
    case = leaves([x.float() for x in selective(4096)])
    largest = 0

    class Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                largest = max(largest, x.numel() if isinstance(x, Tensor) else 0)
            return result

    monkeypatch.setattr(stretch_scan, "STRETCH", 1)
    with Sizes():  # type: ignore[no-untyped-call]
        (out,), _ = scan_stretches(make, read_after, case[:5], tokens=4096, state=case[5])
        torch.autograd.grad(out.sum(), case)
    assert largest <= 2 * 2 * 3 * 4096 * 4


# --- errors -----------------------------------------------------------------------------------------------------------

X = torch.zeros(2, 3, 8, 4)
REFUSED: dict[str, dict[str, Any]] = {
    "decay: expected a shape": {"decay": X[..., :3]},
    "write: expected a shape": {"write": X[:, :, :7]},
    "decay is complex": {"decay": X.to(torch.complex64)},
    "state: expected fp32": {"state": X[:, :, 0].bfloat16()},
    "resets: expected shape": {"resets": torch.zeros(2, 7, dtype=torch.bool)},
    "resets: expected bool": {"resets": torch.zeros(2, 8)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message: str) -> None:
    arguments: dict[str, Any] = {"decay": X, "write": X, "state": X[:, :, 0]}
    with pytest.raises((ArgumentError, ArgumentTypeError), match=message):
        linear_scan(**(arguments | REFUSED[message]))


def test_length_and_state_refused() -> None:
    for option, message in (({"length": 0}, "length must be at least 1"), ({"state": X[0, 0, 0]}, "state: ")):
        arguments: dict[str, Any] = {"state": X[:, :, 0], **option}
        with pytest.raises(ArgumentError, match=message):
            scan_stretches(lambda x: (x, x), None, [X], tokens=8, **arguments)


def test_functional_gradient() -> None:
    decay, write, state = draw_case(40)
    ours = torch.func.grad(lambda a: linear_scan(a, write, state=state)[0].square().sum())(decay)
    theirs = torch.func.grad(lambda a: truth(a, write, state)[1].square().sum())(decay)
    assert error(ours, theirs) < TIGHT
    *tensors, rate, start = selective(40)

    def total(rate: Tensor) -> Tensor:
        (out,), _ = scan_stretches(make, read_after, [*tensors, rate], tokens=40, state=start, length=16)
        return out.square().sum()

    again = leaves([rate])[0]
    (expected,) = torch.autograd.grad(
        selective_truth(read_after, [*tensors, again, start], None)[0].square().sum(), again
    )
    assert error(torch.func.grad(total)(rate), expected) < TIGHT


def test_second_derivatives_refused() -> None:
    case = leaves(draw_case(20))
    (first,) = torch.autograd.grad(linear_scan(*case[:2], state=case[2])[0].square().sum(), case[0], create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivatives"):
        torch.autograd.grad(first.sum(), case[0])


def test_vmap_and_forward_mode_refused() -> None:
    decay, write, state = draw_case(5)
    with pytest.raises(UnsupportedError, match="vmap"):
        torch.vmap(lambda a: linear_scan(a, write, state=state)[0])(torch.stack([decay] * 2))
    with pytest.raises(UnsupportedError, match="forward-mode"):
        torch.func.jvp(lambda a: linear_scan(a, write, state=state)[0], (decay,), (decay,))


# --- running maxima and log-sums --------------------------------------------------------------------------------------

JOINED = {"max": torch.maximum, "log sum": torch.logaddexp}
RUNNING: dict[str, Callable[..., Tensor]] = {"max": running_max, "log sum": running_log_sum}


def running_truth(name: str, x: Tensor, state: Tensor, resets: Tensor | None) -> Tensor:
    states, current = [], state
    for t in range(x.shape[2]):
        if resets is not None:
            current = torch.where(resets[:, None, t, None], -torch.inf, current)
        current = JOINED[name](current, x[:, :, t])
        states.append(current)
    return torch.stack(states, 2) if states else x


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("name", RUNNING)
@pytest.mark.parametrize("stretch", [1, stretch_scan.STRETCH])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_running(name: str, stretch: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stretch_scan, "STRETCH", stretch)
    draw = torch.Generator().manual_seed(tokens)
    case = [torch.randn(2, 3, tokens, 5, generator=draw).double() * 4, torch.randn(2, 3, 5, generator=draw).double()]
    for resets in (None, draw_resets(tokens)):
        ours, theirs = leaves(case), leaves(case)
        mine, other = RUNNING[name](ours[0], ours[1], resets), running_truth(name, theirs[0], theirs[1], resets)
        assert_close([mine], [other])
        assert_close([RUNNING[name](*case, resets)], [other])
        assert_close(gradients([mine], ours), gradients([other], theirs))


@pytest.mark.parametrize("name", RUNNING)
def test_running_from_minus_infinity(name: str) -> None:
    """The state is -inf, and so are the first tokens, tokens after a reset, and one entry; no gradient is NaN."""
    x = torch.randn(2, 3, 100, 5, generator=torch.Generator().manual_seed(0)).double()
    x[:, :, :3], x[:, :, 50:53], x[..., 2] = -torch.inf, -torch.inf, -torch.inf
    resets = torch.zeros(2, 100, dtype=torch.bool)
    resets[1, 50] = True
    state = torch.full((2, 3, 5), -torch.inf, dtype=torch.float64)
    ours = leaves([x, state])
    result = RUNNING[name](ours[0], ours[1], resets)
    expected = running_truth(name, x, state, resets)
    assert torch.equal(result.isinf(), expected.isinf())
    assert error(result.nan_to_num(neginf=0), expected.nan_to_num(neginf=0)) < TIGHT
    for grad in torch.autograd.grad(result.sum(), ours):
        assert grad.isfinite().all()


def test_running_log_sum_of_large_numbers() -> None:
    """In fp32 with rises and falls in the thousands, then with inf and a reset after it."""
    x = torch.randn(1, 1, 400, 8, generator=torch.Generator().manual_seed(0)) * 2000
    state = torch.full((1, 1, 8), -torch.inf)
    expected = running_truth("log sum", x.double(), state.double(), None)
    assert error(running_log_sum(x, state), expected) < 2e-7
    x[:, :, 100] = torch.inf
    resets = torch.zeros(1, 400, dtype=torch.bool)
    resets[:, 200] = True
    result = running_log_sum(x, state, resets)
    assert (result[:, :, 100:200] == torch.inf).all()
    assert error(result[:, :, 200:], running_truth("log sum", x[:, :, 200:].double(), state.double(), None)) < 2e-7


@pytest.mark.parametrize("name", RUNNING)
def test_running_gradcheck(name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    case = leaves([torch.randn(2, 1, 6, 2, generator=draw).double(), torch.randn(2, 1, 2, generator=draw).double()])
    resets = torch.zeros(2, 6, dtype=torch.bool)
    resets[1, 4] = True
    assert torch.autograd.gradcheck(lambda x, state: RUNNING[name](x, state, resets), case)


def test_running_max_keeps_nan() -> None:
    x, state = torch.zeros(1, 1, 80, 1), torch.zeros(1, 1, 1)
    x[:, :, 10] = torch.nan
    resets = torch.zeros(1, 80, dtype=torch.bool)
    resets[:, 60] = True
    assert torch.equal(running_max(x, state, resets).isnan().flatten().nonzero().flatten(), torch.arange(10, 60))


def test_running_refused() -> None:
    x, state = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 4)
    for option, message in (
        ((x, state[..., :2]), "state"),
        ((x, state.double()), "both fp32"),
        ((x, state, torch.zeros(1, 2, dtype=torch.bool)), "resets: "),
        ((x, state, torch.zeros(1, 3)), "resets: expected bool"),
    ):
        with pytest.raises((ArgumentError, ArgumentTypeError), match=message):
            running_log_sum(*option)


def test_running_second_derivatives_refused() -> None:
    x, state = leaves([torch.zeros(1, 1, 5, 2), torch.zeros(1, 1, 2)])
    (first,) = torch.autograd.grad(running_log_sum(x, state).sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivatives"):
        torch.autograd.grad(first.sum(), x)
    once = torch.func.grad(lambda x: running_log_sum(x, state).sum())(x.detach())
    assert torch.equal(once, first)
