"""Values for the inputs of a pattern in the calls of `verify`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from attnc.runtime.call.example_inputs import Example, example_inputs
from attnc.runtime.verifying.call_cases import CallCase, every_expression
from attnc.runtime.verifying.condition_lines import input_values
from attnc.spec.checks.measure import below
from attnc.spec.errors import EvaluationError
from attnc.spec.meaning.denotation import EvaluationFrame, Meanings
from attnc.spec.meaning.parameter_values import constant_value, parameters_alone
from attnc.spec.program import BoundProgram, Expr, Input, InputRead, Local, Size

SMALL = 3
"""The extent of a dimension that only inputs have, where nothing requires more."""

_TOKENS = ("query", "key", "token")
_UNBOUNDED = 1 << 30


def draw(bound: BoundProgram, case: CallCase) -> dict[str, Example]:
    """Return a value for each input of a call.

    Dimensions that only inputs have are as small as the `require` lines allow, or 3. Integers by token come from
    `example_inputs`; integers and truth values by any other dimension are random. If the case is `at_constants`,
    integers that the text compares with constants are equal to or near these constants.
    """
    call_sizes = {"batch": case.batch, "head": case.heads, "kv_head": case.kv_heads, "dk": case.dk, "dv": case.dv}
    call_sizes |= {"query": case.n_q, "key": case.n_k, "token": case.n_k} | bound.lengths
    sizes = call_sizes | _own_sizes(bound, case, call_sizes)
    inputs = [item for item in bound.program.inputs if item.ranks_of is None]
    examples: dict[str, Example] = {}
    constants = [item for item in inputs if is_constant(item)]
    for item in inputs:
        values = input_values(bound, item) if case.at_constants and takes_constants(bound, item) else []
        if values:
            examples[item.name] = _at_constants(bound, item, sizes, values)
        elif item in constants and item.type.kind == "int":
            boundary = case.n_k * (constants.index(item) + 1) // (len(constants) + 3)
            examples[item.name] = _example(torch.full(_shape(None, item, sizes), boundary), str(boundary))
        elif item in constants:
            examples[item.name] = _alternating(item, sizes)
        elif _is_cluster(bound, item):
            examples[item.name] = _clusters(item, sizes)
        elif _is_table(item):
            examples[item.name] = _random_table(bound, item, sizes)
    rest = {item.name for item in inputs} - examples.keys()
    examples |= example_inputs(
        bound, case.n_q, case.n_k, {}, batch=case.batch, heads=case.heads, sizes=sizes, names=rest
    )
    return {item.name: _stabilised(item, examples[item.name]) for item in inputs}


def _stabilised(item: Input, example: Example) -> Example:
    """Give complex numbers a negative real part, so that a state that decays by `exp(dt * L)` stays bounded."""
    if item.type.kind != "complex":
        return example
    x = example.tensor
    return _example(torch.complex(-x.real.abs(), x.imag), "random complex numbers of less than 1, left of 0")


def _example(tensor: Tensor, words: str) -> Example:
    return Example(words, tensor.numpy())


def dense_sizes(bound: BoundProgram) -> set[str]:
    """Return the dimensions that only inputs have."""
    fixed = {"batch", "head", "kv_head", "dk", "dv", *_TOKENS, *bound.lengths}
    return {dim for item in bound.program.inputs for dim in item.type.dims if isinstance(dim, str)} - fixed


def _own_sizes(bound: BoundProgram, case: CallCase, call_sizes: dict[str, int]) -> dict[str, int]:
    """Return the sizes that only inputs have: the smallest that every `require` line allows."""
    input_dims = dense_sizes(bound)
    lengths = {"queries": case.n_q, "keys": case.n_k, "heads": case.heads, "kv_heads": case.kv_heads}
    lengths |= {"group": case.heads // case.kv_heads} | call_sizes
    result = dict.fromkeys(input_dims, max(case.own_size or SMALL, 1))
    result |= dict.fromkeys(input_dims & _computed_dims(bound), max(case.n_k, 1))
    required = [item.condition for item in bound.program.requirements if item.stage == "call"]
    for name in sorted(input_dims):
        conditions = [line for line in required if any(isinstance(x, Size) and x.name == name for x in below([line]))]
        if conditions:
            others = dict.fromkeys(input_dims - {name}, _UNBOUNDED)
            result[name] = _smallest_allowed(bound, name, conditions, {**lengths, **others}, case)
    return result


def _computed_dims(bound: BoundProgram) -> set[str]:
    """Return the dimensions that computed indices read, such as a distance, whose range is unknown."""
    result: set[str] = set()
    for node in below(every_expression(bound.program)):
        if isinstance(node, InputRead):
            dims = [dim for dim in node.input.type.dims if dim not in ("batch", "head", "kv_head")]
            result |= {
                dim
                for dim, index in zip(dims, node.indices, strict=False)
                if isinstance(dim, str) and not isinstance(index, Local)
            }
    return result


def _smallest_allowed(
    bound: BoundProgram, name: str, conditions: list[Expr], sizes: dict[str, int], case: CallCase
) -> int:
    meanings = [Meanings(bound.program, bound.values).of(line) for line in conditions]
    largest = max(case.n_q, case.n_k) + 1
    for size in range(1, largest):
        frame = EvaluationFrame(parameters_alone({**sizes, name: size}), {}, 0, 0)
        try:
            if all(meaning(frame) for meaning in meanings):
                return size
        except (EvaluationError, KeyError):  # KeyError: the size of a segment, which is unknown here
            return largest
    return largest


def is_constant(item: Input) -> bool:
    """Whether an integer or truth value is the same for all tokens."""
    return item.type.kind in ("int", "bool") and set(item.type.dims) <= {"batch", "head", "kv_head"}


def takes_constants(bound: BoundProgram, item: Input) -> bool:
    """Whether an input may hold the constants that the text compares it with; document ids may not."""
    return item.type.kind == "int" and item.ranks_of is None and item is not bound.program.documents


def _at_constants(bound: BoundProgram, item: Input, sizes: Mapping[str, int], values: list[int]) -> Example:
    """Return an input that holds the given values: in turn, or at random tokens with other numbers in between."""
    shape = _shape(bound, item, sizes)
    constants = torch.tensor(values)
    positions = torch.arange(math.prod(shape))
    if not is_constant(item):
        generator = torch.Generator().manual_seed(len(item.name))
        drawn = constants[torch.randint(len(values), positions.shape, generator=generator)]
        between = torch.randint(max(*values, 0) + 1, positions.shape, generator=generator)
        return _example(torch.where(positions % 2 == 1, drawn, between).reshape(shape), "constants of the text")
    return _example(constants[positions % len(values)].reshape(shape), "constants of the text")


def _is_cluster(bound: BoundProgram, item: Input) -> bool:
    """Whether an integer input is a cluster id by token and head, in a pattern with selections."""
    has_head = any(dim in ("head", "kv_head") for dim in item.type.dims)
    last = item.type.dims[-1] if item.type.dims else None
    return bool(bound.program.selections) and item.type.kind == "int" and has_head and last in _TOKENS


def _clusters(item: Input, sizes: Mapping[str, int]) -> Example:
    """Return cluster ids in stretches of two tokens: enough clusters that some get little weight."""
    shape = _shape(None, item, sizes)
    return _example((torch.arange(shape[-1]) // 2).expand(shape).contiguous(), "stretches of two tokens")


def _is_table(item: Input) -> bool:
    """Whether an integer or truth value has dimensions that only inputs have, or is a map of token pairs."""
    if item.type.kind not in ("int", "bool"):
        return False
    token_dims = [dim for dim in item.type.dims if dim in _TOKENS]
    return any(dim not in ("batch", "head", "kv_head", *_TOKENS) for dim in item.type.dims) or (
        len(token_dims) > 1 and item.type.kind == "bool"
    )


def _shape(bound: BoundProgram | None, item: Input, sizes: Mapping[str, int]) -> list[int]:
    shape = []
    for dim in item.type.dims:
        if isinstance(dim, int):
            shape.append(dim)
        elif isinstance(dim, str):
            shape.append(sizes[dim])
        else:
            assert bound is not None
            value = constant_value(bound, cast("Expr", dim))
            assert isinstance(value, int)
            shape.append(value)
    return shape


def _alternating(item: Input, sizes: Mapping[str, int]) -> Example:
    """Return false and true in turn, over batch entries and heads."""
    shape = _shape(None, item, sizes)
    indices = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")).sum(0) if shape else None
    tensor = torch.tensor(True) if indices is None else indices % 2 == 1
    return _example(tensor, "false and true in turn")


def _random_table(bound: BoundProgram, item: Input, sizes: Mapping[str, int]) -> Example:
    """Return random integers below the smallest extent that they may index, or truth values, half of them true."""
    shape = _shape(bound, item, sizes)
    generator = torch.Generator().manual_seed(len(item.name))
    if item.type.kind == "bool":
        tensor: Tensor = torch.rand(shape, generator=generator) < 0.5
        return _example(tensor, "random truth values")
    extents = [n for dim, n in zip(item.type.dims[:-1], shape, strict=False) if dim not in ("batch", "head", "kv_head")]
    limit = min(extents) if extents else max(sizes["key"], 1)
    return _example(torch.randint(limit, shape, generator=generator), "random integers")
