"""Kernels compiled ahead of time, without a GPU: the kernels that calls of a pattern launch, as Triton caches them.

A child process (`python -m attnc.runtime.toolchain.ahead`) makes the calls on tensors of zeros. Every kernel
that a call would launch is passed to Triton's JIT instead, for a GPU that need not be present. Triton's cache then
holds what the same call looks up on that GPU.
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

from attnc.runtime.call.call_errors import ArgumentError, UnsupportedError


@dataclass(frozen=True, slots=True)
class AheadCalls:
    """The calls to compile for: a pattern as text (`identity`), a target, and the number and width of heads."""

    pattern: str
    target: str
    heads: int
    kv_heads: int
    dk: int
    dv: int
    dtype: str


@dataclass(frozen=True, slots=True)
class AheadKernel:
    """A compiled kernel; `key`: its folder in Triton's cache; `shared`: shared memory in bytes."""

    function: str
    stage: str
    digest: str
    tiles: str
    shared: int
    key: str


def compile_ahead(calls: AheadCalls, folder: Path) -> Iterator[AheadKernel]:
    """Compile into a folder with the layout of Triton's cache; yield the kernels as they are finished.

    Raises UnsupportedError if a call has no kernels, or if a compiler fails.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for name in ("TRITON_INTERPRET", "TRITON_DISABLE_LINE_INFO"):
        environment.pop(name, None)
    environment |= {"TRITON_CACHE_DIR": str(folder), "TRITON_STORE_BINARY_ONLY": "1"}
    child = subprocess.Popen(
        [sys.executable, "-m", "attnc.runtime.toolchain.ahead"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert child.stdin and child.stdout and child.stderr
    try:
        child.stdin.write(json.dumps(asdict(calls)))
        child.stdin.close()
        for line in child.stdout:
            message = json.loads(line)
            if "error" in message:
                raise UnsupportedError(message["error"])
            yield AheadKernel(**message)
        stderr_lines = child.stderr.read().strip().splitlines()
        if child.wait():
            raise UnsupportedError(
                f"compiling ahead of time failed: {stderr_lines[-1] if stderr_lines else f'status {child.wait()}'}"
            )
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
        child.stderr.close()


# --- the child -------------------------------------------------------------------------------------------------------


class _Absent:
    """A driver of a GPU that is not present: Triton asks the driver for the compilation target."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def absent(target: str) -> _Absent:
    """Return the driver of a GPU of a target."""
    from triton.backends.compiler import GPUTarget  # optional

    if target.startswith("gfx"):
        return _Absent(GPUTarget("hip", target, 64))
    return _Absent(GPUTarget("cuda", int(target.removeprefix("sm_")), 32))


