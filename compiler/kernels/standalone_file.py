"""A pattern's kernels as one file that needs only torch and triton, and checks itself against a dense reference."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.ir import Extent, Index, Lookup, Pattern, Value, fold
from attnc.compiler.ir.rewrite import substitute, walk
from attnc.compiler.ir.value_nodes import reads, scale
from attnc.compiler.kernels.attention_kernels import AttentionKernels
from attnc.compiler.kernels.attention_problem import PAIRS, PRODUCT
from attnc.compiler.kernels.index_text import ExprText, IndexText, NotInKernelsError
from attnc.compiler.kernels.kernel_source import KernelSource
from attnc.compiler.kernels.score_formula import ScoreFormula, Term
from attnc.compiler.kernels.value_text import ValueText

_HELPERS = ("bit_length", "floor_div", "floor_mod", "tanh", "softplus", "whole_power", "power")
_FAR = 1 << 40


@dataclass(frozen=True)
class Provenance:
    """The origin of a file: the version of attnc, the text of the pattern, and the command."""

    version: str
    spec: str
    command: str


def emit_standalone(pattern: Pattern, kernels: AttentionKernels, provenance: Provenance) -> str:
    """Return the file of a pattern with one attention. Equal arguments give equal texts.

    Raises NotInKernelsError if the pattern needs what a single file cannot do.
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
    """Raise NotInKernelsError if the pattern needs what a single file cannot do."""
    problem, score = kernels.problem, kernels.problem.score
    if not all(_holds(root, pattern) for root, _ in pattern.requirements):
        raise NotInKernelsError("requirements on lengths")
    if problem.sizes:
        raise NotInKernelsError(f"the size `{problem.sizes[0]}`, which an input or the length determines")
    if kernels.form not in ("ranges", "bricks"):
        raise NotInKernelsError("tiles that are listed: a planner must make the lists")
    if problem.documents or problem.tensors:
        raise NotInKernelsError("inputs besides q, k and v")
    if problem.kind != "softmax":
        raise NotInKernelsError("weights that are not a softmax")
    if score is None:
        return
    if score.query or score.key or score.value is not None or score.extra is not None:
        raise NotInKernelsError("vectors or extra logits that the pattern computes")
    for term in score.terms:
        if term.varies or term.side == "distance" or {"k"} & reads(term.value):
            raise NotInKernelsError("score terms that read inputs")


def _holds(requirement: Index, pattern: Pattern) -> bool:
    """Whether a requirement is known to hold for the number of heads that the pattern fixes."""
    heads = next((length for _, length in pattern.head_lists), None)
    if heads is None:
        return requirement is fold.truth(True)
    condition = substitute(requirement, {fold.extent("heads"): fold.const(heads)})
    if any(isinstance(node, Extent | Lookup) for node in walk(condition)):
        return False
    return bool(exact_evaluation.mask(condition, (0, 1), (0, 1))[0, 0])


