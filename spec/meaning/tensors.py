"""Read inputs as nested lists, check them against their dimensions, and assign positions to segments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from attnc.spec import program
from attnc.spec.errors import EvaluationError
from attnc.spec.meaning.exact_arithmetic import INT_MAX, INT_MIN
from attnc.spec.meaning.parameter_values import constant_value
from attnc.spec.suggest import did_you_mean
from attnc.spec.types import Kind

if TYPE_CHECKING:
    from attnc.spec.meaning.evaluate import Evaluator


class Tensors:
    """The inputs of one call. Dimensions with new names define sizes of the call."""

    def __init__(self, call: Evaluator, queries: int, keys: int, inputs: Mapping[str, object]) -> None:
        self._call = call
        self._lengths = {"query": queries, "key": keys, "token": keys}
        self._lengths |= {"head": call.sizes["heads"], "kv_head": call.sizes["kv_heads"]}
        self._data: dict[program.Input, Any] = {}
        self._check_names(inputs)
        for tensor in call.program.inputs:
            data = _nested(inputs[tensor.name])
            self._check(tensor, data, 0)
            self._data[tensor] = data

    def row(self, tensor: program.Input, batch: int) -> Sequence[int]:
        """Return the entries per token of an input with the dimensions `[token]` or `[batch, token]`."""
        data = self._data[tensor]
        if tensor.type.dims[0] != "batch":
            return data  # type: ignore[no-any-return]
        if not 0 <= batch < len(data):
            message = f"`{tensor.name}` has no batch {batch}"
            raise EvaluationError("A902", message, tensor.span, "give one entry for each batch entry")
        return data[batch]  # type: ignore[no-any-return]

    def element(
        self,
        node: program.InputRead,
        indices: list[int],
        head: int,
        batch: int,
        offsets: Mapping[str, int],
        limits: Mapping[str, tuple[int, int]],
    ) -> int | bool | float | tuple[float, ...]:
        """Return an entry, or a vector if there are fewer indices than dimensions.

        `offsets` turns positions into indices of entries; `limits` are the ranges of existing positions.
        """
        implied = {"batch": batch, "head": head, "kv_head": head // self._call.sizes["group"]}
        written_indices = iter(zip(indices, node.indices, strict=True))
        data = self._values(node.input)
        for dim in node.input.type.dims:
            if dim in implied:
                index, span = implied[dim], node.span
            else:
                written_index = next(written_indices, None)
                if written_index is None:
                    return _floats(data)  # type: ignore[no-any-return]
                index, span = written_index[0], written_index[1].span
            low, high = limits.get(dim, (0, len(data))) if isinstance(dim, str) else (0, len(data))
            if not low <= index < high:
                name = dim if isinstance(dim, str) else "this"
                message = f"`{node.input.name}` is read at {index}; the `{name}` dimension has {low} to {high - 1}"
                raise EvaluationError("A902", message, span, "test the index first: `0 <= i < n and …`")
            data = data[index + (offsets.get(dim, 0) if isinstance(dim, str) else 0)]
        match node.input.type.kind:
            case "bool":
                return bool(data)
            case "int":
                return int(data)
            case "complex":
                return complex(data)  # type: ignore[return-value]  # only recurrences read complex inputs, and they accept any number
        return float(data)

    def _values(self, tensor: program.Input) -> Any:
        if tensor not in self._data:
            assert tensor.ranks_of is not None
            self._data[tensor] = _ranks(self._data[tensor.ranks_of])
        return self._data[tensor]

    def _check_names(self, inputs: Mapping[str, object]) -> None:
        names = [tensor.name for tensor in self._call.program.inputs]
        for name in inputs:
            if name not in names:
                listed = f"the inputs are {', '.join(names)}" if names else "the pattern has no inputs"
                help_ = did_you_mean(name, names, listed)
                raise EvaluationError("A909", f"the pattern has no input `{name}`", self._call.program.span, help_)
        for tensor in self._call.program.inputs:
            if tensor.name not in inputs:
                help_ = f"give `{tensor.name}=…`, declared as {tensor.type}"
                raise EvaluationError("A909", f"the input `{tensor.name}` is missing", tensor.span, help_)

    def _check(self, tensor: program.Input, data: Any, depth: int) -> None:
        dims = tensor.type.dims
        if depth == len(dims):
            self._check_entry(tensor, data)
            return
        if not isinstance(data, list | tuple):
            message = f"`{tensor.name}` has {depth} dimensions, expected {len(dims)}: {tensor.type}"
            raise EvaluationError("A909", message, tensor.span, "give a tensor with the declared dimensions")
        expected = self._length(dims[depth], len(data))
        if len(data) != expected:
            message = f"dimension {depth} of `{tensor.name}` has {len(data)} entries, expected {expected}"
            raise EvaluationError("A909", message, tensor.span, f"give a tensor of the declared type {tensor.type}")
        for entry in data:
            self._check(tensor, entry, depth + 1)

    def _length(self, dim: object, entries: int) -> int:
        match dim:
            case int():
                return dim
            case str() if dim in self._lengths:
                return self._lengths[dim]
            case "batch":
                return self._lengths.setdefault("batch", entries)
            case str():
                return self._call.sizes.setdefault(dim, entries)
            case _:
                return self._computed_length(dim)

    def _computed_length(self, dim: object) -> int:
        value = constant_value(self._call.bound, dim)  # type: ignore[arg-type]
        assert isinstance(value, int)
        return value

    def _check_entry(self, tensor: program.Input, entry: object) -> None:
        types = _ENTRIES[tensor.type.kind]
        if type(entry) not in types:
            message = f"`{tensor.name}` holds {entry!r}, expected {tensor.type.kind}"
            raise EvaluationError("A909", message, tensor.span, f"convert it to {tensor.type.kind}")
        if tensor.type.kind == "int" and not INT_MIN <= entry <= INT_MAX:  # type: ignore[operator]  # an int
            message = f"an entry of `{tensor.name}` does not fit in 64 bits"
            raise EvaluationError("A909", message, tensor.span, "integers go from -2**63 to 2**63 - 1")


_ENTRIES: dict[Kind, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "real": (int, float),
    "complex": (int, float, complex),
}


def _ranks(data: Any) -> Any:
    """Return each token's rank in ascending order of the entries; equal entries are ranked by position."""
    if data and isinstance(data[0], list | tuple):
        return [_ranks(inner) for inner in data]
    order = sorted(range(len(data)), key=lambda i: (data[i] != data[i], data[i], i))  # NaN sorts last
    ranks = [0] * len(data)
    for rank, token in enumerate(order):
        ranks[token] = rank
    return ranks


