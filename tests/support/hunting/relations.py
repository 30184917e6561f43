"""Random integers and conditions of a query and a key."""

from __future__ import annotations

import torch
from torch import Tensor

from hunting.scene import Draft, Scene, Term, Value

AXES = ("z", "y", "x")


def condition(draft: Draft, depth: int = 2) -> Term:
    """Draw a condition of the pair."""
    if depth > 0 and draft.chance(0.55):
        return _joined(draft, depth)
    kinds = ["window", "window", "order", "compared", "periodic", "flags", "any", "ids"]
    return {
        "window": _window,
        "order": _order,
        "compared": _compared,
        "periodic": _periodic,
        "flags": _flags,
        "any": _any,
        "ids": _ids,
    }[draft.pick(*kinds)](draft)


def _joined(draft: Draft, depth: int) -> Term:
    a, b = condition(draft, depth - 1), condition(draft, depth - 1)
    kind = draft.pick("and", "or", "or", "not", "if")
    if kind == "and":
        return Term(f"({a.text} and {b.text})", lambda s: a.value(s) & b.value(s))
    if kind == "or":
        return Term(f"({a.text} or {b.text})", lambda s: a.value(s) | b.value(s))
    if kind == "not":
        return Term(f"(not {a.text})", lambda s: ~a.value(s))
    c = condition(draft, 0)
    return Term(
        f"({a.text} if {c.text} else {b.text})",
        lambda s: (c.value(s) & a.value(s)) | (~c.value(s) & b.value(s)),
    )


def _window(draft: Draft) -> Term:
    w = draft.number(1, 9)
    if draft.chance(0.6):
        return Term(f"(0 <= q - k < {w})", lambda s: (s.q_at - s.k_at >= 0) & (s.q_at - s.k_at < w))
    return Term(f"(abs(q - k) < {w})", lambda s: (s.q_at - s.k_at).abs() < w)


def _order(draft: Draft) -> Term:
    if draft.chance(0.7):
        return Term("(k <= q)", lambda s: s.k_at <= s.q_at)
    return Term("(k >= q)", lambda s: s.k_at >= s.q_at)


def _compared(draft: Draft) -> Term:
    a, b = integer(draft, 2), integer(draft, 2)
    sign = draft.pick("<", "<=", ">", ">=", "==", "!=")
    compare = {
        "<": torch.lt,
        "<=": torch.le,
        ">": torch.gt,
        ">=": torch.ge,
        "==": torch.eq,
        "!=": torch.ne,
    }[sign]
    return Term(f"({a.text} {sign} {b.text})", lambda s: compare(a.value(s), b.value(s)))


def _periodic(draft: Draft) -> Term:
    x, n = integer(draft, 1), draft.number(2, 5)
    offset = draft.number(0, n - 1)
    return Term(f"({x.text} % {n} == {offset})", lambda s: x.value(s) % n == offset)


def _flags(draft: Draft) -> Term:
    if not draft.indexed:
        return _window(draft)
    kind = draft.pick("pair", "key", "query", "head")
    if kind == "pair":
        name = draft.input("bool", ("query", "key"), "flag")
        return Term(f"{name}[q, k]", lambda s: s.inputs[name][None, None])
    if kind == "key":
        name = draft.input("bool", ("batch", "key"), "flag")
        return Term(f"{name}[k]", lambda s: s.inputs[name][:, None, None, :])
    if kind == "query":
        name = draft.input("bool", ("batch", "head", "query"), "flag")
        return Term(f"{name}[q]", lambda s: s.inputs[name][:, :, :, None])
    name = draft.input("bool", ("head",), "flag")
    return Term(name, lambda s: s.inputs[name].view(1, -1, 1, 1))


def _ids(draft: Draft) -> Term:
    if not draft.indexed:
        return _order(draft)
    name = draft.input("int", ("batch", "token"), draft.pick("runs", "runs", "below 4"))
    first, second = list(draft.pick("qk", "kq"))
    return Term(
        f"({name}[{first}] == {name}[{second}])",
        lambda s: s.inputs[name][:, None, :, None] == s.inputs[name][:, None, None, :],
    )


def _any(draft: Draft) -> Term:
    n, step = draft.number(1, 4), draft.number(1, 5)
    x, j = integer(draft, 1), draft.variable()
    if draft.chance(0.5):
        return Term(
            f"any(q - k == {step} * {j} + {x.text} % 3 for {j} in 0 .. {n})",
            lambda s: torch.stack(_spread([s.q_at - s.k_at == step * i + x.value(s) % 3 for i in range(n)])).any(0),
        )
    return Term(
        f"any(q - k == 2 ** {j} for {j} in 0 .. {n})",
        lambda s: torch.stack([s.q_at - s.k_at == 2**i for i in range(n)]).any(0),
    )


def _spread(tensors: list[Tensor]) -> list[Tensor]:
    every = sum(x.long() * 0 for x in tensors)
    return [x | (every > 0) for x in tensors]


