"""The arguments that name a pattern: its spec, parameters, preset, inputs and length."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from attnc.runtime.call.lengths import extent_of, natural_length
from attnc.runtime.commands.console import UsageError, add_repeated
from attnc.runtime.texts.library import load
from attnc.spec.meaning.parameter_values import shown
from attnc.spec.program import BoundProgram, Input, ParameterRead, Value
from attnc.spec.suggest import did_you_mean

if TYPE_CHECKING:
    from attnc.runtime.api.attention import Attention
    from attnc.runtime.patterns.pattern_analysis import PatternAnalysis


def add_pattern(parser: argparse.ArgumentParser) -> None:
    """Add SPEC, `-p` and `--preset`."""
    parser.add_argument(
        "spec", metavar="SPEC", help="a library pattern, a path to an .attn file, file.attn:name, or source text"
    )
    add_parameters(parser)


def add_parameters(parser: argparse.ArgumentParser) -> None:
    """Add `-p` and `--preset`."""
    text = "a parameter: a number, a fraction as in 1/3, true, false, or a list as in [7,7]; may be repeated"
    add_repeated(parser, "-p", "params", "NAME=VALUE", text)
    parser.add_argument("--preset", metavar="NAME", help="one of the pattern's named sets of parameters")


def compiled(args: argparse.Namespace, tune: str = "model") -> Attention:
    """Compile the pattern that the arguments name; `tune` is passed to `compile_attention`."""
    from attnc.runtime.api.compile_attention import compile_attention  # needs torch, which may be missing

    return compile_attention(args.spec, preset=args.preset, tune=tune, **given_params(args))  # type: ignore[arg-type]


def analysed(args: argparse.Namespace) -> PatternAnalysis:
    """Return the pattern that the arguments name, for commands that do not need torch."""
    from attnc.runtime.commands.analysed import analyse  # needs torch, which may be missing

    return analyse(args.spec, given_params(args), args.preset)


def given_params(args: argparse.Namespace) -> dict[str, object]:
    """Return the parameters that `-p` and `--grid` set."""
    params: dict[str, object] = {}
    grid = getattr(args, "grid", None)
    grid_texts = [] if grid is None else grid_params(args.spec, grid)
    for text in (*grid_texts, *args.params):
        name, value = _name_and_value(text, "-p", "window=512")
        if name in params:
            in_grid = any(other.partition("=")[0] == name for other in grid_texts)
            raise UsageError(
                f"-p {text}: --grid {grid} sets `{name}` too; use one or the other"
                if in_grid
                else f"-p {name} is given twice"
            )
        params[name] = parse_value(value, f"-p {name}")
    reserved = {"spec", "preset", "backend", "strict", "deterministic", "tune"} & params.keys()
    if reserved:
        raise UsageError(f"-p {min(reserved)}: no pattern has a parameter of that name")
    return params


def whole_number(text: str) -> int:
    """Return the number of tokens that a length option names: `8192`, `8k` (8,192) or `1m` (1,048,576).

    Raises argparse.ArgumentTypeError, which argparse puts behind the name of the option.
    """
    match = re.fullmatch(r"\s*([+-]?\d+)([kKmM]?)\s*", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number: write it as in 8192, 8k or 1m")
    return int(match[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[match[2].lower()]


def _name_and_value(text: str, option: str, example: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (equals and name.strip().isidentifier() and value.strip()):
        raise UsageError(f"{option} {text}: write it as {option} NAME=VALUE, as in {option} {example}")
    return name.strip(), value.strip()


def parse_value(text: str, what: str) -> object:
    """Return the value of a text: an exact number, a truth value, or a (nested) list of these."""
    try:
        numerator, slash, denominator = text.partition("/")
        if slash:
            return Fraction(int(numerator), int(denominator))
        value = json.loads(text, parse_float=Decimal, parse_constant=_no_constant)
    except (ValueError, ArithmeticError, RecursionError):
        raise _no_value(text, what) from None
    if not _is_value(value):
        raise _no_value(text, what)
    return value


def _no_value(text: str, what: str) -> UsageError:
    short = text if len(text) <= 40 else f"{text[:37]}..."
    near = {"True": "true", "False": "false"}.get(text)
    remedy = f"write {near}" if near else "write a number, a fraction as in 1/3, true, false, or a list as in [7,7]"
    return UsageError(f"{what}={short}: not a value; {remedy}")


def _no_constant(text: str) -> NoReturn:
    raise ValueError(text)


def _is_value(value: object) -> bool:
    if isinstance(value, list):
        return all(_is_value(item) for item in value)
    return isinstance(value, int | Decimal)


def value_json(value: Value) -> object:
    """Return a parameter value for JSON; a fraction without a short decimal form becomes text."""
    if isinstance(value, tuple):
        return [value_json(item) for item in value]
    if isinstance(value, Fraction):
        text = shown(value)
        return text if "/" in text else float(text)
    return value


# --- inputs ----------------------------------------------------------------------------------------------------------


def add_lengths(parser: argparse.ArgumentParser, note: str, **options: Any) -> None:
    """Add `--len`, with a note at the end of its help, and `--keys`."""
    text = f"queries, as in 16384 or 16k{note}"
    parser.add_argument("--len", metavar="N", type=whole_number, help=text, **options)
    text = "keys (default: the number of queries)"
    parser.add_argument("--keys", dest="n_k", metavar="N", type=whole_number, help=text)


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Add `--input`."""
    text = "an input of the pattern as a JSON list, or one number for every entry; inputs not given get example values"
    add_repeated(parser, "--input", "inputs", "NAME=VALUE", text)


