"""`attnc emit`: write a pattern's kernels as one file that needs only torch and triton."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from attnc import __version__
from attnc.compiler.kernels.attention_kernels import HeadShape, find_kernels
from attnc.compiler.kernels.index_text import NotInKernelsError
from attnc.compiler.kernels.kernel_source import BYTES
from attnc.compiler.kernels.standalone_file import Provenance, emit_standalone
from attnc.compiler.kernels.targets import TARGETS
from attnc.runtime.call.call_errors import UnsupportedError, needing_torch
from attnc.runtime.call.target_names import find_target
from attnc.runtime.commands import console
from attnc.runtime.commands.patterns import add_pattern, analysed, value_json
from attnc.runtime.disk.whole import write_for_user
from attnc.runtime.patterns.pattern_analysis import PatternAnalysis
from attnc.spec.program import Value
from attnc.spec.suggest import did_you_mean

if TYPE_CHECKING:
    from attnc.runtime.toolchain.binaries import Manifest


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `emit`."""
    add_pattern(parser)
    parser.add_argument(
        "--target", metavar="NAME", default="sm_90", help=f"GPU architecture: {', '.join(TARGETS)} (default sm_90)"
    )
    parser.add_argument(
        "--head-dim", metavar="N", type=int, default=64, help="head dimension of queries and keys (default 64)"
    )
    parser.add_argument(
        "--value-dim", metavar="N", type=int, help="head dimension of values (default: the same as --head-dim)"
    )
    parser.add_argument("--dtype", metavar="NAME", default="bfloat16", help=f"{', '.join(BYTES)} (default bfloat16)")
    parser.add_argument("-o", dest="out", metavar="FILE.py", type=Path, help="write to this file instead of stdout")
    parser.add_argument(
        "--binaries",
        metavar="FILE.zip",
        type=Path,
        help="compile the kernels that compile_attention would run, ahead of time, into a file for `attnc cache load`",
    )
    parser.add_argument(
        "--heads", metavar="Q[,KV]", default="8", help="query heads and kv heads, for --binaries (default 8)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the file and return the exit status."""
    _check(args)
    attention = analysed(args)
    if args.binaries is not None:
        manifest = _compile_ahead(attention, args)
        if args.out is None:
            answer = {"file": str(args.binaries), "binaries": asdict(manifest)}
            console.print_answer(args, answer, f"{args.binaries}: {manifest}")
            return console.FINE
    text = emitted(attention, args.target, args.head_dim, args.value_dim or args.head_dim, args.dtype)
    if args.out is not None:
        write_for_user(args.out, text.encode())
    if args.json:
        console.print_json({"file": None if args.out is None else str(args.out), "text": text})
    elif args.out is None:
        print(text, end="")
    else:
        print(f"{args.out}: {console.counted(text.count(chr(10)), 'line')}; `python {args.out}` checks it")
    return console.FINE


def emitted(attention: PatternAnalysis, target: str, dk: int, dv: int, dtype: str) -> str:
    """Return the text of the file of a pattern for heads of these widths. Raises ArgumentError, UnsupportedError."""
    heads, bound = HeadShape(dk, dv, dtype), attention.bound
    params = "".join(f" -p {name}={_parameter_text(value)}" for name, value in bound.values.items())
    widths = f"--head-dim {dk}" + ("" if dv == dk else f" --value-dim {dv}")
    command = f"attnc emit {attention.name}{params} --target {target} {widths} --dtype {dtype}"
    try:
        if attention.is_recurrence:
            raise NotInKernelsError("recurrences")
        if len(attention.pattern.nodes) > 1 or attention.pattern.combine is not None:
            raise NotInKernelsError("several attentions")
        kernels = find_kernels(replace(attention.pattern, general=None), heads, find_target(target))
        provenance = Provenance(__version__, bound.program.source.text, command)
        return emit_standalone(attention.pattern, kernels, provenance)
    except NotInKernelsError as error:
        raise UnsupportedError(
            f"emit `{attention.name}`: `attnc emit` does not support {error}; `attend.source()` shows the kernels that "
            f"attnc runs"
        ) from error


def _compile_ahead(attention: PatternAnalysis, args: argparse.Namespace) -> Manifest:
    """Compile the kernels ahead of time, write them to the file of binaries, and return its manifest."""
    with needing_torch("`attnc emit --binaries`, which compiles what calls of torch run,"):
        from attnc.runtime.call.device_targets import check_triton  # needs torch, which may be missing
        from attnc.runtime.toolchain.ahead import AheadCalls, compile_ahead  # needs torch, which may be missing
        from attnc.runtime.toolchain.binaries import pack  # needs torch, which may be missing

    check_triton()
    heads, kv_heads = _heads(args.heads)
    target, dk = find_target(args.target).name, args.head_dim
    calls = AheadCalls(
        attention._compiled._core.planner.text, target, heads, kv_heads, dk, args.value_dim or dk, args.dtype
    )
    with tempfile.TemporaryDirectory(prefix="attnc-binaries-") as folder, console.progress("kernels", 12) as step:
        kernels = []
        for kernel in compile_ahead(calls, Path(folder)):
            step(kernel.function)
            kernels.append(kernel)
        manifest, content = pack(calls, kernels, Path(folder))
    write_for_user(args.binaries, content)
    return manifest


def _heads(text: str) -> tuple[int, int]:
    numbers = [int(part) for part in text.split(",")] if re.fullmatch(r"[0-9]{1,6}(,[0-9]{1,6})?", text) else []
    if not numbers or min(numbers) < 1 or numbers[0] % numbers[-1]:
        raise console.UsageError(
            f"--heads {text}: write the number of query heads, or query heads and kv heads as in 32,8; query heads "
            f"must be a multiple of kv heads"
        )
    return numbers[0], numbers[-1]


def _parameter_text(value: Value) -> str:
    """Return a parameter value as `-p` takes it."""
    text = json.dumps(value_json(value), separators=(",", ":")).replace('"', "")
    return shlex.quote(text)


def _check(args: argparse.Namespace) -> None:
    if args.dtype not in BYTES:
        allowed = f"use one of {', '.join(BYTES)}"
        raise console.UsageError(f"--dtype {args.dtype}: {did_you_mean(args.dtype, list(BYTES), allowed)}")
    console.check_at_least(1, ("--head-dim", args.head_dim), ("--value-dim", args.value_dim))
    if args.binaries is not None and args.binaries.suffix != ".zip":
        raise console.UsageError(f"--binaries {args.binaries}: the name of the file must end in .zip")
    if args.out is not None and args.out.suffix != ".py":
        raise console.UsageError(f"-o {args.out}: the file is Python; its name must end in .py")
