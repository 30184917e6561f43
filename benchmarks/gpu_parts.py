"""What the scripts for a GPU share: where they run, their command line, operands, errors and results."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import timing
import torch
from part import Row, Setting
from torch import Tensor

TOLERANCE = {torch.float32: 5e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Errors that are allowed, relative to the largest true entry or to 1."""

L2_BYTES = 256 << 20
"""Written between timed runs, so that each begins without its tensors in the L2."""


Parts = Mapping[str, Callable[[Setting], Iterator[Row]]]
"""What a script does, by name."""


def run(parts: Parts, told: str | None, prefix: str) -> int:
    """Run the part of a script that the command line names; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=told, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(parts))
    parser.add_argument("--toy", action="store_true", help="toy sizes, for Triton's interpreter")
    parser.add_argument("--out", type=Path, default=None, help=f"the result file (results/{prefix}-<part>.json)")
    options = parser.parse_args()
    setting = Setting("cuda" if torch.cuda.is_available() and not options.toy else "cpu", options.toy)
    if not (setting.cuda or setting.toy):
        parser.error("there is no GPU: pass --toy, with TRITON_INTERPRET=1")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    facts = timing.header()
    if setting.cuda:
        facts["device"] = torch.cuda.get_device_name()
    out = options.out or timing.RESULTS / f"{prefix}-{'toy-' if setting.toy else ''}{options.part}.json"
    return finished(parts[options.part](setting), out, facts)


def finished(rows: Iterable[Row], out: Path, facts: Mapping[str, object]) -> int:
    """Print the rows and write them, each as it comes; 1 where one of them is wrong."""
    done: list[Row] = []
    for row in rows:
        done.append(row)
        print(row, flush=True)
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps({**facts, "rows": done}, indent=1) + "\n", encoding="utf-8")
    wrong = [row for row in done if not row.get("ok", True)]
    print(f"{len(done)} rows, {len(wrong)} wrong; written to {out}")
    return 1 if wrong else 0


def operands(
    setting: Setting, n: int, dtype: torch.dtype, *, batch: int = 1, heads: tuple[int, int] = (4, 2), d: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v that want gradients."""
    sizes = (heads[0], heads[1], heads[1])
    q, k, v = (torch.randn(batch, h, n, d, device=setting.device).to(dtype).requires_grad_() for h in sizes)
    return q, k, v


def results(
    function: Callable[..., Tensor], leaves: tuple[Tensor, ...], grad: Tensor, **inputs: Tensor
) -> list[Tensor]:
    """out, dq, dk and dv."""
    out = function(*leaves, **inputs)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def errors(ours: list[Tensor], true: list[Tensor]) -> dict[str, float]:
    """By name, relative to the largest true entry or to 1; infinite for NaN."""
    found = {}
    for name, x, y in zip(("out", "dq", "dk", "dv"), ours, true, strict=True):
        gap = ((x.double() - y).abs().max() / y.abs().max().clamp(min=1)).item()
        found[name] = math.inf if math.isnan(gap) else gap
    return found
