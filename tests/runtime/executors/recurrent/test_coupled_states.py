"""Chunked computation of states that read each other, against the token loop: results, states, gradients, any split."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import Attention, UnsupportedError, compile_attention
from attnc.compiler.recurrences.derived import Coupled
from attnc.runtime.executors.recurrent import chunk_layout, coupled_chunks
from attnc.runtime.executors.recurrent.coupled_chunks import weights

pytestmark = pytest.mark.usefixtures("one_thread")

INPUTS = """
    input a: unit[batch, token, head]
    input h: unit[batch, token, head]
    input f: real[batch, token, head]
    input w: real[batch, token, head, dk]
"""
LINES: dict[str, str] = {
    "momentum": "step P = h * P + outer(k, v)\nstep M = a * M + P\nread q @ M",
    "slopes": "step P = h * P - f * outer(k, k @ M - v)\nstep M = (1 - a) * M + P\nread q @ M",
    "slopes at times": """step N = M if t % 5 == 0 else N
        step P = h * P - 2 * f * outer(k, k @ N - v)
        step M = (1 - a) * M + P
        read q @ M""",
    "three": """step M = a * M - f * N + outer(k, v)
        step N = N - 0.3 * M - outer(f * k, w @ P - h * v)
        step P = M - N / 2 + f * outer(w, v)
        read q @ P + f * (w @ M)""",
    "read before and between": """let early = q @ M + w @ P
        step P = h * P + outer(k, v)
        let between = q @ M - k @ P
        step M = a * M + P - outer(k, w @ P)
        step P = f * P - outer(w, k @ M)
        read early * between + q @ P""",
    "two impulses": """step M = a * M + outer(k, v) + outer(w, v - k @ P)
        step P = P + h * outer(k, v - w @ M)
        read q @ P""",
    "reads of both": "step P = h * P + outer(k, v - f * (k @ M) + a * (w @ P))\nstep M = a * M + P\nread q @ M",
    "of no vectors": "step P = h * P + f\nstep M = a * M + P + w - outer(k, v)\nread q @ M",
    "unread": "step P = h * P + outer(k, v - w @ M)\nstep M = a * M + P\nread v",
    "one": "step M = M + h * outer(k, v - k @ M)\nstep M = f * M\nread q @ M",
}
OF_VECTORS: dict[str, str] = {
    "turning": """step x = a * x - h * y + f * k
        step y = h * x + a * y
        read dot(q, x) * v + dot(w, y)""",
    "corrected": """step x = a * x + (f - dot(k, y)) * k
        step y = h * y + x
        read dot(q, y) * v""",
}
STATES = {"M": "[dk, dv]", "N": "[dk, dv]", "P": "[dk, dv]", "x": "[dk]", "y": "[dk]"}
NAMES = [*LINES, *OF_VECTORS]


def text(name: str, *more: str) -> str:
    lines = (LINES | OF_VECTORS)[name]
    used = [state for state in STATES if f"step {state} " in lines]
    states = [f"state {state}: {STATES[state]}" for state in used]
    body = [*more, *states, *(line.strip() for line in lines.splitlines())]
    return f"recurrence r{INPUTS}" + "".join(f"    {line}\n" for line in body)


class Call:
    """The tensors of a call, drawn in fp64."""

    def __init__(self, tokens: int, *, batch: int = 2, heads: int = 3, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        def unit(x: Tensor) -> Tensor:
            return torch.nn.functional.normalize(x, dim=-1)

        lead = (batch, heads, tokens)
        self.q, self.k, self.v = normal(*lead, 6), unit(normal(*lead, 6)), normal(*lead, 4)
        numbers = (batch, tokens, heads)
        self.inputs: dict[str, Any] = {"a": normal(*numbers).sigmoid(), "h": normal(*numbers).sigmoid()}
        self.inputs |= {"f": 0.4 * normal(*numbers).tanh(), "w": 0.4 * unit(normal(*numbers, 6))}
        self.states = {name: normal(batch, heads, *(6, 4)[: dims.count("d")]) for name, dims in STATES.items()}

    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.v, *(x for x in self.inputs.values() if x.is_floating_point())]

    def run(self, attend: Attention, *, state: bool | dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Run from this call's own states (True), from the default states (False), or from the states passed."""
        options: dict[str, Any] = {}
        if state:
            begun = attend.init_state(self.q.shape[0], self.q.shape[1], 6, 4, dtype=torch.float64)
            begun_states = {name: x for name, x in self.states.items() if name in begun}
            options["state"] = {**begun, **begun_states} if state is True else state
        return attend(self.q, self.k, self.v, return_state=True, **self.inputs, **options)

    def results(self, attend: Attention, *, state: bool = True) -> list[Tensor]:
        """Return the output, the last states, and the gradients of everything through all of these."""
        wanted = [*self.leaves(), *(self.states.values() if state else ())]
        for x in wanted:
            x.requires_grad_()
        out, last = self.run(attend, state=state)
        results = [out, *(x for x in last.values() if x.is_floating_point())]
        total = torch.zeros((), dtype=torch.float64)
        draw = torch.Generator().manual_seed(1)
        for x in results:
            total = total + (x * torch.randn(x.shape, generator=draw, dtype=torch.float64)).sum()
        if not total.requires_grad:
            return results
        return [*results, *torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)]