def given_inputs(bound: BoundProgram, texts: Sequence[str], n_q: int, n_k: int) -> dict[str, NDArray[Any]]:
    """Return the inputs of the command line as arrays; an array without a batch dimension gets batch size 1."""
    inputs = {i.name: i for i in bound.program.inputs}
    result: dict[str, NDArray[Any]] = {}
    for text in texts:
        name, value = _name_and_value(text, "--input", "doc=[0,0,1]")
        if name not in inputs:
            listed = f"its inputs are {', '.join(inputs)}" if inputs else "it has none"
            raise UsageError(f"`{bound.program.name}` has no input `{name}`: {did_you_mean(name, inputs, listed)}")
        result[name] = _input_array(inputs[name], parse_value(value, f"--input {name}"), n_q, n_k)
    return result


def _input_array(declared: Input, value: object, n_q: int, n_k: int) -> NDArray[Any]:
    sizes = {"batch": 1, "query": n_q, "key": n_k, "token": n_k, "head": 1, "kv_head": 1}
    dims = declared.type.dims
    try:
        if not _is_integral(value):
            raise TypeError
        array: NDArray[Any] = np.array(value, dtype=np.bool_ if declared.type.kind == "bool" else np.int64)
    except (ValueError, TypeError, OverflowError):
        raise UsageError(
            f"--input {declared.name}: write a JSON list of {declared.type.kind} values with rows of equal length"
        ) from None
    if not array.ndim:
        shape = [dim if isinstance(dim, int) else sizes.get(str(dim), 1) for dim in dims]
        array = np.broadcast_to(array, shape).copy()
    elif array.ndim == len(dims) - 1 and dims[0] == "batch":
        array = array[None]
    return array


def _is_integral(value: object) -> bool:
    """Whether a value consists of whole numbers and truth values only."""
    return all(map(_is_integral, value)) if isinstance(value, list) else isinstance(value, int)


# --- lengths ---------------------------------------------------------------------------------------------------------


def has_free_length(bound: BoundProgram) -> bool:
    """Whether the parameters leave the number of tokens open."""
    segments = bound.program.segments
    return not segments or any(extent_of(bound, axis) is None for segment in segments for axis in segment.axes)


def length_of(bound: BoundProgram, requested: int | None, otherwise: int) -> int:
    """Return the requested length, else the length that the segments fix, else about `otherwise`.

    Raises UsageError where the requested length and the segments disagree.
    """
    natural = natural_length(bound, otherwise)
    if natural is None or has_free_length(bound):
        return requested or natural or otherwise
    if requested not in (None, natural):
        raise UsageError(
            f"--len {requested}: `{bound.program.name}` has {natural:,} tokens with these parameters; omit --len"
        )
    return natural


def add_grid(parser: argparse.ArgumentParser) -> None:
    """Add `--grid`."""
    parser.add_argument(
        "--grid",
        metavar="T,Y,X",
        help="the extents of the token grid, in the order of its axes; they set the parameters that define the grid",
    )


def grid_params(spec: str, text: str) -> list[str]:
    """Return `--grid` as parameter texts. Raises UsageError where the pattern's grid has another form."""
    extents = [part.strip() for part in text.replace("×", ",").replace("x", ",").split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in extents):
        raise UsageError(f"--grid {text}: write whole numbers above 0, as in --grid 30,48,80")
    program, _ = load(spec)
    if not program.segments:
        raise UsageError(f"--grid {text}: `{program.name}` has no grid, its tokens are a sequence; use --len")
    axes = program.segments[0].axes
    axis_names = ", ".join(axis.name for axis in axes)
    if len(axes) != len(extents):
        raise UsageError(
            f"--grid {text}: the grid of `{program.name}` has {len(axes)} axes: {axis_names}; write an extent for each"
        )
    params = []
    for axis, extent in zip(axes, extents, strict=True):
        if not isinstance(axis.extent, ParameterRead):
            raise UsageError(
                f"--grid {text}: the extent of `{axis.name}` is not a parameter of `{program.name}`; use -p"
            )
        params.append(f"{axis.extent.name}={extent}")
    return params
