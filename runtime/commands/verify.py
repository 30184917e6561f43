"""`attnc verify`: every executor against the oracle."""

from __future__ import annotations

import argparse

from attnc.runtime.attention import Attention
from attnc.runtime.commands import console
from attnc.runtime.commands.patterns import add_pattern, compiled, value_json
from attnc.runtime.lengths import natural_length
from attnc.runtime.verification import Case, Trial, Verdict, cases, verify


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `verify`."""
    add_pattern(parser)


def run(args: argparse.Namespace) -> int:
    """1 where an executor disagrees."""
    attention = compiled(args)
    shapes = cases(attention, natural_length(attention.bound))
    with console.progress("verify", len(shapes)) as step:
        verdict = verify(attention, shapes, step)
    if args.json:
        console.print_json(_as_json(attention, shapes, verdict))
    else:
        _print(attention, shapes, verdict)
    return console.FINE if verdict.agrees else console.FOUND


def _print(attention: Attention, shapes: list[Case], verdict: Verdict) -> None:
    print(f"{attention.name} on {len(shapes)} shapes:")
    for case in shapes:
        print(f"  {case}{'  (left out: `require` refuses it)' if case in verdict.left_out else ''}")
    if verdict.examples:
        print(f"  inputs with example values: {', '.join(verdict.examples)}")
    what = f"tokens     {verdict.tokens:,}" if attention.is_recurrence else f"relation   {verdict.pairs:,} pairs"
    print(f"\n{what} compared with the evaluator: {_relation(verdict)}\n")
    print("largest error against fp64, the worst of all shapes; allowed: twice that of dense torch in the same dtype,")
    print("and a few units in the last place\n")
    print(f"{'executor':<10} {'dtype':<9} {'tensor':<6} {'error':>9} {'dense':>9} {'allowed':>9}")
    for trial in verdict.worst():
        e = trial.result
        numbers = f"{e.error:>9.2g} {e.dense:>9.2g} {e.allowed:>9.2g}"
        print(f"{trial.executor:<10} {trial.dtype:<9} {e.tensor:<6} {numbers}  {_word(trial)}")
    print(f"\n{attention.name}: {'evaluator, reference and cpu executor agree' if verdict.agrees else 'DISAGREEMENT'}")


def _relation(verdict: Verdict) -> str:
    return "all equal" if not verdict.differing else f"NOT EQUAL, first {verdict.differing[0]}"


def _word(trial: Trial) -> str:
    return "ok" if trial.result.agrees else f"TOO LARGE at {trial.case}"


def _as_json(attention: Attention, shapes: list[Case], verdict: Verdict) -> dict[str, object]:
    wrong = [
        f"{t.executor} {t.dtype}: {t.result.tensor} is off by {t.result.error:.3g}, allowed {t.result.allowed:.3g}, "
        f"at {t.case}"
        for t in verdict.errors
        if not t.result.agrees
    ]
    relation = [f"the relation differs: {text}" for text in verdict.differing]
    return {
        "pattern": attention.name,
        "params": {name: value_json(value) for name, value in attention.bound.values.items()},
        "agrees": verdict.agrees,
        "diagnostics": [console.message_json(text) for text in (*relation, *wrong)],
        "shapes": [str(case) for case in shapes],
        "pairs": verdict.pairs,
        "examples": list(verdict.examples),
        "errors": [_trial_json(trial) for trial in verdict.errors],
    }


def _trial_json(trial: Trial) -> dict[str, object]:
    e = trial.result
    return {
        "executor": trial.executor,
        "dtype": trial.dtype,
        "tensor": e.tensor,
        "shape": str(trial.case),
        "error": e.error if e.error == e.error else None,
        "dense": e.dense,
        "allowed": e.allowed,
        "agrees": e.agrees,
    }