def compiled_and_reference(spec: str) -> tuple[Attention, Attention]:
    ours, theirs = (compile_attention(spec, backend=backend) for backend in ("auto", "reference"))
    recurrent = ours._core.parts.recurrence
    assert recurrent is not None and recurrent.derived is not None
    assert any(isinstance(stage, Coupled) for stage in recurrent.derived.stages)
    return ours, theirs


def assert_close(ours: list[Tensor], expected: list[Tensor], tolerance: float = 1e-11) -> None:
    for mine, reference in zip(ours, expected, strict=True):
        assert mine.shape == reference.shape
        size = max(float(reference.detach().abs().max()), 1.0) if reference.numel() else 1.0
        torch.testing.assert_close(mine, reference, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 100, 257])
@pytest.mark.parametrize("name", NAMES)
def test_lengths(name: str, tokens: int) -> None:
    call = Call(tokens, batch=1, heads=2)
    ours, theirs = compiled_and_reference(text(name))
    assert_close(call.results(ours), call.results(theirs))


@pytest.mark.parametrize("name", NAMES)
def test_several_stretches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call(150)
    ours, theirs = compiled_and_reference(text(name))
    monkeypatch.setattr(chunk_layout, "STRETCH", 1)
    assert_close(call.results(ours, state=False), call.results(theirs, state=False))


@pytest.mark.parametrize("lines", [("input fresh: bool[batch, token]", "reset fresh"), ("reset t % 31 == 3",)])
@pytest.mark.parametrize("name", NAMES)
def test_resets(name: str, lines: tuple[str, ...]) -> None:
    """Resets occur in any state and inside chunks; a reset by an input concerns a single batch entry."""
    call = Call(140)
    if len(lines) == 2:
        call.inputs["fresh"] = torch.zeros(2, 140, dtype=torch.bool)
        call.inputs["fresh"][1, [0, 1, 64, 77]] = True
    ours, theirs = compiled_and_reference(text(name, *lines))
    assert_close(call.results(ours), call.results(theirs))


@pytest.mark.parametrize("order", ["-t", "t if head % 2 == 0 else -t"])
@pytest.mark.parametrize("name", ["slopes", "read before and between", "turning"])
def test_scan_orders(name: str, order: str) -> None:
    call = Call(70)
    call.inputs["fresh"] = torch.arange(70).expand(2, -1) % 17 == 2
    ours, theirs = compiled_and_reference(text(name, "input fresh: bool[batch, token]", "reset fresh", f"scan {order}"))
    assert_close(call.results(ours, state=False), call.results(theirs, state=False))


