"""A pattern's kernels as one file that runs with torch and triton alone, and checks itself by a dense reference."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from attnc.compiler import fold
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.ir import Extent, Index, Lookup, Pattern, Value
from attnc.compiler.kernels.attention_kernels import AttentionKernels
from attnc.compiler.kernels.attention_problem import PAIRS, PRODUCT
from attnc.compiler.kernels.index_text import ExprText, IndexText, NotInKernelsError
from attnc.compiler.kernels.kernel_source import KernelSource
from attnc.compiler.kernels.score_formula import ScoreFormula, Term
from attnc.compiler.kernels.value_text import ValueText
from attnc.compiler.rewrite import substitute, walk
from attnc.compiler.value_nodes import reads, scale

_HELPERS = ("bit_length", "floor_div", "floor_mod", "tanh", "softplus", "whole_power", "power")
_FAR = 1 << 40


@dataclass(frozen=True)
class Provenance:
    """Where a file comes from: the version of attnc, the text of the pattern, and the command."""

    version: str
    spec: str
    command: str


def emit_standalone(pattern: Pattern, kernels: AttentionKernels, provenance: Provenance) -> str:
    """The file of a pattern of one attention. The same arguments give the same text.

    Raises NotInKernelsError for what a file cannot do alone.
    """
    _check(pattern, kernels)
    sources = [kernels.forward, kernels.delta, kernels.dq, kernels.dkdv]
    boxed = any(argument.box for source in sources for argument in source.arguments)
    parts = [_head(pattern, kernels, provenance), _IMPORTS]
    if boxed:
        parts.append("from triton.tools.tensor_descriptor import TensorDescriptor\n")
    parts.append("\n# --- kernels " + "-" * 103 + "\n\n")
    parts.append(_kernels(sources))
    parts.append("\n# --- calls " + "-" * 105 + "\n\n")
    parts.append(_constants(pattern, kernels, sources))
    parts.append(_CALLS.replace("{described}", _DESCRIBED if boxed else ""))
    parts.append(_terms(kernels.problem.score))
    parts.append("\n\n# --- the reference " + "-" * 97 + "\n\n")
    parts.append(_reference(pattern, kernels))
    parts.append(_CHECK)
    return "".join(parts)


def _check(pattern: Pattern, kernels: AttentionKernels) -> None:
    problem, score = kernels.problem, kernels.problem.score
    if not all(_holds(root, pattern) for root, _ in pattern.requirements):
        raise NotInKernelsError("requirements of lengths in one file")
    if problem.sizes:
        raise NotInKernelsError(f"the size `{problem.sizes[0]}`, which an input or the length tells")
    if kernels.form not in ("ranges", "bricks"):
        raise NotInKernelsError("tiles that are listed: a planner must make the lists")
    if problem.documents or problem.tensors:
        raise NotInKernelsError("inputs beside q, k and v in one file")
    if problem.kind != "softmax":
        raise NotInKernelsError("weights that are no softmax in one file")
    if score is None:
        return
    if score.query or score.key or score.value is not None or score.extra is not None:
        raise NotInKernelsError("vectors or extra logits of its own in one file")
    for term in score.terms:
        if term.varies or term.side == "distance" or {"k"} & reads(term.value):
            raise NotInKernelsError("terms with inputs in one file")


def _holds(requirement: Index, pattern: Pattern) -> bool:
    """Whether a requirement is known to hold, of the number of heads that the pattern has."""
    heads = next((length for _, length in pattern.head_lists), None)
    if heads is None:
        return requirement is fold.truth(True)
    found = substitute(requirement, {fold.extent("heads"): fold.const(heads)})
    if any(isinstance(node, Extent | Lookup) for node in walk(found)):
        return False
    return bool(exact_evaluation.mask(found, (0, 1), (0, 1))[0, 0])


def _head(pattern: Pattern, kernels: AttentionKernels, provenance: Provenance) -> str:
    problem = kernels.problem
    dk, dv = problem.dk, problem.dv
    spec = textwrap.indent(provenance.spec.strip().replace("\\", "\\\\").replace('"""', "'''"), "    ")
    title = pattern.name if not pattern.parameters else problem.told[0].partition(": made by")[0]
    return f'''"""{title}: attention as one file, which needs torch and triton and nothing else.

`attend(q, k, v, scale=None)` runs the kernels, forward and backward; `reference` is the same, dense, in float64. Run
the file to hold one against the other: on a GPU, or without one in Triton's interpreter.

    q (B, Hq, Nq, {dk}), k (B, Hkv, Nk, {dk}), v (B, Hkv, Nk, {dv}) → (B, Hq, Nq, {dv}), all {problem.dtype}

Made by attnc {provenance.version} for {kernels.target.name}: `{provenance.command}`, from

{spec}
"""

'''


