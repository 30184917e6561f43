"""`attnc tune`: measure the best predicted schedules of calls, and store the fastest for each bucket of shapes."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from attnc.runtime.api import tuned_calls
from attnc.runtime.api.attention import Attention
from attnc.runtime.choices.choice_source import read_wanted
from attnc.runtime.choices.records import KIND, Record
from attnc.runtime.choices.tuned_tables import load_table, save_tuned
from attnc.runtime.commands import console
from attnc.runtime.commands.call_arguments import add_call, calls
from attnc.runtime.commands.console import UsageError
from attnc.runtime.commands.patterns import compiled, value_json
from attnc.runtime.disk.store import store
from attnc.runtime.tuning.tuner import Untuned, tune

SECONDS = "2s"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `tune`."""
    add_call(parser)
    parser.add_argument(
        "--time",
        metavar="T",
        default=SECONDS,
        help=f"the time to measure for, per length: 500ms, 2s, 1m (default {SECONDS})",
    )
    parser.add_argument("--again", action="store_true", help="measure even if the cache has an entry")
    parser.add_argument(
        "-o",
        dest="out",
        metavar="TABLE.json",
        type=Path,
        help="add the choices to this table, for compile_attention(…, tune=TABLE.json)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure the schedules, and print the measured times beside the predicted ones."""
    request = read_wanted(args.time)
    if not request.seconds:
        raise UsageError(f"--time {args.time}: write a time above 0, as in 2s")
    if args.out is not None and args.out.suffix.lower() != ".json":
        raise UsageError(f"-o {args.out}: the name of a table must end in .json; use {args.out.with_suffix('.json')}")
    stored = load_table(args.out).records if args.out is not None and args.out.exists() else {}
    attention = compiled(args, tune=args.time)
    answers, words = _tune_calls(attention, request.seconds, args)
    records = [answer for answer in answers if isinstance(answer, Record)]
    if args.out is not None and records:
        merged = {**stored, **{record.name: record for record in records}}
        save_tuned(args.out, *merged.values())
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
        print(f"{args.out}: {console.counted(len(merged), 'bucket')}")
    else:
        print(f'stored in {store().folder}; compile_attention(…, tune="0s") uses it')
    return _status(answers)


def _status(answers: list[Record | Untuned]) -> int:
    """Return 1 if a call that should have been measured was not, else 0."""
    failed = [answer for answer in answers if isinstance(answer, Untuned) and not answer.expected]
    return console.FOUND if failed else console.FINE


def _tune_calls(
    attention: Attention, seconds: float, args: argparse.Namespace
) -> tuple[list[Record | Untuned], dict[str, str]]:
    """Return the record of every call, and descriptions of the example inputs."""
    call_list, tuned = calls(attention, args), attention.tuned
    assert tuned is not None
    records: list[Record | Untuned] = []
    words: dict[str, str] = {}
    with console.progress("tune", len(call_list)) as step:
        for i, call in enumerate(call_list):
            words |= call.words

            def report(text: str, index: int = i, n: int = call.sizes.n_q) -> None:
                step(f"{n} tokens, {text}", index)

            tuning_call = tuned_calls.tuning_call(attention._core, call.q, call.k, call.v, None, call.inputs)
            record = tune(tuning_call, tuned, seconds, report, again=args.again)
            records.append(record)
    return records, words


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
