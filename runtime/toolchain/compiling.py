"""Kernel compilation without a GPU, in child processes: a compiler that aborts kills only its own process.

Kernels are passed to Triton as its JIT passes them: pointers divisible by 16, descriptors by type, numbers as declared.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Timer
from time import perf_counter
from typing import IO, Any

from attnc.compiler.kernels.kernel_source import KernelSource
from attnc.runtime.executors.triton.launch import function_of
from attnc.runtime.toolchain.machine_code import MachineCode, read_amd, read_nvidia

LONGEST = 300.0
"""Timeout of one compilation, in seconds."""
_SERVE = "from attnc.runtime.toolchain.compiling import serve; serve()"
_TELLING = re.compile(r"LLVM ERROR|Assertion|error:|Error\b|fatal")


@dataclass(frozen=True, slots=True)
class CompiledBinary:
    """A compiled kernel. `shared`: bytes of shared memory per program; `tensor_memory`: its columns (sm_100).

    `products`: the largest number of asynchronous tile products that Triton put into one loop (sm_90).
    """

    code: MachineCode
    shared: int
    tensor_memory: int
    seconds: float
    products: int = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """A compilation that failed; `reason` is one line."""

    reason: str


Outcome = CompiledBinary | Failure
Job = tuple[KernelSource, str]
"""A kernel and the name of its target."""


def compile_all(
    jobs: Sequence[Job], processes: int = 1, compile_one: str = _SERVE, longest: float = LONGEST
) -> Iterator[tuple[int, Outcome]]:
    """Compile kernels in `processes` child processes; yield each kernel's index and outcome as it is finished.

    `compile_one`: the Python text that children run.
    """
    idle: SimpleQueue[_Child] = SimpleQueue()
    children = [_Child(compile_one, longest) for _ in range(max(min(processes, len(jobs)), 1))]
    for child in children:
        idle.put(child)

    def run(job: Job) -> Outcome:
        child = idle.get()
        try:
            return child.ask(job)
        finally:
            idle.put(child)

    with ThreadPoolExecutor(len(children)) as pool:
        try:
            futures = {pool.submit(run, job): i for i, job in enumerate(jobs)}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.end()


class _Child:
    """A process that compiles one kernel after another; a process that has died is started again."""

    def __init__(self, text: str, longest: float) -> None:
        self._text, self._longest = text, longest
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None

    def ask(self, job: Job) -> Outcome:
        process = self._process or self._start()
        assert process.stdin and process.stdout and self._said
        self._said.seek(0)
        self._said.truncate()
        timer = Timer(self._longest, process.kill)
        timer.start()
        try:
            pickle.dump(job, process.stdin)
            process.stdin.flush()
            outcome: Outcome = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            hung = not timer.is_alive()
            stderr_lines = self._lines()
            return Failure(f"no result after {self._longest:g} s" if hung else _death(self.end(), stderr_lines))
        finally:
            timer.cancel()
        if isinstance(outcome, Failure):
            return Failure(_with_last_line(outcome.reason, self._lines()))
        return outcome

    def end(self) -> int:
        """Stop the process and return its exit status."""
        if self._process is None:
            return 0
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        status = self._process.wait()
        self._process = None
        if self._said is not None:
            self._said.close()
        return status

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "TRITON_DISABLE_LINE_INFO": "1",
        }
        environment.pop("TRITON_INTERPRET", None)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - `end` closes it
        self._process = subprocess.Popen(
            [sys.executable, "-c", self._text],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=environment,
        )
        return self._process

    def _lines(self) -> list[str]:
        assert self._said is not None
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").splitlines()
        return [line.strip() for line in lines if line.strip()]


def _death(status: int, stderr_lines: Sequence[str]) -> str:
    how = signal.Signals(-status).name if status < 0 else f"status {status}"
    return _with_last_line(f"the compiler died ({how})", stderr_lines)


def _with_last_line(reason: str, stderr_lines: Sequence[str]) -> str:
    """Append the last informative line; a list of addresses may follow it."""
    telling = [line for line in stderr_lines if _TELLING.search(line)] or stderr_lines
    return f"{reason}: {telling[-1][:300]}" if telling else reason


def serve() -> None:
    """Run a child: kernels from standard input, outcomes to standard output, everything else to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory(prefix="attnc-kernels-") as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        while True:
            try:
                source, target = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            pickle.dump(_attempt(compile_here, source, target), answers)
            answers.flush()
            for path in Path(folder).iterdir():
                shutil.rmtree(path, ignore_errors=True)


def _attempt(compiler: Callable[[KernelSource, str], CompiledBinary], source: KernelSource, target: str) -> Outcome:
    try:
        return compiler(source, target)
    except Exception as error:  # any exception of a compiler is a result
        lines = str(error).strip().splitlines()
        return Failure(f"{type(error).__name__}: {lines[-1][:300]}" if lines else type(error).__name__)


def compile_here(source: KernelSource, target: str) -> CompiledBinary:
    """Compile a kernel in this process and read its machine code. Raises what Triton raises."""
    import triton  # optional
    from triton.backends.compiler import GPUTarget  # optional

    begun = perf_counter()
    amd = target.startswith("gfx")
    kernel = triton.compile(
        _triton_source(source),
        target=GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32),
        options=source.options,
    )
    code = read_amd(kernel.asm["amdgcn"]) if amd else _read_cubin(kernel.asm["cubin"])
    tensor_memory = getattr(kernel.metadata, "tmem_size", None) or 0
    products = products_of_loops(kernel.asm["ttgir"])
    return CompiledBinary(code, kernel.metadata.shared, tensor_memory, perf_counter() - begun, products)


def products_of_loops(text: str) -> int:
    """Return the most asynchronous products in one loop of Triton's IR text, not counting inner loops."""
    most_products, loops, depth = 0, [], 0
    for line in text.splitlines():
        if "scf.for" in line or "scf.while" in line:
            loops.append((depth, 0))
        if "ttng.warp_group_dot " in line and loops:
            level, count = loops[-1]
            loops[-1] = level, count + 1
        depth += line.count("{") - line.count("}")
        while loops and depth <= loops[-1][0]:
            most_products = max(most_products, loops.pop()[1])
    return most_products


def _triton_source(source: KernelSource) -> Any:
    from triton.compiler import ASTSource  # optional

    return ASTSource(
        fn=function_of(source),
        signature={argument.name: argument.type for argument in source.arguments},
        constexprs={},
        attrs={(i,): [["tt.divisibility", 16]] for i, a in enumerate(source.arguments) if a.is_pointer},
    )


def _read_cubin(cubin: bytes) -> MachineCode:
    """Disassemble with the tools that ship with Triton."""
    import triton  # optional

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        texts = [
            subprocess.run([tools / tool, *options, file.name], capture_output=True, text=True, check=True).stdout
            for tool, *options in (("nvdisasm", "-c", "-ndf"), ("cuobjdump", "-res-usage"))
        ]
    return read_nvidia(*texts)