_IMPORTS = """from __future__ import annotations

import os
import sys

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import triton
import triton.language as tl
from torch import Tensor
"""


def _kernels(sources: Sequence[KernelSource]) -> str:
    """The texts of kernels in one module: imports once, helpers once, and names that differ."""
    texts, seen = [], set()
    for source in sources:
        text = source.text.replace("import triton\nimport triton.language as tl\n", "")
        for name in ("NUMBERS", "FAR"):
            text = re.sub(rf"\b{name}\b", f"{source.function.upper()}_{name}", text)
        blocks = re.split(r"\n\n\n+", text.strip("\n"))
        for block in blocks:
            if block.strip() and (block not in seen or not block.startswith("@triton.jit\n")):
                seen.add(block)
                texts.append(block.strip("\n"))
    return "\n\n\n".join(texts) + "\n"


def _constants(pattern: Pattern, kernels: AttentionKernels, sources: Sequence[KernelSource]) -> str:
    problem = kernels.problem
    lines = [f"DK, DV, DTYPE = {problem.dk}, {problem.dv}, torch.{problem.dtype}"]
    grid = kernels.bricked.get("forward")
    tokens = prod(axis.extent for axis in grid.grid.axes) if grid is not None else None
    lines.append(f"TOKENS = {tokens}  # that a call must have; None: any number")
    heads = next((length for _, length in pattern.head_lists), None)
    lines.append(f"HEADS = {heads}  # of queries, that a call must have; None: any number")
    lines.append(f"ALIGN = {pattern.align!r}  # where queries stand if there are fewer of them than keys")
    lines.append(f"NEEDS_ALIGN = {pattern.needs_align or tokens is not None}")
    lines.append(f"SCALED = {problem.score is None}  # the scale is folded into powers of 2")
    lines.append("LOG2_E = 1.4426950408889634")
    lines.append(
        "KERNELS = {  # function, arguments by name, options, rows of a tile, tiles (None: by the tokens), parts"
    )
    for source in sources:
        names = ", ".join(f'"{argument.name}"' for argument in source.arguments)
        options = ", ".join(f'"{name}": {value}' for name, value in source.options.items())
        lines.append(f'    "{source.stage}": (')
        lines.append(f"        {source.function},")
        lines += textwrap.wrap(f"({names},),", 110, initial_indent=" " * 8, subsequent_indent=" " * 9)
        lines.append(f"        {{{options}}},")
        lines.append(f"        {source.stationary},")
        lines.append(f"        {source.row_tiles},")
        lines.append(f"        {source.parts},")
        lines.append("    ),")
    lines.append("}")
    lines.append("BOXES = {  # of a kernel, by argument: the tensor, the box, axes of tokens, batch and heads as one")
    for source in sources:
        for argument in source.arguments:
            if argument.box:
                told = f'("{argument.of}", {list(argument.box)}, {argument.axes!r}, {argument.folded})'
                lines.append(f'    ("{source.stage}", "{argument.name}"): {told},')
    lines.append("}")
    return "\n".join(lines) + "\n"


