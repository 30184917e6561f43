"""Kernels compiled ahead of time: what calls of a pattern would start, as Triton keeps it, without a GPU.

A child process (`python -m attnc.runtime.gpu.ahead`) makes the calls on tensors without meaning; each kernel that a
call would start is given to Triton's JIT instead, for a GPU that is not there. What then lies in Triton's cache is what
the same call finds there on that GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attnc.runtime.call_errors import ArgumentError, UnsupportedError


@dataclass(frozen=True, slots=True)
class AheadCalls:
    """What is called: a pattern as text (`identity`), on a target, for heads of one kind."""

    pattern: str
    target: str
    heads: int
    kv_heads: int
    dk: int
    dv: int
    dtype: str


@dataclass(frozen=True, slots=True)
class AheadKernel:
    """A kernel that was compiled; `key`: the folder of Triton's cache that it lies in. Shared memory in bytes."""

    function: str
    stage: str
    digest: str
    tiles: str
    shared: int
    key: str


def compile_ahead(calls: AheadCalls, folder: Path) -> Iterator[AheadKernel]:
    """Compile into a folder, laid out as Triton's cache is: the kernels, as they are done.

    Raises UnsupportedError where a call has no kernels, or where a compiler fails.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for name in ("TRITON_INTERPRET", "TRITON_DISABLE_LINE_INFO"):
        environment.pop(name, None)
    environment |= {"TRITON_CACHE_DIR": str(folder), "TRITON_STORE_BINARY_ONLY": "1"}
    child = subprocess.Popen(
        [sys.executable, "-m", "attnc.runtime.gpu.ahead"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert child.stdin and child.stdout and child.stderr
    try:
        child.stdin.write(json.dumps(asdict(calls)))
        child.stdin.close()
        for line in child.stdout:
            told = json.loads(line)
            if "error" in told:
                raise UnsupportedError(told["error"])
            yield AheadKernel(**told)
        said = child.stderr.read().strip().splitlines()
        if child.wait():
            raise UnsupportedError(f"compiling ahead of time failed: {said[-1] if said else f'status {child.wait()}'}")
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
        child.stderr.close()


# --- the child -------------------------------------------------------------------------------------------------------


class _Absent:
    """A driver of a GPU that is not there: Triton asks it what to compile for."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def absent(target: str) -> _Absent:
    """The driver of a GPU of a target."""
    from triton.backends.compiler import GPUTarget

    if target.startswith("gfx"):
        return _Absent(GPUTarget("hip", target, 64))
    return _Absent(GPUTarget("cuda", int(target.removeprefix("sm_")), 32))


def _serve() -> None:
    """The child's work: calls come on standard input, kernels go to standard output, one a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    calls = AheadCalls(**json.load(sys.stdin))
    try:
        for kernel in _compiled(calls):
            print(json.dumps(asdict(kernel)), file=answers, flush=True)
    except (ArgumentError, UnsupportedError) as error:
        print(json.dumps({"error": str(error)}), file=answers, flush=True)


def _compiled(calls: AheadCalls) -> Iterator[AheadKernel]:
    import triton

    from attnc.compiler.kernels.targets import TARGETS
    from attnc.runtime.gpu.device_targets import pretending
    from attnc.runtime.gpu.launch import started_by

    triton.runtime.driver.set_active(absent(calls.target))
    found: dict[str, tuple[Any, Sequence[object]]] = {}

    def keep(source: Any, grid: object, arguments: Sequence[object]) -> None:
        found.setdefault(source.digest, (source, arguments))

    with pretending(TARGETS[calls.target]), started_by(keep):
        _make(calls)
    yield from (_compile(source, arguments) for source, arguments in found.values())


def _compile(source: Any, arguments: Sequence[object]) -> AheadKernel:
    from triton.runtime.cache import _base32

    from attnc.runtime.gpu.kernel_modules import function_of

    kernel = function_of(source).warmup(*arguments, grid=(1, 1), **source.options)
    shared, key = int(kernel.metadata.shared), _base32(kernel.hash)
    return AheadKernel(source.function, source.stage, source.digest, str(source.tiles), shared, key)


LENGTH = 384
"""Tokens of the calls, where a pattern leaves them open: lengths make no kernels."""

PAGE = 64
QUERIES = (1, 2, 4, 8, 16)


def _make(calls: AheadCalls) -> None:
    """Forward, gradients and, where there are kernels for them, steps of decoding, on zeros."""
    import torch

    from attnc.runtime.attention import Attention
    from attnc.runtime.compiled import Options
    from attnc.runtime.example_inputs import example_inputs
    from attnc.runtime.identity import read
    from attnc.runtime.lengths import natural_length

    bound, _, _ = read(calls.pattern)
    attention = Attention(bound, Options("triton", strict=True), {})
    n = natural_length(bound, LENGTH) or LENGTH
    shapes = (calls.heads, n, calls.dk), (calls.kv_heads, n, calls.dk), (calls.kv_heads, n, calls.dv)
    dtype = getattr(torch, calls.dtype)
    q, k, v = (torch.zeros(1, *shape, dtype=dtype, requires_grad=True) for shape in shapes)
    made = example_inputs(bound, n, n, {}, heads=calls.heads, sizes={"dk": calls.dk, "dv": calls.dv})
    inputs: dict[str, Any] = {name: one.tensor for name, one in made.items()}
    results: list[tuple[torch.Tensor, ...]] = [(attention(q, k, v, **inputs),)]
    if attention.has_lse:
        results.append(attention(q, k, v, return_lse=True, **inputs))
    for outputs in results:
        torch.autograd.grad(outputs, (q, k, v), tuple(map(torch.zeros_like, outputs)))
    with torch.no_grad(), suppress(UnsupportedError):  # what has no kernels for steps has none here
        for rows in QUERIES:
            own = {tensor.name: _last(inputs[tensor.name], tensor.dims, rows) for tensor in attention.pattern.tensors}
            for cache in _caches(attention, q[:, :, -rows:], k, v):
                attention.decode(q[:, :, -rows:], **cache, **own)


def _last(x: Any, dims: Sequence[str | int], rows: int) -> Any:
    """An input of the last queries."""
    axis = list(dims).index("query") if "query" in dims else None
    return x if axis is None else x.narrow(axis, x.shape[axis] - rows, rows)


def _caches(attention: Any, q: Any, k: Any, v: Any) -> Iterator[dict[str, Any]]:
    """By slot, by page, and as a ring where a pattern needs no more."""
    from attnc.runtime import serving

    n = k.shape[2]
    yield {"k_cache": k, "v_cache": v, "kv_len": n}
    pages = -(-n // PAGE)
    pools = (x.new_zeros(pages, x.shape[1], PAGE, x.shape[3]) for x in (k, v))
    yield dict(zip(("k_cache", "v_cache"), pools, strict=True)) | {"kv_len": n, "block_table": [list(range(pages))]}
    with suppress(ArgumentError, UnsupportedError):
        serving.check_ring(attention.pattern, q, k, n)
        yield {"k_cache": k, "v_cache": v, "kv_len": n, "ring": True}


if __name__ == "__main__":
    _serve()
