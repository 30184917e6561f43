"""A compiled pattern as text, and back: the form in which an operator in a graph carries it to any process.

The text is JSON and holds the spec, the parameters and the modules that the spec uses. Nothing in it is executed:
reading it parses and checks a spec as `compile_attention` does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Literal, get_args

from attnc.runtime.call.call_errors import ArgumentError
from attnc.runtime.texts.library import ModuleLoader
from attnc.spec.load import load_program
from attnc.spec.meaning.bind import bind
from attnc.spec.program import BoundProgram, Value
from attnc.spec.reading.source_text import decode
from attnc.spec.source import SourceFile

FORMAT = 4
Form = Literal["whole", "packed", "last rows"]
"""The form of a pattern: as written, for several packed sequences, or for the last queries of a sequence."""


@dataclass(frozen=True)
class How:
    """The options of a compiled pattern that change its calls. `tune`: the source of tuned choices (`ChoiceSource`)."""

    strict: bool = False
    deterministic: bool = True
    tune: str = "model"


_FRACTION = re.compile(r"-?[0-9]+(/[1-9][0-9]*)?")


def bound_program(
    source: SourceFile, name: str, values: Mapping[str, object], modules: Mapping[str, SourceFile]
) -> BoundProgram:
    """Return the pattern `name` of a text, bound; `use` sees `modules`, then the library. Raises SpecError."""
    return bind(load_program(source, ModuleLoader(None, dict(modules)), name), values)


def write(bound: BoundProgram, modules: Mapping[str, SourceFile], how: How, form: Form = "whole") -> str:
    """Return the text of a pattern and of the options that change a call. Equal patterns have equal texts."""
    program = bound.program
    return json.dumps(
        {
            "attnc": FORMAT,
            "pattern": program.name,
            "values": {name: _written(value) for name, value in bound.values.items()},
            **asdict(how),
            "form": form,
            "source": _file(program.source),
            "modules": {name: _file(source) for name, source in sorted(modules.items())},
        },
        ensure_ascii=False,
    )


def read(text: str) -> tuple[BoundProgram, How, Form]:
    """Return the pattern of a text, how it was compiled, and its form.

    Raises ArgumentError for a text that `write` did not produce.
    """
    try:
        data = json.loads(text)
        if data["attnc"] != FORMAT:
            raise ValueError(f"format {data['attnc']!r}")
        source, name = _source(data["source"]), _text(data["pattern"])
        how = How(data["strict"] is True, data["deterministic"] is True, _text(data["tune"]))
        form: Form = data["form"]
        if form not in get_args(Form):
            raise ValueError(f"form {form!r}")
        modules = {_text(module): _source(file) for module, file in data["modules"].items()}
        values = {_text(parameter): _value(value) for parameter, value in data["values"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ArgumentError(
            f"the pattern of an attnc operator cannot be read ({type(error).__name__}: {error}): it must be the text "
            f"that this version of attnc put into the graph; export the model again"
        ) from error
    return bound_program(source, name, values, modules), how, form


def _written(value: Value) -> object:
    """Return a parameter's JSON value; fractions become text, and no other value is text."""
    if isinstance(value, tuple):
        return [_written(item) for item in value]
    return str(value) if isinstance(value, Fraction) else value


def _value(value: object) -> object:
    if isinstance(value, list):
        return [_value(item) for item in value]
    if isinstance(value, str) and _FRACTION.fullmatch(value):
        return Fraction(value)
    if not isinstance(value, int):
        raise TypeError(f"a parameter is {value!r}")
    return value


def _file(source: SourceFile) -> list[str]:
    return [source.name, source.text]


def _source(file: object) -> SourceFile:
    name, text = file if isinstance(file, list) else ("", None)
    return decode(_text(text), _text(name))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