_CALLS = '''

def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention of q (B, Hq, Nq, DK) over k (B, Hkv, Nk, DK), v (B, Hkv, Nk, DV): (B, Hq, Nq, DV).

    Differentiable once. Raises ValueError.
    """
    _check(q, k, v)
    return _Attend.apply(q, k, v, DK**-0.5 if scale is None else float(scale))


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    for name, x, shape in (
        ("q", q, (batch, heads, queries, DK)),
        ("k", k, (batch, kv_heads, keys, DK)),
        ("v", v, (batch, kv_heads, keys, DV)),
    ):
        if tuple(x.shape) != shape or x.dtype != DTYPE:
            raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}: it must be {DTYPE} {shape}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads and k {kv_heads}: the former must be a multiple of the latter")
    if HEADS is not None and heads != HEADS:
        raise ValueError(f"q has {heads} heads: the pattern has {HEADS}")
    if TOKENS is not None and (queries, keys) != (TOKENS, TOKENS):
        raise ValueError(f"there are {queries} queries and {keys} keys: there must be {TOKENS} of each")
    if queries != keys and NEEDS_ALIGN and (ALIGN is None or (ALIGN == "end" and queries > keys)):
        raise ValueError(f"there are {queries} queries and {keys} keys, and the pattern does not say how they meet")
    if max(queries, keys) > 1 << 28:
        raise ValueError("more than 2**28 tokens")


class _Attend(torch.autograd.Function):
    """The kernels, recorded."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        sign = -1.0 if scale < 0 and SCALED else 1.0  # kernels scale after they take the largest
        ctx.scale, ctx.sign = (sign * scale if scale or not SCALED else 1.0), sign if scale or not SCALED else 0.0
        given = {"q": _fit(q * ctx.sign if ctx.sign != 1.0 else q), "k": _fit(k), "v": _fit(v)}
        out, lse = _room(q, DV), q.new_empty(q.shape[:3], dtype=torch.float32)
        if out.numel() and k.numel():
            _launch("forward", q.shape[2], q, k, ctx.scale, given | {"out": out, "lse": lse})
        else:
            out.zero_(), lse.fill_(float("-inf"))
        ctx.save_for_backward(given["q"], given["k"], given["v"], out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        given = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": _fit(grad)}
        dq, dk, dv = _room(q, DK), _room(k, DK), _room(v, DV)
        if not (out.numel() and k.numel()):
            return dq.zero_(), dk.zero_(), dv.zero_(), None
        lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
        _launch("delta", q.shape[2], q, k, ctx.scale, given | {"lse2": lse2, "delta": delta})
        given |= {"lse": lse2, "delta": delta, "dq": dq, "dk": dk, "dv": dv}
        _launch("dq", q.shape[2], q, k, ctx.scale, given)
        _launch("dkdv", k.shape[2], q, k, ctx.scale, given)
        return dq * ctx.sign if ctx.sign != 1.0 else dq, dk, dv, None


def _launch(stage: str, tokens: int, q: Tensor, k: Tensor, scale: float, tensors: dict[str, Tensor]) -> None:
    function, names, options, rows, tiles, parts = KERNELS[stage]
    batch, heads, queries, _ = q.shape
    lanes = batch * (k.shape[1] if stage == "dkdv" else heads)
    shift = k.shape[2] - queries if ALIGN == "end" else 0
    tensors = {**tensors, **terms(heads, queries, k.shape[2], shift, q.device)}
    numbers = {
        "lanes": lanes,
        "heads": heads,
        "group": heads // k.shape[1],
        "queries": queries,
        "keys": k.shape[2],
        "shift": shift,
        "scale": scale * LOG2_E if SCALED else scale,
    }
    arguments = []
    for name in names:
        if (stage, name) in BOXES:
            of, *box = BOXES[stage, name]
            arguments.append(_described(tensors[of], *box))
        elif name in tensors:
            arguments.append(tensors[name])
        else:
            arguments.append(numbers[name] if name in numbers else _stride(tensors, name))
    programs = (-(-tokens // rows) if tiles is None else tiles) * lanes
    with torch.cuda.device(q.device) if q.is_cuda else torch.no_grad():
        function[(programs, parts)](*arguments, **options)


def _stride(tensors: dict[str, Tensor], name: str) -> int:
    """A stride by name: of q, k, v and their like in units of 16 bytes, of others in entries."""
    tensor, _, dim = name.rpartition("_")
    of = tensors[tensor]
    if dim.isdigit():
        return of.stride(int(dim)) if of.shape[int(dim)] > 1 else 0
    return of.stride(("batch", "head", "token").index(dim)) * of.element_size() // 16


def _room(like: Tensor, width: int) -> Tensor:
    """Memory whose rows begin at multiples of 16 bytes."""
    unit = 16 // like.element_size()
    return like.new_empty((*like.shape[:3], -(-width // unit) * unit))[..., :width]


def _fit(x: Tensor) -> Tensor:
    """A tensor that kernels can address: in units of 16 bytes, its last dimension side by side."""
    strides = [s * x.element_size() % 16 for s, n in zip(x.stride()[:3], x.shape) if n > 1]
    fits = not any(strides) and all(s > 0 for s in x.stride()[:3]) and x.stride(3) == 1 and x.data_ptr() % 16 == 0
    far = x.stride(2) * x.element_size() // 16 > 1 << 24
    return x if fits and not far else _room(x, x.shape[3]).copy_(x)
{described}

'''