def _head(pattern: Pattern, kernels: AttentionKernels, provenance: Provenance) -> str:
    problem = kernels.problem
    dk, dv = problem.dk, problem.dv
    spec = textwrap.indent(provenance.spec.strip().replace("\\", "\\\\").replace('"""', "'''"), "    ")
    title = pattern.name if not pattern.parameters else problem.header[0].partition(": made by")[0]
    return f'''"""{title}: attention as one file, which needs torch and triton and nothing else.

`attend(q, k, v, scale=None)` runs the kernels, forward and backward; `reference` computes the same densely in float64.
Run the file to compare the two, on a GPU or in Triton's interpreter.

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
    """Return the texts of kernels as one module: imports and helpers occur once, and names are made distinct."""
    texts, written = [], set()
    for source in sources:
        text = source.text.replace("import triton\nimport triton.language as tl\n", "")
        for name in ("NUMBERS", "FAR"):
            text = re.sub(rf"\b{name}\b", f"{source.function.upper()}_{name}", text)
        blocks = re.split(r"\n\n\n+", text.strip("\n"))
        for block in blocks:
            if block.strip() and (block not in written or not block.startswith("@triton.jit\n")):
                written.add(block)
                texts.append(block.strip("\n"))
    return "\n\n\n".join(texts) + "\n"


def _constants(pattern: Pattern, kernels: AttentionKernels, sources: Sequence[KernelSource]) -> str:
    problem = kernels.problem
    lines = [f"DK, DV, DTYPE = {problem.dk}, {problem.dv}, torch.{problem.dtype}"]
    bricked = kernels.bricked.get("forward")
    tokens = prod(axis.extent for axis in bricked.grid.axes) if bricked is not None else None
    lines.append(f"TOKENS = {tokens}  # number of queries and of keys in every call; None: any number")
    heads = next((length for _, length in pattern.head_lists), None)
    lines.append(f"HEADS = {heads}  # number of query heads in every call; None: any number")
    lines.append(f"ALIGN = {pattern.align!r}  # position of the queries if there are fewer queries than keys")
    lines.append(f"NEEDS_ALIGN = {pattern.needs_align or tokens is not None}")
    lines.append(f"SCALED = {problem.score is None}  # kernels multiply scores by the scale, to base 2")
    lines.append("LOG2_E = 1.4426950408889634")
    lines.append(
        "KERNELS = {  # function, arguments by name, options, rows of a tile, tiles (None: from the tokens), parts"
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
    lines.append("BOXES = {  # by stage and argument: tensor, box, axes of tokens, whether batch and heads are one")
    for source in sources:
        for argument in source.arguments:
            if argument.box:
                descriptor = f'("{argument.of}", {list(argument.box)}, {argument.axes!r}, {argument.folded})'
                lines.append(f'    ("{source.stage}", "{argument.name}"): {descriptor},')
    lines.append("}")
    return "\n".join(lines) + "\n"


_CALLS = '''

def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Compute attention of q (B, Hq, Nq, DK) over k (B, Hkv, Nk, DK), v (B, Hkv, Nk, DV) as (B, Hq, Nq, DV).

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
            raise ValueError(f"{name}: expected {DTYPE} of shape {shape}, got {x.dtype} of shape {tuple(x.shape)}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads and k has {kv_heads}: query heads must be a multiple of kv heads")
    if HEADS is not None and heads != HEADS:
        raise ValueError(f"q: expected {HEADS} heads, which the pattern fixes, got {heads}")
    if TOKENS is not None and (queries, keys) != (TOKENS, TOKENS):
        raise ValueError(f"expected {TOKENS} queries and {TOKENS} keys, got {queries} queries and {keys} keys")
    if queries != keys and NEEDS_ALIGN and (ALIGN is None or (ALIGN == "end" and queries > keys)):
        raise ValueError(f"the pattern does not align {queries} queries with {keys} keys: use as many queries as keys")
    if max(queries, keys) > 1 << 28:
        raise ValueError(f"got {max(queries, keys)} tokens: more than 2**28 tokens are not supported")


