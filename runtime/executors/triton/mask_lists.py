"""Lists of live tiles, built on the device from selections, without making the host wait.

The sizes of a call determine which tiles may be live, and which entries of bool tensors decide (`TileQuestions`).
Whether some entry of a rectangle holds is read from 2D prefix sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from attnc.compiler.analysis.questions import (
    JoinedQuestion,
    KnownAnswer,
    NegatedQuestion,
    PickedQuestion,
    Question,
    ReadQuestion,
    Span,
    reads_of,
)
from attnc.compiler.kernels.content_mask_tiles import Int64, MaskCall, TileQuestions
from attnc.compiler.kernels.content_masks import ALONG, UNIT, MaskRelation, read_along_keys
from attnc.compiler.kernels.inputs import LANES, input_name
from attnc.compiler.planning.build_plan import CallShape
from attnc.runtime.planning.plans import planning
from attnc.runtime.process.device_constants import keep_captured


@dataclass(frozen=True, eq=False)
class ListSharing:
    """The batch entries and heads that have separate lists; `heads`: number of lists per batch entry."""

    batch: int
    heads: int
    of_lane: Int64

    @classmethod
    def of(cls, shape: CallShape, dims: set[str], kinds: int) -> ListSharing:
        """Return the sharing for bool tensors with the dimensions `dims`, with `kinds` kinds of heads."""
        group = max(shape.heads // max(shape.kv_heads, 1), 1)
        by_head = "head" in dims or kinds > 1
        number = np.arange(shape.heads) // (1 if by_head else group if "kv_head" in dims else max(shape.heads, 1))
        heads = int(number.max(initial=0)) + 1
        batch = shape.batch if "batch" in dims else 1
        of_batch = np.arange(shape.batch) if "batch" in dims else np.zeros(shape.batch, dtype=np.int64)
        return cls(batch, heads, (of_batch[:, None] * heads + number).ravel())


class MaskLists:
    """The tile lists of the kernels of one call shape, rebuilt for every selection."""

    def __init__(
        self, call: MaskCall, relation: MaskRelation, tiles: Mapping[str, tuple[int, int]], device: torch.device
    ) -> None:
        self._call = call
        self._asked = relation
        self._tiles = tiles
        self._device = device
        self._stages: dict[str, Stage] = {}
        self._along = frozenset(map(input_name, read_along_keys(relation)))

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that kernels read and that are derived from others."""
        return {
            input_name(derived.tensor): _derived(tensors[derived.of.name], derived.length)
            for derived in self._asked.derived
        }

    def filled(self, read: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors, with rows padded if they are read along keys."""
        return {name: _filled(x) if name in self._along else x for name, x in read.items()}

    def of(self, stage: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the lists of a kernel, from bool tensors by name."""
        if stage not in self._stages:
            with planning():
                questions = self._call.questions(*self._tiles[stage], by_key=stage == "dkdv")
                self._stages[stage] = Stage(self._call, questions, self._device)
        return self._stages[stage].lists(tensors)


class StageTensors(Mapping[str, Mapping[str, Tensor]]):
    """The tensors that the kernels of one call read, by kernel; a kernel's lists are built on first access."""

    def __init__(self, read: Mapping[str, Tensor], masks: Mapping[str, Tensor], lists: MaskLists) -> None:
        self._read = lists.filled({**read, **lists.read(masks)})
        self._given = masks
        self._lists = lists
        self._made: dict[str, Mapping[str, Tensor]] = {}

    def __getitem__(self, stage: str) -> Mapping[str, Tensor]:
        if stage not in _STAGES:
            raise KeyError(stage)
        if stage not in self._made:
            self._made[stage] = {**self._read, **self._lists.of(stage, self._given)}
        return self._made[stage]

    def __iter__(self) -> Iterator[str]:
        return iter(_STAGES)

    def __len__(self) -> int:
        return len(_STAGES)


_STAGES = ("forward", "dq", "dkdv")


class Stage:
    """The tile lists of one kernel."""

    def __init__(self, call: MaskCall, questions: TileQuestions, device: torch.device) -> None:
        self._call = call
        self._questions = questions.questions
        self._dims = {tensor.name: tuple(map(str, tensor.dims)) for tensor in call.pattern.tensors}
        reads = [read for question in questions.questions for read in reads_of(question)]
        dims = {dim for read in reads for dim in self._dims[read.tensor.name]}
        self._lanes = ListSharing.of(call.shape, dims, len(questions.questions))
        self._size = self._lanes.batch * self._lanes.heads, len(questions.columns)
        (list_count, tiles), rows = self._size, len(questions.starts) - 1
        list_index = np.arange(list_count)[:, None]
        self._of_lane = constant(self._lanes.of_lane, device)
        self._columns = constant(questions.columns, device)
        self._ends = constant((list_index * tiles + questions.starts).ravel(), device)
        self._numbers = torch.arange(list_count * tiles, dtype=torch.int32, device=device)
        kinds = range(len(questions.questions))
        self._kinds = [constant(questions.kinds == kind, device, torch.bool) for kind in kinds]
        self._known: dict[KnownAnswer, Tensor] = {}
        self._rectangles: dict[ReadQuestion, Rectangles] = {}
        for question in questions.questions:
            self._keep(question, device)
        self._rows = rows

    def _keep(self, question: Question, device: torch.device) -> None:
        """Copy the constants of a question to the device."""
        match question:
            case KnownAnswer(state=state):
                self._known[question] = torch.from_numpy(np.array(state)).to(device)
            case ReadQuestion(tensor=tensor):
                dims, shape = self._dims[tensor.name], self._call.shape.inputs[tensor.name].shape
                entry_sizes = [n for dim, n in zip(dims, shape, strict=True) if dim not in LANES]
                rows, blocks = [1] * (2 - len(entry_sizes)) + entry_sizes
                self._rectangles[question] = Rectangles.of(question, rows, blocks, device)
            case JoinedQuestion(parts=parts):
                for part in parts:
                    self._keep(part, device)
            case NegatedQuestion(part=part):
                self._keep(part, device)
            case PickedQuestion():
                for part in (question.condition, question.then, question.otherwise):
                    self._keep(part, device)

    @property
    def _constants(self) -> Iterator[Tensor]:
        yield from (self._of_lane, self._columns, self._ends, self._numbers, *self._kinds, *self._known.values())
        for rectangles in self._rectangles.values():
            yield from rectangles.constants

    def states(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return -1, 0 or 1 for tiles that are empty, partial or full: int8 (lists, tiles)."""
        answers = [self._answered(question, tensors) for question in self._questions]
        states = answers[0]
        for kind, states_of_kind in zip(self._kinds[1:], answers[1:], strict=True):
            states = torch.where(kind[:, None], states_of_kind, states)
        return states.expand(self._lanes.batch, self._lanes.heads, -1).reshape(self._size)

    def _answered(self, question: Question, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the states of tiles, (batch entries or 1, heads or 1, tiles)."""
        match question:
            case KnownAnswer():
                return self._known[question][None, None]
            case ReadQuestion(tensor=tensor):
                return self._widened(
                    tensor.name, self._rectangles[question].states(self._by_lane(tensor.name, tensors))
                )
            case JoinedQuestion(op=op, parts=parts):
                join = torch.minimum if op == "and" else torch.maximum
                return reduce(join, (self._answered(part, tensors) for part in parts))
            case NegatedQuestion(part=part):
                return -self._answered(part, tensors)
            case PickedQuestion():
                parts = (question.condition, question.then, question.otherwise)
                which, then, otherwise = (self._answered(part, tensors) for part in parts)
                either = torch.where(then == otherwise, then, 0)
                return torch.where(which > 0, then, torch.where(which < 0, otherwise, either))

    def _by_lane(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return a bool tensor as (batch entries or 1, heads or 1, rows or 1, blocks)."""
        dims, x = self._dims[name], tensors[name].to(self._columns.device)
        sides = [[i for i, dim in enumerate(dims) if dim in names] for names in (("batch",), ("head", "kv_head"))]
        entries = [i for i, dim in enumerate(dims) if dim not in LANES]
        ordered = x.permute([*sides[0], *sides[1], *entries])
        has = *map(bool, sides), len(entries) > 1, len(entries) > 0
        return ordered[tuple(slice(None) if exists else None for exists in has)]

    def _widened(self, name: str, states: Tensor) -> Tensor:
        """Repeat the states of heads that share a selection for each of the heads."""
        of_keys = "kv_head" in self._dims[name] and self._lanes.heads > states.shape[1]
        return states.repeat_interleave(self._lanes.heads // states.shape[1], 1) if of_keys else states

    def lists(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the list tensors that the kernel reads, by name."""
        keep_captured(self._constants)
        states = self.states(tensors)
        full, full_tiles = self._listed(states > 0)
        partial, partial_tiles = self._listed(states == 0)
        list_count = self._size[0]
        counts = (full + partial).view(list_count, self._rows + 1).diff(dim=1)
        return {
            "list_of_lane": self._of_lane,
            "tile_order": counts.argsort(dim=1, descending=True, stable=True).to(torch.int32).flatten(),
            "full_pointers": full,
            "full_tiles": full_tiles,
            "partial_pointers": partial,
            "partial_tiles": partial_tiles,
        }

    def _listed(self, marked: Tensor) -> tuple[Tensor, Tensor]:
        """Return pointers and columns of marked tiles, (lists, tiles); unmarked tiles follow, so the size is fixed."""
        flat = marked.flatten()
        before = F.pad(flat.cumsum(0, dtype=torch.int32), (1, 0))
        unmarked_target = before[-1:] + self._numbers - before[:-1]
        target = torch.where(flat, before[:-1], unmarked_target).to(torch.int64)
        tiles = torch.zeros(len(flat) + 1, dtype=torch.int32, device=flat.device)
        tiles.scatter_(0, target, self._columns.expand(self._size).reshape(-1))
        return before.index_select(0, self._ends), tiles


def _filled(mask: Tensor) -> Tensor:
    """Return a bool tensor whose rows begin at multiples of 16 bytes and are readable to the end of a tile."""
    padding = -mask.shape[-1] % ALONG
    padded = F.pad(mask, (0, padding)) if padding else mask.contiguous()
    return padded if padded.data_ptr() % UNIT == 0 else padded.clone()


def _derived(mask: Tensor, length: int | None) -> Tensor:
    """Count the true entries before each index, or check whether the last `length` entries hold a true entry."""
    counts = F.pad(mask.cumsum(-1, dtype=torch.int32), (1, 0))
    if length is None:
        return counts
    last = counts[..., -1:].expand(*counts.shape[:-1], length)
    return torch.cat([counts, last], -1) > F.pad(counts, (length, 0))


# --- rectangles of entries -------------------------------------------------------------------------------------------


MOST_CELLS = 1 << 26
"""Maximum number of cells per batch entry and head."""

Corners = tuple[tuple[int, Tensor], ...]
"""The prefix sums that make up rectangles, each with its sign, as indices into rows of one more cell."""


@dataclass(frozen=True, eq=False)
class Rectangles:
    """Rectangles of a bool tensor's entries, which are grouped into `cells` of `cell` rows and blocks.

    `touched`: the cells that share an entry with a rectangle; `within`: cells of which one true entry is enough, if not
    all entries are required.
    """

    cell: tuple[int, int]
    cells: tuple[int, int]
    touched: Corners
    within: Corners | None

    @classmethod
    def of(cls, read: ReadQuestion, rows: int, blocks: int, device: torch.device) -> Rectangles:
        """Return the rectangles that a question reads from `rows` rows and `places` blocks.

        Cells are as large as the rectangle ends allow without loss; larger if there would be more than `MOST_CELLS`.
        """
        row_span, block_span = _inside(read.rows, rows), _inside(read.places, blocks)
        sure_spans = [] if read.sure is None else [_inside(read.sure, blocks)]
        cell = [_aligned(rows, [row_span]), _aligned(blocks, [block_span, *sure_spans])]
        while _count(rows, cell[0]) * _count(blocks, cell[1]) > MOST_CELLS:
            cell[int(_count(rows, cell[0]) < _count(blocks, cell[1]))] *= 2
        cells = _count(rows, cell[0]), _count(blocks, cell[1])
        touched = _corners(_outer(row_span, cell[0]), _outer(block_span, cell[1]), cells, device)
        inner = [
            _corners(_inner(row_span, rows, cell[0]), _inner(s, blocks, cell[1]), cells, device) for s in sure_spans
        ]
        return cls((cell[0], cell[1]), cells, touched, inner[0] if inner else None)

    @property
    def constants(self) -> Iterator[Tensor]:
        """The device tensors that are read besides the bool tensor."""
        yield from (number for _, number in (*self.touched, *(self.within or ())))

    def states(self, mask: Tensor) -> Tensor:
        """Return 1 if all entries hold, or some entry within, -1 if none holds, else 0: int8 (…, rectangles)."""
        sums = self._sums(mask)
        any_holds = _is_positive(sums, self.touched)
        if self.within is None:
            sure = ~_is_positive(self._sums(~mask), self.touched)
        else:
            sure = _is_positive(sums, self.within)
        return any_holds.to(torch.int8) + sure.to(torch.int8) - 1

    def _sums(self, mask: Tensor) -> Tensor:
        """Count, up to each corner, the cells that hold a true entry: (…, corners)."""
        row_padding, column_padding = (
            a * n - m for a, n, m in zip(self.cell, self.cells, mask.shape[-2:], strict=True)
        )
        padded = F.pad(mask, (0, column_padding, 0, row_padding)) if row_padding or column_padding else mask
        if self.cell != (1, 1):
            sides = self.cells[0], self.cell[0], self.cells[1], self.cell[1]
            padded = padded.reshape(*padded.shape[:-2], *sides).any(-1).any(-2)
        sums = padded.cumsum(-1, dtype=torch.int32).cumsum(-2, dtype=torch.int32)
        return F.pad(sums, (1, 0, 1, 0)).flatten(-2)


def _is_positive(sums: Tensor, corners: Corners) -> Tensor:
    return reduce(torch.add, [sums.index_select(-1, number) * sign for sign, number in corners]) > 0


def _count(size: int, cell: int) -> int:
    return -(-size // cell)


def _inside(span: Span, size: int) -> Span:
    first, end = (np.clip(x, 0, size) for x in span)
    return first, np.maximum(first, end)


def _aligned(size: int, spans: list[Span]) -> int:
    """Return the largest cell size that divides all ends, except an end at `size`."""
    ends = np.unique(np.concatenate([x for span in spans for x in span]))
    return int(np.gcd.reduce(ends[ends < size], initial=0)) or max(size, 1)


def _outer(span: Span, cell: int) -> Span:
    first = span[0] // cell
    return first, np.where(span[1] > span[0], -(-span[1] // cell), first)


def _inner(span: Span, size: int, cell: int) -> Span:
    first = -(-span[0] // cell)
    return first, np.maximum(np.where(span[1] == size, _count(size, cell), span[1] // cell), first)


def _corners(rows: Span, blocks: Span, cells: tuple[int, int], device: torch.device) -> Corners:
    """Return the signs and indices of the prefix sums of rectangles; sums up to row or block 0 are omitted."""
    corners = []
    for sign, row, place in ((1, 1, 1), (-1, 0, 1), (-1, 1, 0), (1, 0, 0)):
        if (row and place) or (rows[row].any() and blocks[place].any()):
            corners.append((sign, constant(rows[row] * (cells[1] + 1) + blocks[place], device)))
    return tuple(corners)


def constant(
    array: NDArray[np.int64] | NDArray[np.bool_], device: torch.device, dtype: torch.dtype = torch.int32
) -> Tensor:
    """Copy an array to a device."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, dtype)