_DESCRIBED = '''

def _described(x: Tensor, box: list[int], axes: tuple[tuple[int, int], ...], folded: bool) -> TensorDescriptor:
    """What the hardware copies boxes by."""
    batch, head, token = zip(x.shape[:3], x.stride()[:3])
    if folded and 1 not in x.shape[:2] and x.stride(0) != x.shape[1] * x.stride(1):
        raise ValueError("the heads of all batch entries must be evenly apart")
    sides = [(batch[0] * head[0], head[1] if head[0] > 1 else batch[1])] if folded else [batch, head]
    sides += [(extent, stride * token[1]) for extent, stride in axes] or [token]
    unused = -(-x.numel() // 16) * 16  # of a side of size 1: any multiple of 16 bytes
    strides = [stride if size > 1 else unused for size, stride in sides]
    return TensorDescriptor(x, [*(size for size, _ in sides), x.shape[3]], [*strides, 1], list(box))
'''


# --- text for torch --------------------------------------------------------------------------------------------------


def _names() -> dict[Index, ExprText]:
    """Return the names of positions, heads and sizes in the reference: tensors over (heads, queries, keys)."""
    names: dict[Index, ExprText] = {fold.place("q"): ExprText("query", PAIRS), fold.place("k"): ExprText("key", PAIRS)}
    names |= {fold.head_index(name): ExprText(name, PAIRS) for name in ("head", "kv_head")}
    names |= {fold.extent(name): ExprText(name) for name in ("heads", "kv_heads", "group", "queries", "keys")}
    return names


def _torch(text: str) -> str:
    text = text.replace(".to(tl.int64)", "").replace("tl.", "ref.")  # integers of torch are as wide
    text = re.sub(rf"\b({'|'.join(_HELPERS)})\(", r"ref.\1(", text)
    return re.sub(r"\bFAR\b", str(_FAR), text)


def _formula(score: ScoreFormula | None, kernels: AttentionKernels) -> ValueText:
    atoms: dict[Value, ExprText] = {PRODUCT: ExprText("product", PAIRS), scale(): ExprText("scale")}
    for term in () if score is None else score.terms:
        atoms[term.element] = ExprText(f'own["{term.tensor.name}"][0, :, :, None]', PAIRS)
    names = _names()
    names[fold.extent("dk")], names[fold.extent("dv")] = (ExprText(str(n)) for n in kernels.problem.widths)

    def unread(node: object, indices: tuple[ExprText, ...]) -> ExprText:
        raise NotInKernelsError("inputs beside q, k and v in one file")

    return ValueText(atoms, IndexText(names, unread), unread)


def _terms(score: ScoreFormula | None) -> str:
    """Return the lines that compute terms before the kernels: numbers of every query and head."""
    lines = [
        "def terms(heads: int, queries: int, keys: int, shift: int, device: torch.device) -> dict[str, Tensor]:",
        '    """Numbers of every query, which the score reads."""',
    ]
    terms: Sequence[Term] = () if score is None else score.terms
    if not terms:
        return "\n".join([*lines, "    return {}"]) + "\n"
    lines += ["    heads, queries, keys = (torch.tensor(n, device=device) for n in (heads, queries, keys))"]
    lines += ["    head = torch.arange(int(heads), device=device)[:, None]"]
    lines += ["    query = torch.arange(int(queries), device=device)[None] + shift"]
    lines += ["    shape = 1, int(heads), int(queries)", "    return {"]
    names = _names()

    def unread(node: object, indices: tuple[ExprText, ...]) -> ExprText:
        raise NotInKernelsError("terms with inputs in one file")

    values = ValueText({}, IndexText(names, unread), unread)
    for term in terms:
        if term.side != "query":
            raise NotInKernelsError("terms of keys in one file")
        text = _torch(values.of(term.value).text)
        lines.append(
            f'        "{term.tensor.name}": ({text} + torch.zeros(shape, device=device)).float().contiguous(),'
        )
    lines.append("    }")
    return "\n".join(lines) + "\n"


def _reference(pattern: Pattern, kernels: AttentionKernels) -> str:
    def unread(node: object, indices: tuple[ExprText, ...]) -> ExprText:
        raise NotInKernelsError("inputs beside q, k and v in one file")

    visible = _torch(IndexText(_names(), unread).of(pattern.attend.visible).text)
    score = kernels.problem.score
    formula = "scale * product" if score is None else _torch(_formula(score, kernels).of(score.formula).text)
    return _REFERENCE.format(visible=visible, formula=formula)


