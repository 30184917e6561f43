"""Fuzzing of texts: each is accepted or refused within a time limit, and every message has a position.

`python tests/support/fuzzing.py --cases 100000` (`make fuzz`) examines cases 0 to 99,999 in separate processes, each
with 256 MB more than an idle one uses, and writes its findings to `benchmarks/results/fuzz.json`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from attnc.runtime.texts.diagnosis import diagnosed
from attnc.runtime.texts.library import ModuleLoader
from attnc.spec.codes import CODES
from attnc.spec.diagnostics import Diagnostic, Severity
from attnc.spec.errors import AttncError, SpecError
from attnc.spec.formatting import formatted
from attnc.spec.load import load_programs
from attnc.spec.meaning.bind import bind
from attnc.spec.meaning.evaluate import Evaluator
from attnc.spec.reading.source_text import decode
from attnc.spec.source import SourceFile

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from provenance import header, refuse_uncommitted

import mutants

SECONDS, MEGABYTES = 1.0, 256
FORMATTED = 4
"""The fraction of texts that are formatted, twice, is 1 / `FORMATTED`."""

ROOT = Path(__file__).parents[2]


class TooLongError(BaseException):
    """A case takes several times its limit."""


@dataclass
class Findings:
    """The results of cases; `faults`: the number of a case and the fault of attnc."""

    cases: int = 0
    right: int = 0
    slowest: tuple[float, int] = (0.0, -1)
    codes: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        """Add the findings of other cases."""
        self.cases += other.cases
        self.right += other.right
        self.slowest = max(self.slowest, other.slowest)
        self.codes += other.codes
        self.faults += other.faults


def examine(text: str) -> tuple[list[str], str | None]:
    """Return the codes of a text's diagnostics, and the fault of attnc if there is one."""
    try:
        diagnostics = _diagnosed(text)
    except AttncError as error:
        return [], None if re.search(r"\[A9\d\d\]", str(error)) else f"no place: {error!r}"
    except TooLongError:
        return [], f"more than {SECONDS:g} s"
    except BaseException as error:
        return [], "".join(traceback.format_exception(error))[-1500:]
    for diagnostic in diagnostics:
        span = diagnostic.primary.span
        if not 0 <= span.start <= span.end <= max(len(span.source.text), 1) or diagnostic.code not in CODES:
            return [], f"a place outside of the text, or no code: {diagnostic}"
        if not (diagnostic.message and diagnostic.message[0] != " "):
            return [], f"no message: {diagnostic}"
    return [d.code for d in diagnostics], None


def _diagnosed(text: str) -> list[Diagnostic]:
    """Return every diagnostic of checking, binding and lowering."""
    try:
        source = decode(text.encode("utf-8", "surrogatepass"), "case.attn")
    except SpecError as error:
        return list(error.diagnostics)
    loader = ModuleLoader(None)
    diagnostics = list(diagnosed(source, loader))
    parsed = {"A0", "A1", "A5"}.isdisjoint(d.code[:2] for d in diagnostics)
    if len(text) % FORMATTED == 0 and parsed:
        once = formatted(source)
        assert formatted(SourceFile("case.attn", once)) == once, "the form is not stable"
    if any(d.severity is Severity.ERROR for d in diagnostics):
        return diagnostics
    for program in load_programs(source, loader):
        if not program.inputs and all(parameter.default is not None for parameter in program.parameters):
            Evaluator(bind(program), queries=2, keys=2, heads=2, dk=2, dv=2).mask()
    return diagnostics


def run(first: int, last: int) -> Findings:
    """Run the cases `first` to `last`, one after another."""
    findings = Findings()
    gc.collect()
    gc.freeze()  # keep the collector from scanning older objects in a case's time
    for number in range(first, last):
        text = mutants.text(number)
        start = time.process_time()  # CPU time of this process, whatever else the machine does
        with deadline(5 * SECONDS):
            codes, fault = examine(text)
        taken = time.process_time() - start
        if fault is None and taken > SECONDS:
            fault = f"{taken:.2f} s"
        findings.add(
            Findings(
                1,
                fault is None and all(code > "W" for code in codes),
                (taken, number),
                Counter(codes),
                [(number, fault)] if fault else [],
            )
        )
    gc.unfreeze()
    return findings


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise TooLongError inside the context after this many seconds of CPU time."""
    signal.signal(signal.SIGPROF, _ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _ring(number: int, frame: FrameType | None) -> None:
    raise TooLongError


def _with_little_memory() -> None:
    examine("pattern p\n    visible k <= q\n")  # imports and caches are not counted
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = max(used, pages) + MEGABYTES * 1024 * 1024
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _parts(cases: int, size: int = 1000) -> Iterator[tuple[int, int]]:
    for first in range(0, cases, size):
        yield first, min(first + size, cases)


def main() -> int:
    """Examine the cases, print the findings and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    refuse_uncommitted()
    findings, start = Findings(), time.time()
    with ProcessPoolExecutor(args.processes, initializer=_with_little_memory) as pool:
        for part in pool.map(run, *zip(*_parts(args.cases), strict=True)):
            findings.add(part)
            print(f"\r{findings.cases:,} of {args.cases:,} cases, {len(findings.faults)} faults", end="", flush=True)
    print()
    report = {
        **header(),
        "cases": findings.cases,
        "seconds": round(time.time() - start),
        "limits": {"seconds": SECONDS, "megabytes": MEGABYTES},
        "right": findings.right,
        "slowest": {"seconds": round(findings.slowest[0], 3), "case": findings.slowest[1]},
        "codes": dict(sorted(findings.codes.items())),
        "faults": [{"case": number, "what": what} for number, what in sorted(findings.faults)],
    }
    path = ROOT / "benchmarks" / "results" / "fuzz.json"
    refuse_uncommitted()
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for number, what in findings.faults[:20]:
        print(f"case {number}: {what}\n")
    print(f"written to {path}")
    return 1 if findings.faults else 0


if __name__ == "__main__":
    sys.exit(main())
