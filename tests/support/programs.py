"""Complete `.attn` programs of the static language, drawn by hypothesis, with shapes and inputs for a call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

import expression_trees as trees
from expression_trees import Kit

Array = NDArray[Any]


@dataclass(frozen=True)
class Shape:
    """The sizes of a call."""

    batch: int
    heads: int
    kv_heads: int
    n_q: int
    n_k: int


@dataclass(frozen=True)
class Program:
    """A text with everything that a call needs besides q, k and v."""

    source: str
    shape: Shape
    parameters: dict[str, object]
    inputs: dict[str, Array]

    def __repr__(self) -> str:
        values = {name: array.tolist() if array.size <= 64 else array.shape for name, array in self.inputs.items()}
        return f"Program({self.shape}, {self.parameters}, {values},\n{self.source})"


@dataclass
class Writer:
    """A program that is being written."""

    draw: st.DrawFn
    shape: Shape
    parameters: dict[str, str] = field(default_factory=dict)
    given: dict[str, object] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    inputs: dict[str, Array] = field(default_factory=dict)
    functions: list[str] = field(default_factory=list)

    def pick(self, *choices: Any) -> Any:
        """Return a random choice."""
        return self.draw(st.sampled_from(choices))

    def number(self, low: int, high: int) -> str:
        """Draw an integer in `low .. high`, as a literal or as a parameter with a default or a value."""
        value = self.draw(st.integers(low, high))
        if self.pick(True, False, False):
            name = f"p{len(self.parameters)}"
            self.parameters[name] = f"int = {value}"
            if self.draw(st.booleans()):
                self.parameters[name] = "int"
                self.given[name] = value
            return name
        return str(value)

    def rational(self) -> str:
        """Draw a rational parameter or literal."""
        text: str = self.pick("0.25", "1/3", "1.5", "0.7", "2")
        name = f"p{len(self.parameters)}"
        if "/" in text or self.draw(st.booleans()):
            self.parameters[name] = f"real = {text}"
            return name
        return text

    def per_head(self, low: int, high: int) -> str:
        """Draw a list parameter with one entry per head."""
        name = f"p{len(self.parameters)}"
        values = [self.draw(st.integers(low, high)) for _ in range(self.shape.heads)]
        if self.draw(st.booleans()):
            self.parameters[name] = "int[head]"
            self.given[name] = values
        else:
            self.parameters[name] = f"real[head] = [{', '.join(f'{v}/2' if v >= 0 else f'-{-v}/2' for v in values)}]"
        return name

    def input(self, kind: str, *dims: str, high: int = 4) -> str:
        """Declare an input of random values."""
        name = f"x{len(self.inputs)}"
        shape = self.shape
        sizes = {"batch": shape.batch, "head": shape.heads, "kv_head": shape.kv_heads}
        sizes |= {"token": shape.n_k, "key": shape.n_k, "query": shape.n_q}
        random = np.random.default_rng(self.draw(st.integers(0, 999)))
        extents = tuple(sizes[d] if d in sizes else int(d) for d in dims)
        array = random.random(extents) < 0.7 if kind == "bool" else random.integers(-1, high, extents)
        self.lines.append(f"input {name}: {kind}" + (f"[{', '.join(dims)}]" if dims else ""))
        self.inputs[name] = np.asarray(array)
        return name


def conditions(w: Writer, reach: int) -> str:  # noqa: C901  one case a kind of relation
    """Draw one condition over q and k; `reach` bounds its distances."""
    kind = w.draw(st.integers(0, 17))
    match kind:
        case 0 | 1:
            return f"0 <= q - k < {w.number(1, reach)}"
        case 2:
            return "k <= q"
        case 3:
            return f"k < {w.number(1, reach // 2 + 1)} and k <= q"
        case 4:
            size = w.number(1, reach)
            return f"q // {size} == k // {size}"
        case 5:
            size = w.number(1, reach)
            gap = f"(q // {size} - k // {size})"
            return f"power_of_two{gap} or 0 <= {gap} <= 1"
        case 6:
            return f"(q - k) % {w.number(1, reach // 2 + 1)} == 0 and k <= q"
        case 7:
            return f"abs(q - k) <= {w.number(1, reach)} * {w.rational()}"
        case 8:
            return f"q - k < {w.per_head(-1, reach)}"
        case 9:
            heads = w.pick("head % 2 == 0", "kv_head == 0", "head < heads - 1", "group == 1")
            return f"{heads} or k <= q"
        case 10:
            return f"{w.input('bool', *w.pick(('token',), ('batch', 'key'), ('head', 'token')))}[k]"
        case 11:
            level = w.input("int", *w.pick(("token",), ("batch", "token"), ("kv_head", "token")))
            return f"{level}[k] <= {level}[q]"
        case 12:
            return f"k < {w.input('int', *w.pick((), ('batch',), ('head',), ('batch', 'head')), high=reach)} or k <= q"
        case 13:
            return f"{w.input('bool', *w.pick(('query',), ('batch', 'query')))}[q] or keys - k <= {w.number(0, reach)}"
        case 14:
            return f"any(k == q - i * i for i in 0 .. {w.number(1, 6)})"
        case 15:
            odd = w.number(1, 5)
            return f"count(i % {odd} == 0 for i in k .. k + 3 if i <= q) {w.pick('>', '<=')} {w.number(0, 2)}"
        case 16:
            return f"{w.input('bool', '4', '3')}[q % 4, k % 3]"
        case _:
            return trees.text(w.draw(trees.truths(2, Kit(faults=False, aggregates=False))))


def wrapped(w: Writer, condition: str) -> str:
    """Return the condition unchanged, or through a `let` or `def`."""
    name = f"n{len(w.lines) + len(w.functions)}"
    match w.draw(st.integers(0, 5)):
        case 0:
            w.lines.append(f"let {name} = {condition}")
            return name
        case 1:
            w.lines.append(f"let {name}(far) = {condition} or q - k == far")
            return f"{name}({w.number(-2, 5)})"
        case 2:
            w.functions.append(f"def {name}(x, y, n) = x - y > n or x == y\n")
            return f"({condition} and {name}(q, k, {w.number(0, 3)}))"
        case 3:
            w.functions.append(f"def {name}(a)\n    let other = q - a\n    return other > k\n")
            return f"({condition} or {name}({w.number(0, 9)}))"
        case _:
            return f"({condition})"


SIZES = (31, 127, 129, 137)
HEADS = ((1, 1), (5, 1), (5, 5), (6, 3), (6, 2), (7, 7), (7, 1), (12, 4), (12, 3), (2, 1), (4, 2))


@st.composite
def shapes(draw: st.DrawFn, longest: int, align: str, elements: int) -> Shape:
    """Draw sizes with `batch · heads · n_q · n_k` at most `elements`."""
    n_k = draw(st.one_of(st.integers(1, longest), st.sampled_from([n for n in (1, *SIZES, longest) if n <= longest])))
    n_q = n_k
    if align != "none" and draw(st.booleans()):
        n_q = draw(st.integers(1, n_k if align == "end" else longest))
    fitting = [h for h in HEADS if h[0] * n_q * n_k <= elements]
    heads, kv_heads = draw(st.sampled_from(fitting or [(1, 1)]))
    batch = draw(st.integers(1, 2)) if 2 * heads * n_q * n_k <= elements else 1
    return Shape(batch, heads, kv_heads, n_q, n_k)


@st.composite
def programs(draw: st.DrawFn, longest: int = 16, elements: int = 4096) -> Program:
    """Draw a program and its call."""
    align = draw(st.sampled_from(["start", "end", "end", "none"]))
    shape = draw(shapes(longest, align, elements))
    w = Writer(draw, shape)
    if align != "none":
        w.lines.append(f"align {align}")
    documents = draw(st.integers(0, 4)) == 0 and shape.n_q <= shape.n_k
    if documents:
        _documents(w)
    axes = [n for n in (1, 2, 3, 4) if shape.n_k % n == 0]
    coordinates = not documents and shape.n_q <= shape.n_k and draw(st.integers(0, 4)) == 0
    if coordinates:
        w.lines.append(f"tokens t: {draw(st.sampled_from(axes))}, s: words")
    for _ in range(draw(st.integers(0 if documents else 1, 2))):
        parts = [wrapped(w, conditions(w, max(2, min(2 * shape.n_k, 300)))) for _ in range(draw(st.integers(1, 3)))]
        if coordinates:
            parts.append(w.pick("q.t == k.t", "abs(q.s - k.s) <= 2", "q.t >= k.t and q.s >= k.s", "k.s < words // 2"))
        w.lines.append(f"visible {w.pick(' and ', ' or ', ' or ').join(parts)}")
    if draw(st.integers(0, 3)) == 0:
        _round(w, coordinates)
    if w.draw(st.booleans()):
        w.lines.append(w.pick("require heads >= kv_heads", "require 1 <= 2", "require keys >= 1"))
    heading = ", ".join(f"{name}: {kind}" for name, kind in w.parameters.items())
    body = "".join(f"    {line}\n" for line in w.lines)
    source = "".join(w.functions) + f"pattern drawn{f'({heading})' if heading else ''}\n{body}"
    if not w.lines:
        source += "    visible true\n"
    return Program(source, shape, w.given, w.inputs)


def unit(w: Writer, place: str, coordinates: bool) -> str:
    """Draw a unit of queries or keys."""
    size = w.number(1, 7)
    forms = [f"{place} // {size}", f"({place} + {w.number(0, 9)}) // {size}", place]
    if coordinates:
        forms += [f"{place}.t", f"{place}.s // {size}", f"[{place}.s // {size}, {place}.t // 2]", f"[{place}.t]"]
    return w.pick(*forms)  # type: ignore[no-any-return]


KEEPS = (
    "any(visible for q in a, k in b)",
    "all(visible for k in b, q in a)",
    "mean(visible for q in a, k in b) >= 1/2",
    "all(any(visible for k in b) for q in a)",
    "count(share > 1/3 for k in b) > 0.6 * count(share > 0 for k in b)",
    "2 * count(visible for q in a, k in b if q - k != 1) > a.size * b.size or b.start == 0",
    "any(count(visible for q in a if q // 3 == i) > 1 for i in 0 .. 4, k in b if k // 2 == i)",
    "a.end > b.end and not any(visible and k % 2 == 0 for q in a, k in b)",
    "max(count(visible for k in b) for q in a) > 1 and any(visible and head == h for h in heads, q in a, k in b)",
    "min((q - k if visible else 40) for q in a, k in b) < 3",
)


def _round(w: Writer, coordinates: bool) -> None:
    keep = w.pick(*KEEPS)
    units = [f"a = {unit(w, 'q', coordinates)}", f"b = {unit(w, 'k', coordinates)}"]
    w.lines += ["round", f"    per {', '.join(units if w.draw(st.booleans()) else reversed(units))}"]
    if "share" in keep:
        w.lines.append("    let share = mean(visible for q in a)")
    w.lines.append(f"    keep {keep}")


def _documents(w: Writer) -> None:
    """Draw contiguous runs of distinct ids, shared by the batch or for each entry."""
    shape = w.shape
    random = np.random.default_rng(w.draw(st.integers(0, 999)))
    rows = []
    for _ in range(shape.batch):
        cuts = random.random(shape.n_k) < w.pick(0.02, 0.1, 0.4)
        rows.append(random.permutation(shape.n_k)[np.cumsum(cuts) % shape.n_k])
    by_batch = w.draw(st.booleans())
    w.lines += [f"input doc: int[{'batch, ' if by_batch else ''}token]", "documents doc"]
    w.inputs["doc"] = np.stack(rows) if by_batch else rows[0]
