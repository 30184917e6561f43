"""Run the benchmarks of this machine, a process for each part: `python benchmarks/run.py cpu`; see --help and --list.

Rows that were measured on this machine with these sources and versions are not measured again, except with --fresh.
The exit status is 1 if a part failed or a result is wrong.
"""

from __future__ import annotations

import argparse
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import all_goals
import causes
import goals
import reading
import suites
from benchmark_part import ROOT, NoDeviceError, Part, Row, Setting, is_complete, is_wrong, setting_of

from attnc.runtime.commands.console import print_json, progress

How = Literal["complete", "was complete", "wrong", "failed", "stopped", "not begun"]

ENDING = 15.0
"""Seconds in which a part must end after the request."""


@dataclass(frozen=True)
class Ended:
    """The end of a part's process: its outcome, rows, minutes and last output."""

    part: Part
    how: How
    rows: int
    minutes: float
    said: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts of a suite, then print the verdicts of its goals."""
    options = _options(arguments)
    parts = suites.chosen(options.where, options.suite)
    if options.list:
        for part in parts:
            print(f"{part.name:24} {part.suite:13} {part.minutes:4.1f} min  {part.description}")
        return 0
    try:
        setting = setting_of(options.where, options.toy)
    except NoDeviceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    ended = list(_all(parts, setting, options.budget, fresh=options.fresh))
    _tell(options.where, options.suite, ended, as_json=options.json, folder=parts[0].file(options.toy).parent)
    if options.html is not None:
        import report

        options.html.write_text(report.page(parts[0].file(options.toy).parent), encoding="utf-8")
        print("written to", options.html, file=sys.stderr)
    return 1 if any(one.how in ("wrong", "failed") for one in ended) else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("where", choices=list(suites.PARTS))
    parser.add_argument("--suite", choices=[*suites.SUITES, "all"], default="all")
    parser.add_argument(
        "--budget", type=float, metavar="MIN", help="maximum minutes; parts that do not fit wait for the next run"
    )
    parser.add_argument(
        "--toy", action="store_true", help="run all code at toy sizes, in seconds; the figures mean nothing"
    )
    parser.add_argument("--fresh", action="store_true", help="measure finished rows again")
    parser.add_argument("--list", action="store_true", help="list the parts and exit")
    parser.add_argument("--json", action="store_true", help="print the verdicts as JSON")
    parser.add_argument(
        "--html", type=Path, nargs="?", const=Path("performance.html"), help="write the report as one page"
    )
    return parser.parse_args(arguments)


def _all(parts: Sequence[Part], setting: Setting, budget: float | None, *, fresh: bool) -> Iterator[Ended]:
    """Run every part in turn; with a budget the parts that have time, the last stopped at its end."""
    until = None if budget is None else time.monotonic() + 60 * budget
    with progress("benchmarks", len(parts)) as step:
        for number, part in enumerate(parts, 1):
            step(part.name, number)
            left = None if until is None else until - time.monotonic()
            under = partial(step, done=number)
            ended = _one(part, setting, left, under, fresh=fresh)
            print(f"{part.name:24} {ended.how:13} {ended.rows:4} rows {ended.minutes:6.1f} min", file=sys.stderr)
            if ended.said:
                print(ended.said, file=sys.stderr)
            yield ended


def _one(part: Part, setting: Setting, left: float | None, step: Callable[[str], None], *, fresh: bool) -> Ended:
    """Run a part unless it is complete or has no time; `left` is in seconds."""
    out = part.file(setting.toy)
    if not fresh and is_complete(part, setting, out):
        return Ended(part, "was complete", len(_rows(part, setting)), 0)
    if left is not None and left < (0 if setting.toy else 60 * part.minutes):
        return Ended(part, "not begun", 0, 0)
    begun = time.monotonic()
    status, said = _process(part, setting, left, step, fresh=fresh)
    rows = _rows(part, setting)
    minutes = (time.monotonic() - begun) / 60
    if status is None:
        return Ended(part, "stopped", len(rows), minutes)
    if any(map(is_wrong, rows)):
        return Ended(part, "wrong", len(rows), minutes, said)
    return Ended(part, "complete" if status == 0 else "failed", len(rows), minutes, said if status else "")


def _rows(part: Part, setting: Setting) -> Sequence[Row]:
    result = reading.load(part.file(setting.toy).parent).get(part.name)
    return result.rows if result else ()


def _process(
    part: Part, setting: Setting, left: float | None, step: Callable[[str], None], *, fresh: bool
) -> tuple[int | None, str]:
    """Return the status of a part's process, None if its time was over, and its last output."""
    out = part.file(setting.toy)
    command = [sys.executable, str(ROOT / "benchmarks" / "part.py"), part.name, "--out", str(out)]
    command += ["--toy"] * setting.toy + ["--fresh"] * fresh
    said: list[str] = []
    until = math.inf if left is None else time.monotonic() + left
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        timers = [] if left is None else _timers(process, left)
        try:
            for line in process.stdout or ():
                said = [*said[-14:], line.rstrip()]
                step(line.strip())
            process.wait()
        finally:
            for timer in timers:
                timer.cancel()
            process.terminate()  # no effect if it has ended
    stopped = process.returncode != 0 and time.monotonic() >= until
    return None if stopped else process.returncode, "\n".join(said)


def _timers(process: subprocess.Popen[str], left: float) -> list[threading.Timer]:
    """Ask a process to end when its time is over, and kill it a little later."""
    timers = [threading.Timer(left, process.terminate), threading.Timer(left + ENDING, process.kill)]
    for timer in timers:
        timer.daemon = True
        timer.start()
    return timers


def _tell(where: str, suite: str, ended: Sequence[Ended], *, as_json: bool, folder: Path) -> None:
    """Print how the parts ended, and the verdicts of the goals of these suites."""
    results = reading.load(folder)
    wanted = [goal for goal in all_goals.GOALS if goal.where == where and suite in ("all", goal.suite)]
    verdicts = [goals.verdict(goal, reading.rows(results), causes.why) for goal in wanted]
    if as_json:
        parts = [{"part": one.part.name, "ended": one.how, "rows": one.rows, "minutes": one.minutes} for one in ended]
        print_json({"where": where, "parts": parts, "goals": [_as_json(one) for one in verdicts]})
        return
    for one in verdicts:
        print(one.line())


def _as_json(verdict: goals.Verdict) -> dict[str, object]:
    goal = verdict.goal
    return {
        "goal": goal.key,
        "asks": goal.asks,
        "target": goal.target,
        "least": goal.least,
        "unit": goal.unit,
        "value": None if verdict.value is None or math.isinf(verdict.value) else verdict.value,
        "how": goal.how,
        "of": verdict.count,
        "verdict": verdict.word,
        "behind": [asdict(row) | {"value": goals.shown(row.value, goal.unit)} for row in verdict.behind],
        "wrong": verdict.wrong,
    }


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the running part too
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