class _Attend(torch.autograd.Function):
    """The kernels as an autograd function."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        sign = -1.0 if scale < 0 and SCALED else 1.0  # kernels take the maximum before they scale
        ctx.scale, ctx.sign = (sign * scale if scale or not SCALED else 1.0), sign if scale or not SCALED else 0.0
        tensors = {"q": _fit(q * ctx.sign if ctx.sign != 1.0 else q), "k": _fit(k), "v": _fit(v)}
        out, lse = _allocate(q, DV), q.new_empty(q.shape[:3], dtype=torch.float32)
        if out.numel() and k.numel():
            _launch("forward", q.shape[2], q, k, ctx.scale, tensors | {"out": out, "lse": lse})
        else:
            out.zero_(), lse.fill_(float("-inf"))
        ctx.save_for_backward(tensors["q"], tensors["k"], tensors["v"], out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": _fit(grad)}
        dq, dk, dv = _allocate(q, DK), _allocate(k, DK), _allocate(v, DV)
        if not (out.numel() and k.numel()):
            return dq.zero_(), dk.zero_(), dv.zero_(), None
        lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
        _launch("delta", q.shape[2], q, k, ctx.scale, tensors | {"lse2": lse2, "delta": delta})
        tensors |= {"lse": lse2, "delta": delta, "dq": dq, "dk": dk, "dv": dv}
        _launch("dq", q.shape[2], q, k, ctx.scale, tensors)
        _launch("dkdv", k.shape[2], q, k, ctx.scale, tensors)
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
            arguments.append(_descriptor(tensors[of], *box))
        elif name in tensors:
            arguments.append(tensors[name])
        else:
            arguments.append(numbers[name] if name in numbers else _stride(tensors, name))
    programs = (-(-tokens // rows) if tiles is None else tiles) * lanes
    with torch.cuda.device(q.device) if q.is_cuda else torch.no_grad():
        function[(programs, parts)](*arguments, **options)


def _stride(tensors: dict[str, Tensor], name: str) -> int:
    """Return a stride by name: named dimensions in units of 16 bytes, numbered dimensions in entries."""
    tensor, _, dim = name.rpartition("_")
    of = tensors[tensor]
    if dim.isdigit():
        return of.stride(int(dim)) if of.shape[int(dim)] > 1 else 0
    return of.stride(("batch", "head", "token").index(dim)) * of.element_size() // 16


def _allocate(like: Tensor, width: int) -> Tensor:
    """Return an empty tensor whose rows begin at multiples of 16 bytes."""
    unit = 16 // like.element_size()
    return like.new_empty((*like.shape[:3], -(-width // unit) * unit))[..., :width]


def _fit(x: Tensor) -> Tensor:
    """Return `x`, or a copy, with strides in units of 16 bytes and a contiguous last dimension, as kernels need."""
    strides = [s * x.element_size() % 16 for s, n in zip(x.stride()[:3], x.shape) if n > 1]
    fits = not any(strides) and all(s > 0 for s in x.stride()[:3]) and x.stride(3) == 1 and x.data_ptr() % 16 == 0
    far = x.stride(2) * x.element_size() // 16 > 1 << 24
    return x if fits and not far else _allocate(x, x.shape[3]).copy_(x)
{described}

'''

_DESCRIBED = '''

def _descriptor(x: Tensor, box: list[int], axes: tuple[tuple[int, int], ...], folded: bool) -> TensorDescriptor:
    """Return the descriptor by which the hardware copies boxes."""
    batch, head, token = zip(x.shape[:3], x.stride()[:3])
    if folded and 1 not in x.shape[:2] and x.stride(0) != x.shape[1] * x.stride(1):
        raise ValueError("heads must be evenly spaced over all batch entries: pass a contiguous tensor")
    sides = [(batch[0] * head[0], head[1] if head[0] > 1 else batch[1])] if folded else [batch, head]
    sides += [(extent, stride * token[1]) for extent, stride in axes] or [token]
    unused = -(-x.numel() // 16) * 16  # stride of a side of size 1: any multiple of 16 bytes
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
        atoms[term.element] = ExprText(f'term_values["{term.tensor.name}"][0, :, :, None]', PAIRS)
    names = _names()
    names[fold.extent("dk")], names[fold.extent("dv")] = (ExprText(str(n)) for n in kernels.problem.widths)

    def unread(node: object, indices: tuple[ExprText, ...]) -> ExprText:
        raise NotInKernelsError("inputs besides q, k and v")

    return ValueText(atoms, IndexText(names, unread), unread)


def _terms(score: ScoreFormula | None) -> str:
    """Return the lines that compute terms before the kernels: numbers of every query and head."""
    lines = [
        "def terms(heads: int, queries: int, keys: int, shift: int, device: torch.device) -> dict[str, Tensor]:",
        '    """Return the numbers of every query that the score reads."""',
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
        raise NotInKernelsError("score terms that read inputs")

    values = ValueText({}, IndexText(names, unread), unread)
    for term in terms:
        if term.side != "query":
            raise NotInKernelsError("score terms of keys")
        text = _torch(values.of(term.value).text)
        lines.append(
            f'        "{term.tensor.name}": ({text} + torch.zeros(shape, device=device)).float().contiguous(),'
        )
    lines.append("    }")
    return "\n".join(lines) + "\n"


def _reference(pattern: Pattern, kernels: AttentionKernels) -> str:
    def unread(node: object, indices: tuple[ExprText, ...]) -> ExprText:
        raise NotInKernelsError("inputs besides q, k and v")

    visible = _torch(IndexText(_names(), unread).of(pattern.attend.visible).text)
    score = kernels.problem.score
    formula = "scale * product" if score is None else _torch(_formula(score, kernels).of(score.formula).text)
    return _REFERENCE.format(visible=visible, formula=formula)


_REFERENCE = '''class ref:
    """The functions that the pattern's formulas call, for tensors and numbers."""

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
    """Return the visible pairs: bool (heads, queries, keys)."""
    shape = heads, queries, keys
    head = torch.arange(heads)[:, None, None]
    kv_head = head // (heads // kv_heads)
    query = torch.arange(queries)[None, :, None] + shift
    key = torch.arange(keys)[None, None, :]
    heads, kv_heads, group, queries, keys = map(torch.tensor, (heads, kv_heads, heads // kv_heads, queries, keys))
    return torch.as_tensor({visible}).expand(shape)


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Compute the result of `attend` from all pairs in float64."""
    scale = DK**-0.5 if scale is None else scale
    heads, kv_heads, queries, keys = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    shift = keys - queries if ALIGN == "end" else 0
    term_values = {{name: x.double() for name, x in terms(heads, queries, keys, shift, q.device).items()}}
    head = torch.arange(heads, device=q.device)[:, None, None]
    query = torch.arange(queries, device=q.device)[None, :, None] + shift
    key = torch.arange(keys, device=q.device)[None, None, :]
    mask = visible(heads, kv_heads, queries, keys, shift).to(q.device)
    heads, kv_heads, queries, keys = (torch.tensor(n) for n in (heads, kv_heads, queries, keys))
    product = q @ k.mT
    score = {formula}
    score = torch.where(mask, score, float("-inf"))
    sees_any = mask.any(-1, keepdim=True)
    weights = torch.softmax(torch.where(sees_any, score, 0), -1)
    return torch.where(mask, weights, 0) @ v
'''

_CHECK = '''

# --- the check -------------------------------------------------------------------------------------------------------


def check() -> int:
    """Compare the output and every gradient with the reference; return 0 if all agree."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and DTYPE == torch.bfloat16:
        print("Triton's interpreter cannot multiply bfloat16: run this on a GPU, or emit it for float16 or float32")
        return 2
    tolerance = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[DTYPE]
    torch.manual_seed(0)
    failures = 0
    for n in (1, 65, 130) if TOKENS is None else (TOKENS,):
        for heads, kv_heads in ((2, 2), (4, 2)) if HEADS is None else ((HEADS, HEADS), (HEADS, 1)):
            shapes = (1, heads, n, DK), (1, kv_heads, n, DK), (1, kv_heads, n, DV)
            leaves = [torch.randn(shape, device=device).to(DTYPE).requires_grad_() for shape in shapes]
            grad = torch.randn(1, heads, n, DV, device=device).to(DTYPE)
            results, expected = (
                [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]
                for out in (attend(*leaves), reference(*leaves))
            )
            for name, x, y in zip(("out", "dq", "dk", "dv"), results, expected):
                error = ((x.double() - y.double()).abs().max() / y.abs().max().clamp(min=1)).item()
                agrees = error <= tolerance
                failures += not agrees
                call = f"{n:5} tokens, {heads} heads on {kv_heads}: {name:3}"
                print(f"{call} differs by {error:.1e}{'' if agrees else '  WRONG'}")
    print("the kernels agree with the reference" if not failures else f"{failures} results are wrong")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(check())
'''
