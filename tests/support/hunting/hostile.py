"""Texts built to exhaust time or memory: each gets an answer or a clear error within two seconds."""

from __future__ import annotations

import random
import time
import tracemalloc
import warnings
from collections.abc import Callable

from attnc import AttncError, compile_attention
from fuzzing import TooLongError, deadline
from hunting.calls import Mismatch

SECONDS = 2.0
"""CPU time that an answer or an error may take, in seconds."""
WAIT = 30.0
"""CPU time after which a text is given up, in seconds."""
MEBIBYTES = 512
"""Memory in MiB that Python may hold at once meanwhile."""


def check_text(seed: int) -> list[str]:
    """Check a text that is large in one way. Raise Mismatch."""
    rng = random.Random(f"hostile {seed}")
    kind = rng.choice(sorted(TEXTS))
    size = int(10 ** rng.uniform(2, 6))
    text = TEXTS[kind](size)
    tracemalloc.start()
    started = time.process_time()
    try:
        outcome = _asked(text)
    except TooLongError as error:
        raise Mismatch(f"{kind} of {size}: no answer in {WAIT} seconds") from error
    except Exception as error:
        raise Mismatch(f"{kind} of {size}: {type(error).__name__}: {str(error)[:300]}") from error
    finally:
        took, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
    if took > 2 * SECONDS:  # tracemalloc doubles the time, so it is measured again without tracemalloc
        took = least_time(lambda: _asked(text))
        if took > SECONDS:
            raise Mismatch(f"{kind} of {size}: {took:.1f} s of CPU time")
    if peak > MEBIBYTES:
        raise Mismatch(f"{kind} of {size}: {peak:.0f} MiB")
    return [outcome]


def least_time(call: Callable[[], object], times: int = 3) -> float:
    """Return the least CPU time of up to `times` calls, as a busy machine lengthens some; stop at a short one."""
    least = float("inf")
    for _ in range(times):
        if least > SECONDS:
            started = time.process_time()
            call()
            least = min(least, time.process_time() - started)
    return least


def _asked(text: str) -> str:
    with warnings.catch_warnings(), deadline(WAIT):
        warnings.simplefilter("ignore")
        try:
            attend = compile_attention(text)
            attend.plan(256, heads=1)
            attend.mask(64)
        except AttncError as error:
            if "A901" in str(error) and "beyond 64 bits" not in str(error):  # the text itself causes this error
                raise
            if not str(error).strip():
                raise AssertionError("an error without a message") from error
            return "agreed"
    return "agreed"


def _visible(expression: str) -> str:
    return f"pattern drawn\n    align end\n    visible {expression}\n"


def _definitions(n: int, line: Callable[[int], str], last: str) -> str:
    lines = "\n".join(f"    let a{i} = {line(i)}" for i in range(n))
    return f"pattern drawn\n    align end\n{lines}\n    visible {last}\n"


TEXTS: dict[str, Callable[[int], str]] = {
    "a power": lambda n: _visible(f"q - k < 2 ** {n}"),
    "a power of powers": lambda n: _visible(f"q - k < 2 ** 2 ** {n % 100}"),
    "a power of positions": lambda n: _visible(f"(q + {n}) ** {n % 1000} > k"),
    "a list": lambda n: _visible(f"[{', '.join(['1'] * n)}][0] > q - k"),
    "a sum over a range": lambda n: _visible(f"q - k < sum(j for j in 0 .. {n})"),
    "a sum of the pair": lambda n: _visible(f"q - k < sum(j * q % 3 for j in 0 .. {n})"),
    "sums in sums": lambda n: _visible(
        f"q - k < sum(sum(sum(i + j + l for l in 0 .. {n}) for j in 0 .. {n}) for i in 0 .. {n})"
    ),
    "any over a range": lambda n: _visible(f"any(q - k == j * j for j in 0 .. {n})"),
    "a chain of or": lambda n: _visible(" or ".join(["q == k"] * min(n, 100_000))),
    "a chain of sums": lambda n: _visible(" + ".join(["q"] * min(n, 100_000)) + " > k"),
    "brackets": lambda n: _visible("(" * min(n, 100_000) + "q" + ")" * min(n, 100_000) + " > k"),
    "negations": lambda n: _visible("not " * min(n, 100_000) + "q > k"),
    "minus signs": lambda n: _visible("-" * min(n, 100_000) + "q > k"),
    "conditions": lambda n: _visible("q > k if q == 3 else " * min(n, 50_000) + "k < q"),
    "definitions that double": lambda n: _definitions(
        n % 60 + 2, lambda i: "q - k" if i == 0 else f"a{i - 1} + a{i - 1}", f"a{n % 60 + 1} > 0"
    ),
    "definitions in a row": lambda n: _definitions(
        min(n, 20_000), lambda i: "q" if i == 0 else f"a{i - 1} + 1", f"a{min(n, 20_000) - 1} > k"
    ),
    "many definitions": lambda n: _definitions(min(n, 20_000), lambda i: f"q + {i}", "a0 >= k"),
    "many patterns": lambda n: "".join(
        f"pattern p{i}\n    align end\n    visible k <= q\n\n" for i in range(min(n, 20_000))
    ),
    "many branches": lambda n: (
        "pattern drawn\n    align end\n"
        + "".join(f"    branch b{i}\n        visible q - k == {i}\n" for i in range(min(n, 10_000)))
        + "    combine b0\n"
    ),
    "lines of visible": lambda n: (
        "pattern drawn\n" + "".join(f"    visible q - k != {c}\n" for c in range(min(n, 20_000)))
    ),
    "lines of remainders": lambda n: (
        "pattern drawn\n" + "".join(f"    visible (q - k) % {c + 2} != 1\n" for c in range(min(n, 20_000)))
    ),
    "a chain of and": lambda n: _visible(" and ".join(f"k <= q + {c}" for c in range(min(n, 20_000)))),
    "brackets of functions": lambda n: _visible("abs(" * min(n, 50_000) + "q" + ")" * min(n, 50_000) + " > k"),
    "a long name of a pattern": lambda n: f"pattern {'a' * n}\n    visible k <= q\n",
    "unknown names": lambda n: "pattern drawn\n" + "".join(f"    visible x{c} > q\n" for c in range(min(n, 20_000))),
    "a family of branches": lambda n: (
        f"pattern drawn\n    align end\n    branch b[c in 0 .. {n}]\n        visible 0 <= q - k < c + 1\n"
        "    combine b[0]\n"
    ),
    "many inputs": lambda n: (
        "pattern drawn\n    align end\n"
        + "".join(f"    input x{i}: int[batch]\n" for i in range(min(n, 20_000)))
        + "    visible x0 > q - k\n"
    ),
    "a long name": lambda n: _visible(f"{'a' * n} > k"),
    "a long number": lambda n: _visible(f"{'9' * n} > q - k"),
    "a small number": lambda n: _visible(f"q - k < 1e-{n}"),
    "a grid": lambda n: f"pattern drawn\n    tokens y: {n}, x: {n}\n    visible q.y == k.y\n",
    "roots": lambda n: _visible(f"q - k < floor(sqrt(q * {n} + 1)) + floor(exp(q)) * 0"),
    "a text in quotes": lambda n: f'pattern drawn\n    """{"x" * n}"""\n    align end\n    visible k <= q\n',
    "blank lines": lambda n: "pattern drawn\n" + "\n" * n + "    visible k == q\n",
    "comments": lambda n: "pattern drawn\n" + "    # x\n" * min(n, 200_000) + "    visible k == q\n",
}