_REFERENCE = '''class ref:
    """What the pattern's formulas are written in, for tensors and numbers."""

    float32 = torch.float64

    @staticmethod
    def _both(a, b):
        return torch.as_tensor(a), torch.as_tensor(b)

    where = staticmethod(lambda c, a, b: torch.where(torch.as_tensor(c), *ref._both(a, b)))
    minimum = staticmethod(lambda a, b: torch.minimum(*ref._both(a, b)))
    maximum = staticmethod(lambda a, b: torch.maximum(*ref._both(a, b)))
    floor_div = staticmethod(lambda a, b: torch.as_tensor(a) // b)
    floor_mod = staticmethod(lambda a, b: torch.as_tensor(a) % b)
    bit_length = staticmethod(lambda n: sum((n >> i > 0).long() for i in range(62)))
    whole_power = staticmethod(lambda x, n: x**n)
    power = staticmethod(lambda x, n: torch.as_tensor(x, dtype=torch.float64) ** n)
    abs, sqrt, exp, exp2 = map(staticmethod, (torch.abs, torch.sqrt, torch.exp, torch.exp2))
    log, log2 = map(staticmethod, (torch.log, torch.log2))
    sin, cos, tanh, sigmoid = map(staticmethod, (torch.sin, torch.cos, torch.tanh, torch.sigmoid))
    softplus = staticmethod(torch.nn.functional.softplus)


def visible(heads: int, kv_heads: int, queries: int, keys: int, shift: int = 0) -> Tensor:
    """Who sees whom: bool (heads, queries, keys)."""
    shape = heads, queries, keys
    head = torch.arange(heads)[:, None, None]
    kv_head = head // (heads // kv_heads)
    query = torch.arange(queries)[None, :, None] + shift
    key = torch.arange(keys)[None, None, :]
    heads, kv_heads, group, queries, keys = map(torch.tensor, (heads, kv_heads, heads // kv_heads, queries, keys))
    return torch.as_tensor({visible}).expand(shape)


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """The same as `attend`, every pair, in float64."""
    scale = DK**-0.5 if scale is None else scale
    heads, kv_heads, queries, keys = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    shift = keys - queries if ALIGN == "end" else 0
    own = {{name: x.double() for name, x in terms(heads, queries, keys, shift, q.device).items()}}
    head = torch.arange(heads, device=q.device)[:, None, None]
    query = torch.arange(queries, device=q.device)[None, :, None] + shift
    key = torch.arange(keys, device=q.device)[None, None, :]
    seen = visible(heads, kv_heads, queries, keys, shift).to(q.device)
    heads, kv_heads, queries, keys = (torch.tensor(n) for n in (heads, kv_heads, queries, keys))
    product = q @ k.mT
    score = {formula}
    score = torch.where(seen, score, float("-inf"))
    some = seen.any(-1, keepdim=True)
    weights = torch.softmax(torch.where(some, score, 0), -1)
    return torch.where(seen, weights, 0) @ v
'''

_CHECK = '''

# --- the check -------------------------------------------------------------------------------------------------------


def check() -> int:
    """Forward and every gradient against the reference; 0 where all agree."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and DTYPE == torch.bfloat16:
        print("Triton's interpreter cannot multiply bfloat16: run this on a GPU, or emit it for float16 or float32")
        return 2
    tolerance = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[DTYPE]
    torch.manual_seed(0)
    wrong = 0
    for n in (1, 65, 130) if TOKENS is None else (TOKENS,):
        for heads, kv_heads in ((2, 2), (4, 2)) if HEADS is None else ((HEADS, HEADS), (HEADS, 1)):
            shapes = (1, heads, n, DK), (1, kv_heads, n, DK), (1, kv_heads, n, DV)
            leaves = [torch.randn(shape, device=device).to(DTYPE).requires_grad_() for shape in shapes]
            grad = torch.randn(1, heads, n, DV, device=device).to(DTYPE)
            found, wanted = (
                [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]
                for out in (attend(*leaves), reference(*leaves))
            )
            for name, x, y in zip(("out", "dq", "dk", "dv"), found, wanted):
                error = ((x.double() - y.double()).abs().max() / y.abs().max().clamp(min=1)).item()
                fine = error <= tolerance
                wrong += not fine
                what = f"{n:5} tokens, {heads} heads on {kv_heads}: {name:3}"
                print(f"{what} differs by {error:.1e}{'' if fine else '  WRONG'}")
    print("the kernels agree with the reference" if not wrong else f"{wrong} results are wrong")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(check())
'''