def _floats(data: Any) -> Any:
    if isinstance(data, list | tuple):
        return tuple(map(_floats, data))
    return data if isinstance(data, complex) else float(data)


def _nested(data: object) -> Any:
    return data.tolist() if hasattr(data, "tolist") else data


class TokenLayout:
    """The positions of each segment. One extent may be inferred from the number of tokens that remain."""

    def __init__(
        self, segments: tuple[program.TokenSegment, ...], length: int, extent: Callable[[program.Expr], int]
    ) -> None:
        self.run_time: dict[str, int] = {}
        self._extents: dict[program.TokenSegment, tuple[int, ...]] = {}
        self._stretches: dict[program.TokenSegment, range] = {}
        if segments:
            fixed = {s: [None if _is_inferred(a) else _checked(a, extent) for a in s.axes] for s in segments}
            self._infer(segments, fixed, length)
            self._lay(segments, length)

    def stretch(self, segment: program.TokenSegment) -> range:
        """Return the positions of a segment."""
        return self._stretches[segment]

    def extents(self, segment: program.TokenSegment) -> tuple[int, ...]:
        """Return the lengths of a segment's axes."""
        return self._extents[segment]

    def coordinate(self, position: int, node: program.Coordinate) -> int:
        """Return a coordinate of a position. Raises `EvaluationError` for a position outside the segment."""
        stretch = self._stretches[node.segment]
        if position not in stretch:
            name = f"segment `{node.segment.name}`" if node.segment.name else "grid"
            message = f"position {position} is outside the {name}, which has {len(stretch)} tokens"
            help_ = "call with as many tokens as the grid has"
            if node.segment.name:
                help_ = f"test it first: `{node.place} in {node.segment.name} and …`"
            raise EvaluationError("A903", message, node.span, help_)
        extents = self._extents[node.segment]
        stride = prod(extents[node.axis + 1 :])
        return (position - stretch.start) // stride % extents[node.axis]

    def _infer(
        self,
        segments: tuple[program.TokenSegment, ...],
        fixed: dict[program.TokenSegment, list[int | None]],
        length: int,
    ) -> None:
        remaining = length - sum(prod(e for e in fixed[s] if e is not None) for s in segments if None not in fixed[s])
        for segment in segments:
            row_tokens = prod(e for e in fixed[segment] if e is not None)
            for axis, extent in zip(segment.axes, fixed[segment], strict=True):
                if extent is None:
                    if remaining < 0 or row_tokens == 0 or remaining % row_tokens:
                        message = f"{max(remaining, 0)} tokens are left for `{axis.name}`, in rows of {row_tokens}"
                        message = f"{length} tokens do not fit the segments: {message}"
                        help_ = "call with whole rows of tokens, or declare the other tokens with another `tokens` line"
                        raise EvaluationError("A903", message, axis.span, help_)
                    self.run_time[axis.extent.name] = remaining // row_tokens  # type: ignore[union-attr]
            self._extents[segment] = tuple(remaining // row_tokens if e is None else e for e in fixed[segment])

    def _lay(self, segments: tuple[program.TokenSegment, ...], length: int) -> None:
        start = 0
        for segment in segments:
            size = prod(self._extents[segment])
            self._stretches[segment] = range(start, start + size)
            start += size
        if start != length:
            shapes = " + ".join(" × ".join(map(str, self._extents[s])) for s in segments)
            message = f"the segments hold {shapes} = {start} tokens, got {length}"
            raise EvaluationError(
                "A903", message, segments[0].span, "use the number of tokens that the pattern's parameters give"
            )


def _is_inferred(axis: program.SegmentAxis) -> bool:
    return isinstance(axis.extent, program.Size)


def _checked(axis: program.SegmentAxis, extent: Callable[[program.Expr], int]) -> int:
    value = extent(axis.extent)
    if value < 0:
        raise EvaluationError("A903", f"the extent of `{axis.name}` is {value}", axis.span, "give at least 0")
    return value
