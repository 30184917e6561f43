"""The arguments that say which call is meant, beside its pattern: sizes, dtype, device; and tensors for it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from attnc.runtime.commands.console import UsageError
from attnc.runtime.commands.patterns import add_grid, add_inputs, add_pattern, given_inputs, length_of, whole_number

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from attnc.runtime.attention import Attention
    from attnc.runtime.tensor_checks import TensorSizes

LENGTH, HEADS, HEAD_DIM = 4096, 8, 64
"""Where nothing says others."""


_FLOATS = ("bfloat16", "float16", "float32", "float64")
_SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
_SHORT_NAMES |= {"half": "float16", "float": "float32", "double": "float64"}


def dtype_named(text: str) -> str:
    """The name of a dtype by that name or a short one. Raises UsageError."""
    result = _SHORT_NAMES.get(text, text)
    if result not in _FLOATS:
        raise UsageError(f"--dtype {text}: it is one of {', '.join(_FLOATS)}")
    return result


def dtype_of(text: str) -> torch.dtype:
    """The dtype of a name, which may be a short one. Raises UsageError."""
    import torch

    return cast("torch.dtype", getattr(torch, dtype_named(text)))


def check_heads(heads: int, kv_heads: int | None) -> None:
    """Raise UsageError where query heads cannot share kv heads evenly."""
    if kv_heads is not None and heads % kv_heads:
        raise UsageError(f"--heads {heads} is no multiple of --kv-heads {kv_heads}")


def add_call(parser: argparse.ArgumentParser) -> None:
    """The pattern, its inputs, and the sizes of calls."""
    add_pattern(parser)
    add_grid(parser)
    parser.add_argument(
        "--len",
        dest="lengths",
        metavar="N",
        type=whole_number,
        action="append",
        help=f"a length; may be repeated, a call for each (default {LENGTH}, or what the tokens say)",
    )
    parser.add_argument("--keys", dest="n_k", metavar="N", type=whole_number, help="keys (default: as many as queries)")
    parser.add_argument("--batch", metavar="B", type=int, default=1, help="batch entries (default 1)")
    parser.add_argument("--heads", metavar="H", type=int, help=f"query heads (default {HEADS}, or what parameters say)")
    parser.add_argument("--kv-heads", metavar="H", type=int, help="kv heads (default: as many)")
    parser.add_argument("--head-dim", metavar="D", type=int, default=HEAD_DIM, help=f"width (default {HEAD_DIM})")
    parser.add_argument("--dtype", metavar="NAME", help="bf16, fp16, fp32 or fp64 (fp32 on a CPU, bf16 on a GPU)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU that is there, else the CPU")
    parser.add_argument("--forward", action="store_true", help="without the backward")
    add_inputs(parser)


@dataclass(frozen=True)
class CallTensors:
    """A call: q, k, v and the pattern's inputs by name; `words` about inputs that were made."""

    q: Tensor
    k: Tensor
    v: Tensor
    inputs: dict[str, Tensor]
    words: dict[str, str]

    @property
    def sizes(self) -> TensorSizes:
        """The sizes of the call."""
        from attnc.runtime.tensor_checks import check_tensors

        return check_tensors(self.q, self.k, self.v)


def calls(attention: Attention, args: argparse.Namespace) -> list[CallTensors]:
    """The calls that the arguments name, one for each length: random vectors, the same each time."""
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here")
    dtype = dtype_of(args.dtype or ("fp32" if device == "cpu" else "bf16"))
    for name in ("batch", "heads", "kv_heads", "head_dim", "n_k"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: it must be at least 1")
    return [_call(attention, args, n, torch.device(device), dtype) for n in args.lengths or [None]]


def _call(
    attention: Attention, args: argparse.Namespace, asked: int | None, device: torch.device, dtype: torch.dtype
) -> CallTensors:
    import torch

    from attnc.runtime.example_inputs import example_inputs, head_count

    if asked is not None and asked < 1:
        raise UsageError(f"--len {asked}: it must be at least 1")
    bound = attention.bound
    n_q = length_of(bound, asked, LENGTH)
    n_k = args.n_k or n_q
    heads = args.heads or head_count(bound) or HEADS
    kv_heads = args.kv_heads or heads
    check_heads(heads, kv_heads)
    given = {name: torch.from_numpy(x) for name, x in given_inputs(bound, args.inputs, n_q, n_k).items()}
    sizes = {"kv_head": kv_heads, "dk": args.head_dim, "dv": args.head_dim}
    made = example_inputs(bound, n_q, n_k, given, batch=args.batch, heads=heads, sizes=sizes)
    draw = torch.Generator().manual_seed(0)
    shapes = ((heads, n_q), (kv_heads, n_k), (kv_heads, n_k))
    q, k, v = (
        torch.randn((args.batch, *shape, args.head_dim), generator=draw)
        .to(device, dtype)
        .requires_grad_(not args.forward)
        for shape in shapes
    )
    inputs = {**given, **{name: one.tensor for name, one in made.items()}}
    moved = {n: x.to(device, dtype if x.is_floating_point() else x.dtype) for n, x in inputs.items()}
    return CallTensors(q, k, v, moved, {name: one.words for name, one in made.items()})