def _serve() -> None:
    """Run the child: read the calls from standard input, write kernels to standard output, one per line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    calls = AheadCalls(**json.load(sys.stdin))
    try:
        for kernel in _compiled(calls):
            print(json.dumps(asdict(kernel)), file=answers, flush=True)
    except (ArgumentError, UnsupportedError) as error:
        print(json.dumps({"error": str(error)}), file=answers, flush=True)


def _compiled(calls: AheadCalls) -> Iterator[AheadKernel]:
    import triton  # optional

    from attnc.compiler.kernels.targets import TARGETS  # only in the process that compiles
    from attnc.runtime.call.device_targets import pretending  # only in the process that compiles
    from attnc.runtime.executors.triton.launch import started_by  # only in the process that compiles

    triton.runtime.driver.set_active(absent(calls.target))
    launches: dict[str, tuple[Any, Sequence[object]]] = {}

    def keep(source: Any, grid: object, arguments: Sequence[object]) -> None:
        launches.setdefault(source.digest, (source, arguments))

    with pretending(TARGETS[calls.target]), started_by(keep):
        _make(calls)
    yield from (_compile(source, arguments) for source, arguments in launches.values())


def _compile(source: Any, arguments: Sequence[object]) -> AheadKernel:
    from triton.runtime.cache import _base32  # optional

    from attnc.runtime.executors.triton.launch import function_of  # only in the process that compiles

    kernel = function_of(source).warmup(*arguments, grid=(1, 1), **source.options)
    shared, key = int(kernel.metadata.shared), _base32(kernel.hash)
    return AheadKernel(source.function, source.stage, source.digest, str(source.tiles), shared, key)


LENGTH = 384
"""Number of tokens of the calls if the pattern does not fix it; kernels do not depend on lengths."""

PAGE = 64
QUERIES = (1, 2, 4, 8, 16)


def _make(calls: AheadCalls) -> None:
    """Call forward, gradients and, if they have kernels, decoding steps, on zeros."""
    import torch  # may be missing

    from attnc.runtime.api.attention import Attention  # only in the process that compiles
    from attnc.runtime.api.compiled import Options  # only in the process that compiles
    from attnc.runtime.call.example_inputs import example_inputs  # only in the process that compiles
    from attnc.runtime.call.lengths import natural_length  # only in the process that compiles
    from attnc.runtime.texts.identity import read  # only in the process that compiles

    bound, _, _ = read(calls.pattern)
    attention = Attention(bound, Options("triton", strict=True), {})
    n = natural_length(bound, LENGTH) or LENGTH
    shapes = (calls.heads, n, calls.dk), (calls.kv_heads, n, calls.dk), (calls.kv_heads, n, calls.dv)
    dtype = getattr(torch, calls.dtype)
    q, k, v = (torch.zeros(1, *shape, dtype=dtype, requires_grad=True) for shape in shapes)
    examples = example_inputs(bound, n, n, {}, heads=calls.heads, sizes={"dk": calls.dk, "dv": calls.dv})
    inputs: dict[str, Any] = {name: example.tensor for name, example in examples.items()}
    results: list[tuple[torch.Tensor, ...]] = [(attention(q, k, v, **inputs),)]
    if attention.has_lse:
        results.append(attention(q, k, v, return_lse=True, **inputs))
    for outputs in results:
        torch.autograd.grad(outputs, (q, k, v), tuple(map(torch.zeros_like, outputs)))
    with torch.no_grad(), suppress(UnsupportedError):  # patterns without kernels for decoding steps are skipped
        for rows in QUERIES:
            step_inputs = {
                tensor.name: _last(inputs[tensor.name], tensor.dims, rows) for tensor in attention.pattern.tensors
            }
            for cache in _caches(attention, q[:, :, -rows:], k, v):
                attention.decode(q[:, :, -rows:], **cache, **step_inputs)


def _last(x: Any, dims: Sequence[str | int], rows: int) -> Any:
    """Return an input restricted to the last queries."""
    axis = list(dims).index("query") if "query" in dims else None
    return x if axis is None else x.narrow(axis, x.shape[axis] - rows, rows)


def _caches(attention: Any, q: Any, k: Any, v: Any) -> Iterator[dict[str, Any]]:
    """Yield a cache by slot, a cache by page, and a ring if the pattern can use one."""
    from attnc.runtime.planning.cache_arguments import CacheArguments  # only in the process that compiles

    n = k.shape[2]
    yield {"k_cache": k, "v_cache": v, "kv_len": n}
    pages = -(-n // PAGE)
    pools = (x.new_zeros(pages, x.shape[1], PAGE, x.shape[3]) for x in (k, v))
    yield dict(zip(("k_cache", "v_cache"), pools, strict=True)) | {"kv_len": n, "block_table": [list(range(pages))]}
    with suppress(ArgumentError, UnsupportedError):
        CacheArguments(q, k, v, n, None, True, None, {}).first_ring_token(attention.pattern, n)
        yield {"k_cache": k, "v_cache": v, "kv_len": n, "ring": True}


if __name__ == "__main__":
    _serve()
