"""The arguments that describe a call besides its pattern (sizes, dtype, device), and the tensors of that call."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from attnc.runtime.commands.console import UsageError
from attnc.runtime.commands.patterns import add_grid, add_inputs, add_lengths, add_pattern, given_inputs, length_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from attnc.runtime.api.attention import Attention
    from attnc.runtime.call.tensor_checks import TensorSizes

LENGTH, HEADS, HEAD_DIM = 4096, 8, 64
"""Sizes of a call where neither the arguments nor the pattern give them."""


_FLOATS = ("bfloat16", "float16", "float32", "float64")
_SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
_SHORT_NAMES |= {"half": "float16", "float": "float32", "double": "float64"}


def dtype_named(text: str) -> str:
    """Return the full name of a dtype from its full or short name, such as `bf16`. Raises UsageError."""
    result = _SHORT_NAMES.get(text, text)
    if result not in _FLOATS:
        raise UsageError(f"--dtype {text}: use one of {', '.join(_FLOATS)}")
    return result


def dtype_of(text: str) -> torch.dtype:
    """Return the torch dtype of a full or short name. Raises UsageError."""
    import torch  # may be missing

    return cast("torch.dtype", getattr(torch, dtype_named(text)))


def check_heads(heads: int, kv_heads: int | None) -> None:
    """Raise UsageError where query heads cannot share kv heads evenly."""
    if kv_heads is not None and heads % kv_heads:
        raise UsageError(f"--heads {heads} must be a multiple of --kv-heads {kv_heads}")


def add_call(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that describe a call: the pattern, its inputs, the sizes, dtype and device."""
    add_pattern(parser)
    add_grid(parser)
    note = f"; may be repeated for more calls (default {LENGTH}, or the pattern's length)"
    add_lengths(parser, note, dest="lengths", action="append")
    parser.add_argument("--batch", metavar="B", type=int, default=1, help="batch size (default 1)")
    parser.add_argument(
        "--heads", metavar="H", type=int, help=f"query heads (default: what the parameters say, else {HEADS})"
    )
    parser.add_argument("--kv-heads", metavar="H", type=int, help="kv heads (default: the number of query heads)")
    parser.add_argument(
        "--head-dim", metavar="D", type=int, default=HEAD_DIM, help=f"head dimension (default {HEAD_DIM})"
    )
    parser.add_argument(
        "--dtype", metavar="NAME", help="bf16, fp16, fp32 or fp64 (default: fp32 on the CPU, bf16 on a GPU)"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="where the call runs (default: the GPU if there is one, else the CPU)"
    )
    parser.add_argument("--forward", action="store_true", help="the forward pass only, without the backward")
    add_inputs(parser)


@dataclass(frozen=True)
class CallTensors:
    """The tensors of a call: q, k, v and the pattern's inputs by name; `words` describe example inputs."""

    q: Tensor
    k: Tensor
    v: Tensor
    inputs: dict[str, Tensor]
    words: dict[str, str]

    @property
    def sizes(self) -> TensorSizes:
        """The sizes of the call's tensors."""
        from attnc.runtime.call.tensor_checks import check_tensors  # needs torch, which may be missing

        return check_tensors(self.q, self.k, self.v)


def calls(attention: Attention, args: argparse.Namespace) -> list[CallTensors]:
    """Return the calls that the arguments describe, one per length; their random vectors are the same in every run."""
    import torch  # may be missing

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU on this machine; use --device cpu")
    dtype = dtype_of(args.dtype or ("fp32" if device == "cpu" else "bf16"))
    for name in ("batch", "heads", "kv_heads", "head_dim", "n_k"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    return [_call(attention, args, n, torch.device(device), dtype) for n in args.lengths or [None]]


def _call(
    attention: Attention, args: argparse.Namespace, length: int | None, device: torch.device, dtype: torch.dtype
) -> CallTensors:
    import torch  # may be missing

    from attnc.runtime.call.example_inputs import example_inputs, head_count  # needs torch, which may be missing

    if length is not None and length < 1:
        raise UsageError(f"--len {length}: must be at least 1")
    bound = attention.bound
    n_q = length_of(bound, length, LENGTH)
    n_k = args.n_k or n_q
    heads = args.heads or head_count(bound) or HEADS
    kv_heads = args.kv_heads or heads
    check_heads(heads, kv_heads)
    given_tensors = {name: torch.from_numpy(x) for name, x in given_inputs(bound, args.inputs, n_q, n_k).items()}
    sizes = {"kv_head": kv_heads, "dk": args.head_dim, "dv": args.head_dim}
    examples = example_inputs(bound, n_q, n_k, given_tensors, batch=args.batch, heads=heads, sizes=sizes)
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, n_q), (kv_heads, n_k), (kv_heads, n_k))
    q, k, v = (
        torch.randn((args.batch, *shape, args.head_dim), generator=generator)
        .to(device, dtype)
        .requires_grad_(not args.forward)
        for shape in shapes
    )
    inputs = {**given_tensors, **{name: example.tensor for name, example in examples.items()}}
    moved = {n: x.to(device, dtype if x.is_floating_point() else x.dtype) for n, x in inputs.items()}
    return CallTensors(q, k, v, moved, {name: example.words for name, example in examples.items()})