@pytest.mark.parametrize("name", ["slopes at times", "two impulses", "corrected"])
def test_documents(name: str) -> None:
    call = Call(90)
    call.inputs["doc"] = torch.stack([torch.arange(90) // 40, (torch.arange(90) > 63).long()])
    ours, theirs = compiled_and_reference(text(name, "input doc: int[batch, token]", "documents doc"))
    assert_close(call.results(ours, state=False), call.results(theirs, state=False))


def test_positions_differ_between_batch_entries() -> None:
    """Chunks do not begin where the pattern counts from; that position differs between batch entries."""
    call = Call(140)
    attends = compiled_and_reference(text("slopes at times"))
    states = {name: call.states[name] for name in ("M", "N", "P")}
    state = {**states, "t": torch.tensor([3, 61])}
    (out, last), (want, after) = (call.run(attend, state=state) for attend in attends)
    assert_close([out, *last.values()], [want, *after.values()], 1e-12)


@pytest.mark.parametrize("cuts", [(1, 2, 64), (7, 71), (64, 128)])
@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_split_into_calls(name: str, cuts: tuple[int, ...]) -> None:
    """Each call continues from the states of the call before, and gradients flow through these states."""
    call = Call(130)
    ours, _ = compiled_and_reference(text(name))
    expected, last = call.run(ours, state=True)
    state: bool | dict[str, Tensor] = True
    outs = []
    for low, high in itertools.pairwise((0, *cuts, 130)):
        part = Call(130)
        part.q, part.k, part.v = (x[:, :, low:high] for x in (call.q, call.k, call.v))
        part.inputs = {name_of_input: x[:, low:high] for name_of_input, x in call.inputs.items()}
        out, state = part.run(ours, state=state)
        outs.append(out)
    assert isinstance(state, dict)
    assert_close([torch.cat(outs, 2), *state.values()], [expected, *last.values()], 1e-12)


@pytest.mark.parametrize("name", ["momentum", "slopes", "slopes at times"])
def test_factors_of_0_and_1(name: str) -> None:
    """A factor that is 0 by its value, not by the pattern's text, has a gradient."""
    call = Call(80)
    for gate in ("a", "h", "f"):
        call.inputs[gate][:, 5:9], call.inputs[gate][:, 20], call.inputs[gate][0, 63:66] = 0, 1, 0
    ours, theirs = compiled_and_reference(text(name))
    assert_close(call.results(ours), call.results(theirs))
    closed = Call(70)
    closed.inputs |= {gate: torch.zeros_like(closed.inputs[gate]) for gate in ("a", "h", "f")}
    assert_close(closed.results(ours), closed.results(theirs))


GROWING = {
    "taken off": "step M = (4 + f) * M\nstep M = M - outer(k, 0.99 * (k @ M)) + f * outer(k, v)\nread q @ M",
    "growing": "step M = 3 * M + P\nstep P = M - 2 * P + outer(k, v)\nread q @ M",
    "a step": "step P = (900 if t % 20 == 19 else h) * P + outer(k, v)\nstep M = a * M - outer(k, w @ P)\nread q @ M",
}


@pytest.mark.parametrize("name", GROWING)
def test_growing_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Growing weights shorten chunks, so that corrections lose no digits, even if all keys are equal."""
    monkeypatch.setitem(LINES, name, GROWING[name])
    call = Call(90 if name == "taken off" else 30)
    if name == "taken off":
        call.k = torch.eye(6, dtype=torch.float64)[0].expand_as(call.k).clone()
        call.states["M"][:, :, 1:] = 0
    ours, theirs = compiled_and_reference(text(name))
    assert_close(call.results(ours), call.results(theirs), 1e-10)


def test_chunk_lengths_follow_the_size_of_weights() -> None:
    mixes = torch.tensor([[4.0, 1.0], [1.0, 0.0]], dtype=torch.float64).expand(64, 2, 2)
    assert weights(mixes, 1, 64)[1] == 64
    assert weights(mixes, 1, 64, 2.0**10)[1] == 4
    assert weights(mixes * torch.nan, 1, 64, 2.0**10)[1] == 64
    chunk_weights, _ = weights(mixes, 1, 4)
    powers = 4.0 ** torch.arange(4, dtype=torch.float64)
    assert torch.equal(chunk_weights.edges[0, :, 0], powers)
    assert torch.equal(chunk_weights.ends[0, 0], powers.flip(0))
    assert torch.equal(
        chunk_weights.pairs[0], torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [4, 1, 0, 0], [16, 4, 1, 0]]).double()
    )


def test_32_bits() -> None:
    call = Call(200)
    for name in NAMES:
        ours, theirs = compiled_and_reference(text(name))
        narrow = Call(200)
        narrow.q, narrow.k, narrow.v = (x.float() for x in (call.q, call.k, call.v))
        narrow.inputs = {gate: x.float() for gate, x in call.inputs.items()}
        with torch.no_grad():
            want, _ = theirs(call.q, call.k, call.v, return_state=True, **call.inputs)
            out, last = ours(narrow.q, narrow.k, narrow.v, return_state=True, **narrow.inputs)
        assert out.dtype == torch.float32
        assert {x.dtype for key, x in last.items() if key != "t"} == {torch.float32}
        assert_close([out.double()], [want], 2e-5)


def test_reads_at_the_start_of_a_chunk_solve_no_triangle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Titans reads its slopes at the first weights of each 64 tokens: chunks that begin there solve no triangle."""
    solved = []
    real_reach_of = coupled_chunks.reach_of

    def reach_of(*arguments: Any) -> coupled_chunks.CoupledReach:
        solved.append(real_reach_of(*arguments).solved)
        return real_reach_of(*arguments)

    monkeypatch.setattr("attnc.runtime.executors.recurrent.coupled_tokens.reach_of", reach_of)
    attend = compile_attention("titans_linear")
    call = Call(140)
    gates = {"rate": call.inputs["a"], "hold": call.inputs["h"], "forget": call.inputs["a"]}
    _, state = attend(call.q, call.k, call.v, return_state=True, **gates)
    attend.step(call.q, call.k, call.v, state, **gates)
    assert solved == [False, True]


def test_a_compiled_call() -> None:
    attend, _ = compiled_and_reference(text("reads of both"))
    call = Call(33)
    tensors = [x.requires_grad_() for x in call.leaves()]

    def loss(q: Tensor, k: Tensor, v: Tensor, a: Tensor, h: Tensor, f: Tensor, w: Tensor) -> Tensor:
        out: Tensor = attend(q * 0.5, k / 3, v, a=a, h=h, f=f, w=w)
        return out.sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, theirs = (torch.autograd.grad(f(*tensors), tensors) for f in (compiled, loss))
    assert_close(list(ours), list(theirs))
    torch._dynamo.reset()


def test_second_derivatives_raise() -> None:
    attend, _ = compiled_and_reference(text("momentum"))
    call = Call(10)
    call.k.requires_grad_()
    (slope,) = torch.autograd.grad(call.run(attend, state=False)[0].square().sum(), call.k, create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivatives"):
        torch.autograd.grad(slope.sum(), call.k)
