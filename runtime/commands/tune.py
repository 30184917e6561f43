"""`attnc tune`: the first few schedules of calls measured, and the fastest kept for their bucket of shapes."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from attnc.runtime.attention import Attention
from attnc.runtime.commands import console
from attnc.runtime.commands.call_arguments import add_call, calls
from attnc.runtime.commands.console import UsageError
from attnc.runtime.commands.patterns import compiled, value_json
from attnc.runtime.disk.store import store
from attnc.runtime.tuning.choice_source import read_wanted
from attnc.runtime.tuning.records import KIND, Record
from attnc.runtime.tuning.tuned_tables import load_table, save_tuned
from attnc.runtime.tuning.tuner import Untuned, tune

SECONDS = "2s"


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tune`."""
    add_call(parser)
    parser.add_argument(
        "--time",
        metavar="T",
        default=SECONDS,
        help=f"to measure in, for each length: 500ms, 2s, 1m (default {SECONDS})",
    )
    parser.add_argument("--again", action="store_true", help="measure although the cache knows")
    parser.add_argument(
        "-o",
        dest="out",
        metavar="TABLE.json",
        type=Path,
        help="add what is found to a table, for compile_attention(…, tune=TABLE.json)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure; print what was predicted beside what was measured."""
    wanted = read_wanted(args.time)
    if not wanted.seconds:
        raise UsageError(f"--time {args.time}: write a time above 0, such as 2s")
    if args.out is not None and args.out.suffix.lower() != ".json":
        raise UsageError(f"-o {args.out}: name it {args.out.with_suffix('.json')}, as tune=… knows tables by that")
    known = load_table(args.out).records if args.out is not None and args.out.exists() else {}
    attention = compiled(args, tune=args.time)
    answers, words = _tuned(attention, wanted.seconds, args)
    records = [answer for answer in answers if isinstance(answer, Record)]
    if args.out is not None and records:
        found = {**known, **{record.name: record for record in records}}
        save_tuned(args.out, *found.values())
    if args.json:
        console.print_json(_as_json(attention, answers, words, args.out))
        return _status(answers)
    for name, text in words.items():
        print(f"input {name}: {text}")
    for answer in answers:
        print(answer if isinstance(answer, Record) else f"`{attention.name}`: {answer}")
    if not records:
        return _status(answers)
    if args.out is not None:
        print(f"{args.out}: {console.counted(len(found), 'bucket')}")
    else:
        print(f'kept in {store().folder}; compile_attention(…, tune="0s") takes it from there')
    return _status(answers)


def _status(answers: list[Record | Untuned]) -> int:
    """1 where something was to be measured and was not."""
    failed = [one for one in answers if isinstance(one, Untuned) and not one.expected]
    return console.FOUND if failed else console.FINE


def _tuned(
    attention: Attention, seconds: float, args: argparse.Namespace
) -> tuple[list[Record | Untuned], dict[str, str]]:
    """The record of every call, and words about inputs."""
    asked, tuned = calls(attention, args), attention.tuned
    assert tuned is not None
    found: list[Record | Untuned] = []
    words: dict[str, str] = {}
    with console.progress("tune", len(asked)) as step:
        for i, call in enumerate(asked):
            words |= call.words

            def told(text: str, at: int = i, n: int = call.sizes.n_q) -> None:
                step(f"{n} tokens, {text}", at)

            asked_call = attention._tuning_call(call.q, call.k, call.v, None, call.inputs)
            record = tune(asked_call, tuned, seconds, told, again=args.again)
            found.append(record)
    return found, words


def _as_json(
    attention: Attention, answers: list[Record | Untuned], words: dict[str, str], out: Path | None
) -> dict[str, object]:
    return {
        "pattern": attention.name,
        "params": {name: value_json(value) for name, value in attention.bound.values.items()},
        "examples": words,
        "table": None if out is None else str(out),
        "tuned": [
            {
                "bucket": record.bucket,
                "stage": record.stage,
                "entry": f"{KIND}-{record.name}",
                "choices": dict(record.choices),
                "trials": [asdict(trial) for trial in record.trials],
            }
            for record in answers
            if isinstance(record, Record)
        ],
        "diagnostics": [console.message_json(str(answer)) for answer in answers if isinstance(answer, Untuned)],
    }
