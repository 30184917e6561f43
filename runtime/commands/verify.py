"""`attnc verify`: compare every executor with the oracle."""

from __future__ import annotations

import argparse

import torch

from attnc.runtime.api.compile_attention import compile_attention
from attnc.runtime.commands import console
from attnc.runtime.commands.call_arguments import check_heads
from attnc.runtime.commands.patterns import add_grid, add_pattern, given_params, value_json, whole_number
from attnc.runtime.texts.library import load
from attnc.runtime.verifying.call_cases import ShapeRequest, awkward_cases
from attnc.runtime.verifying.exercise import LOOKS, Look, Search, lengths
from attnc.runtime.verifying.scaled_parameters import changed, requested_choice
from attnc.runtime.verifying.verification import DTYPES, ExecutorTrial, Verdict, verify
from attnc.spec.meaning.parameter_values import shown
from attnc.spec.program import BoundProgram

NAMED_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*DTYPES, torch.float16, torch.float64)}


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `verify`."""
    add_pattern(parser)
    add_grid(parser)
    parser.add_argument("--len", dest="length", type=whole_number, metavar="N", help="compare calls of N tokens only")
    parser.add_argument("--heads", type=int, metavar="H", help="query heads")
    parser.add_argument("--kv-heads", type=int, metavar="H", help="kv heads")
    parser.add_argument(
        "--dtype", choices=sorted(NAMED_DTYPES), help="the dtype of the cpu executor (default: float32 and bfloat16)"
    )


def run(args: argparse.Namespace) -> int:
    """Return 1 if an executor disagrees or if something was not compared, else 0."""
    request = _request(args)
    program, _ = load(args.spec)
    params = given_params(args)
    requested = requested_choice(program, params, args.preset)
    with console.progress("verify", LOOKS) as step:
        selected = Search(step, request, frozenset(params) if args.grid else frozenset()).run(requested)
    if selected is None:
        raise console.UsageError(_no_call(requested.bound, request))
    bound = selected.choice.bound
    attention = compile_attention(args.spec, **bound.values)  # type: ignore[arg-type]  # parameters of the pattern
    only_length = lengths(bound, ShapeRequest(), is_own=True)[-1] if bound.program.segments else None
    others = [] if request.length is not None else awkward_cases(bound, only_length, request)
    others = [case for case in others if case != selected.case]
    dtypes = DTYPES if args.dtype is None else (NAMED_DTYPES[args.dtype],)
    with console.progress("verify", 1 + len(others)) as step:
        verdict = verify(attention, selected, others, step, dtypes)
    if args.json:
        console.print_json(_as_json(requested.bound, verdict))
    else:
        _print(requested.bound, verdict)
    return console.FINE if verdict.agrees else console.FOUND


def _request(args: argparse.Namespace) -> ShapeRequest:
    console.check_at_least(1, ("--len", args.length), ("--heads", args.heads), ("--kv-heads", args.kv_heads))
    heads, kv_heads = args.heads, args.kv_heads
    if heads is not None:
        check_heads(heads, kv_heads)
    return ShapeRequest(args.length, heads, kv_heads)


def _no_call(bound: BoundProgram, request: ShapeRequest) -> str:
    name = bound.program.name
    if request.length is not None:
        return f"--len {request.length}: `{name}` rejects calls of this length with these parameters"
    return f"`{name}` rejects every call that was tried; set its parameters with -p and the length with --len"


# --- text -------------------------------------------------------------------------------------------------------------


def _print(requested: BoundProgram, verdict: Verdict) -> None:
    look = verdict.look
    print(f"{requested.program.name} on {console.counted(len(verdict.cases), 'shape')}:")
    for line in _scaling(requested, look):
        print(f"  {line}")
    for case in verdict.cases + verdict.left_out:
        print(f"  {case}{'  (left out: the pattern rejects it)' if case in verdict.left_out else ''}")
    if look.numbers.inputs:
        print(f"  inputs with example values: {', '.join(look.numbers.inputs)}")
    print()
    _print_clauses(look)
    relation = f"NOT EQUAL, first {verdict.differing[0]}" if verdict.differing else "all equal"
    print(f"{_compared(verdict)}: {relation}\n")
    print("largest error against fp64, the worst of all shapes; allowed: twice that of dense torch in the same dtype,")
    print("and a few units in the last place\n")
    print(f"{'executor':<10} {'dtype':<9} {'tensor':<6} {'error':>9} {'dense':>9} {'allowed':>9}")
    for trial in verdict.worst():
        e = trial.result
        numbers = f"{e.error:>9.2g} {e.dense:>9.2g} {e.allowed:>9.2g}"
        word = "ok" if e.agrees else f"TOO LARGE at {trial.case}"
        print(f"{trial.executor:<10} {trial.dtype:<9} {e.tensor:<6} {numbers}  {word}")
    for text, remedy in verdict.gaps:
        print(f"\nnot verified: {text}{remedy}")
    print(f"\n{requested.program.name}: {_result(verdict)}")


def _result(verdict: Verdict) -> str:
    if verdict.agrees:
        return "evaluator, reference and cpu executor agree"
    wrong = verdict.differing or not all(e.result.agrees for e in verdict.errors)
    return "DISAGREEMENT" if wrong else "NOT VERIFIED: something was never compared"


def _scaling(requested: BoundProgram, look: Look) -> list[str]:
    different = changed(look.choice, requested)
    if not different:
        return [f"parameters of the {look.choice.how}"] if look.choice.how else []
    new = ", ".join(f"{p.name} = {shown(look.choice.bound.values[p.name])}" for p in different)
    old = ", ".join(f"{p.name} = {shown(requested.values[p.name])}" for p in different)
    return [f"parameters scaled down ({look.choice.how}): {new} in place of {old}"]


def _print_clauses(look: Look) -> None:
    if not look.clauses:
        return
    print(f"clauses of the relation, at length {look.case.lengths}")
    width = max(len(f"{clause.where} {clause.text}") for clause in look.clauses)
    for clause in look.clauses:
        word = "true and false" if clause.is_exercised else clause.reason or clause.missing
        print(f"  {f'{clause.where} {clause.text}':<{width}}  {word}")
    print()


def _compared(verdict: Verdict) -> str:
    parts = []
    if verdict.pairs:
        how = "" if verdict.by_mask else " (by their outputs)"
        parts.append(f"relation   {verdict.pairs:,} pairs{how}, {verdict.hidden:,} of them hidden")
    if verdict.rows:
        parts.append(f"outputs    {verdict.rows:,} rows")
    if verdict.tokens:
        parts.append(f"tokens     {verdict.tokens:,}")
    if verdict.look.hides_nothing:
        parts.append(f"no pair is hidden: {verdict.look.hides_nothing}")
    return "\n".join([*parts, "compared with the evaluator"])


# --- JSON -------------------------------------------------------------------------------------------------------------


def _as_json(requested: BoundProgram, verdict: Verdict) -> dict[str, object]:
    look = verdict.look
    wrong = [
        f"{t.executor} {t.dtype}: {t.result.tensor} is off by {t.result.error:.3g}, allowed {t.result.allowed:.3g}, "
        f"at {t.case}"
        for t in verdict.errors
        if not t.result.agrees
    ]
    relation = [f"the relation differs: {text}" for text in verdict.differing]
    missing = [f"not verified: {text}{remedy}" for text, remedy in verdict.gaps]
    return {
        "pattern": requested.program.name,
        "params": {name: value_json(value) for name, value in look.choice.bound.values.items()},
        "asked": {name: value_json(value) for name, value in requested.values.items()},
        "scaled": look.choice.how if changed(look.choice, requested) else "",
        "agreed": verdict.agrees,
        "diagnostics": [console.message_json(text) for text in (*relation, *wrong, *missing)],
        "lengths": [case.lengths for case in verdict.cases],
        "pairs_compared": verdict.pairs,
        "hidden_pairs_compared": verdict.hidden,
        "hides_nothing": look.hides_nothing,
        "rows_compared": verdict.rows,
        "tokens_compared": verdict.tokens,
        "clauses": [
            {"text": c.text, "where": c.where, "exercised": c.is_exercised, "reason": c.reason} for c in look.clauses
        ],
        "shapes": [str(case) for case in verdict.cases],
        "left_out": [str(case) for case in verdict.left_out],
        "examples": list(look.numbers.inputs),
        "errors": [_trial_json(trial) for trial in verdict.errors],
    }


def _trial_json(trial: ExecutorTrial) -> dict[str, object]:
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
