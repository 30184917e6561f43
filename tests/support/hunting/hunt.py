"""The loop over cases, and its output."""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import count

from hunting.attentions import Drawn, attention
from hunting.calls import Mismatch, check_case
from hunting.hostile import check_text
from hunting.plans import check_plan
from hunting.recurrences import recurrence

Case = Callable[[int], list[str]]


def draw(part: str, seed: int) -> tuple[Drawn, random.Random]:
    """Return the pattern of a case, and the random source for its calls."""
    rng = random.Random(f"{part} {seed}")
    return (recurrence(rng) if rng.random() < 0.25 else attention(rng)), rng


def on_cpu(seed: int) -> list[str]:
    """Check a pattern on the CPU executor. Raise Mismatch."""
    drawn, rng = draw("cpu", seed)
    return _checked(drawn, rng, "cpu", 40)


def in_interpreter(seed: int) -> list[str]:
    """Check a pattern by kernels in Triton's interpreter. Raise Mismatch."""
    drawn, rng = draw("triton", seed)
    return _checked(drawn, rng, "triton", 33, calls=2)


def _checked(drawn: Drawn, rng: random.Random, backend: str, longest: int, calls: int = 3) -> list[str]:
    try:
        return check_case(drawn, rng, backend, longest, calls)
    except Mismatch as difference:
        raise Mismatch(f"{drawn.text}\n  {difference}") from difference


PARTS: dict[str, Case] = {"cpu": on_cpu, "triton": in_interpreter, "hostile": check_text, "plans": check_plan}


def run(parts: list[str], first: int, until: float, cases: int | None, go_on: bool) -> int:
    """Draw cases of all parts in turn and print every mismatch; return 1 if there was one."""
    tally = {part: Counter[str]() for part in parts}
    wrong = 0
    seed = first
    for seed in count(first):
        if time.monotonic() >= until or (cases is not None and seed >= first + cases):
            break
        for part in parts:
            try:
                tally[part].update(PARTS[part](seed))
            except Mismatch as difference:
                wrong += 1
                tally[part]["MISMATCH"] += 1
                print(f"--- {part}, case {seed}: --part {part} --seed {seed} --cases 1\n{difference}\n", flush=True)
                if not go_on:
                    return 1
            if time.monotonic() >= until:
                break
    print(f"seeds {first} to {seed - 1}")
    for part in parts:
        _print(part, tally[part])
    return 1 if wrong else 0


def _print(part: str, tally: Counter[str]) -> None:
    total = sum(tally.values())
    agreed = tally.pop("agreed", 0)
    print(f"{part}: {total} calls, {agreed} agreed, {total - agreed} otherwise", flush=True)
    for words, number in tally.most_common(40):
        print(f"  {number:5} {words}", file=sys.stdout)