def integer(draft: Draft, depth: int) -> Term:  # noqa: C901  one case a kind of expression
    """Draw an integer of the pair."""
    if depth == 0 or draft.chance(0.25):
        return _leaf(draft)
    a, b, n = integer(draft, depth - 1), integer(draft, depth - 1), draft.number(1, 7)
    kind = draft.pick("+", "-", "*", "//", "%", "abs", "min", "max", "if", "bits", "xor", "root", "sum", "floor")
    if kind in "+-":
        sign = 1 if kind == "+" else -1
        return Term(f"({a.text} {kind} {b.text})", lambda s: a.value(s) + sign * b.value(s))
    if kind == "*":
        return Term(f"({n} * {a.text})", lambda s: n * a.value(s))
    if kind == "//":
        return Term(f"({a.text} // {n})", lambda s: torch.div(a.value(s), n, rounding_mode="floor"))
    if kind == "%":
        return Term(f"({a.text} % {n})", lambda s: a.value(s) % n)
    if kind == "abs":
        return Term(f"abs({a.text})", lambda s: a.value(s).abs())
    if kind in ("min", "max"):
        function = torch.minimum if kind == "min" else torch.maximum
        return Term(f"{kind}({a.text}, {b.text})", lambda s: function(a.value(s), b.value(s)))
    if kind == "if":
        c = condition(draft, 0)
        return Term(f"({a.text} if {c.text} else {b.text})", lambda s: torch.where(c.value(s), a.value(s), b.value(s)))
    if kind == "bits":
        return Term(f"bitlen(abs({a.text}))", lambda s: _bits(a.value(s).abs()))
    if kind == "xor":
        return Term(f"xor(abs({a.text}), {n})", lambda s: a.value(s).abs() ^ n)
    if kind == "root":
        return Term(f"isqrt(abs({a.text}))", lambda s: _root(a.value(s).abs()))
    if kind == "sum":
        j = draft.variable()
        return Term(
            f"sum(min({a.text}, {j}) for {j} in 0 .. {n})",
            lambda s: torch.stack([a.value(s).clamp(max=i) for i in range(n)]).sum(0),
        )
    place = draft.pick("q", "k", "(q - k)")
    position: Value = {"q": lambda s: s.q_at, "k": lambda s: s.k_at, "(q - k)": lambda s: s.q_at - s.k_at}[place]
    return Term(f"floor(log2(abs({place}) + 1) * {n})", lambda s: _logarithm(position(s), n))


def _logarithm(x: Tensor, n: int) -> Tensor:
    return torch.floor(torch.log2(x.abs().double() + 1) * n).long()


def _bits(x: Tensor) -> Tensor:
    return torch.stack([x >> i > 0 for i in range(40)]).sum(0)


def _root(x: Tensor) -> Tensor:
    root = x.double().sqrt().long()
    root = torch.where(root * root > x, root - 1, root)
    return torch.where((root + 1) * (root + 1) <= x, root + 1, root)


def _leaf(draft: Draft) -> Term:
    kinds = ["q", "k", "q", "k", "number", "head"]
    if draft.grid:
        kinds += ["coordinate"] * 4
    if draft.indexed:
        kinds += ["keys", "by key", "by query", "by batch", "table"]
    kind = draft.pick(*kinds)
    if kind == "q":
        return Term("q", lambda s: s.q_at)
    if kind == "k":
        return Term("k", lambda s: s.k_at)
    if kind == "number":
        n = draft.number(-3, 12)
        return Term(f"({n})" if n < 0 else str(n), lambda s: torch.tensor(n).view(1, 1, 1, 1))
    if kind == "head":
        return Term(*_of_heads(draft))
    if kind == "keys":
        return Term("keys", lambda s: torch.tensor(s.keys).view(1, 1, 1, 1))
    if kind == "coordinate":
        return _coordinate(draft)
    return _looked_up(draft, kind)


def _of_heads(draft: Draft) -> tuple[str, Value]:
    text = draft.pick("head", "heads", "kv_head", "group")
    values: dict[str, Value] = {
        "head": lambda s: s.head,
        "heads": lambda s: torch.tensor(s.heads).view(1, 1, 1, 1),
        "kv_head": lambda s: torch.div(s.head, s.heads // s.kv_heads, rounding_mode="floor"),
        "group": lambda s: torch.tensor(s.heads // s.kv_heads).view(1, 1, 1, 1),
    }
    return text, values[text]


def _coordinate(draft: Draft) -> Term:
    assert draft.grid is not None
    names = AXES[-len(draft.grid) :]
    axis = draft.number(0, len(names) - 1)
    extent, below = draft.grid[axis], 1
    for size in draft.grid[axis + 1 :]:
        below *= size
    if draft.chance(0.5):
        return Term(f"q.{names[axis]}", lambda s: torch.div(s.q_at, below, rounding_mode="floor") % extent)
    return Term(f"k.{names[axis]}", lambda s: torch.div(s.k_at, below, rounding_mode="floor") % extent)


def _looked_up(draft: Draft, kind: str) -> Term:
    if kind == "by key":
        name = draft.input("int", ("batch", "key"), draft.pick("below 4", "place"))
        return Term(f"{name}[k]", lambda s: s.inputs[name][:, None, None, :])
    if kind == "by query":
        name = draft.input("int", ("query",), draft.pick("below 4", "place"))
        return Term(f"{name}[q]", lambda s: s.inputs[name].view(1, 1, -1, 1))
    if kind == "by batch":
        name = draft.input("int", ("batch",), "place")
        return Term(name, lambda s: s.inputs[name].view(-1, 1, 1, 1))
    n = draft.number(2, 6)
    name = draft.input("int", ("head", n), "below 9")
    place = draft.pick("q", "k")
    return Term(f"{name}[{place} % {n}]", lambda s: _row(s, s.inputs[name], place, n))


def _row(s: Scene, table: Tensor, place: str, n: int) -> Tensor:
    index = (s.q_at if place == "q" else s.k_at) % n
    return table[s.head, index]
