"""Lists of the tiles that are seen, made on the device from what was chosen, by operations that no host waits for.

Which tiles may be seen, and what of truth tensors decides, is told by the sizes of a call (`TileQuestions`). Whether
some entry of a rectangle holds is read off sums over all rectangles from the first entry on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from attnc.compiler.analysis.questions import (
    JoinedQuestion,
    KnownAnswer,
    NegatedQuestion,
    PickedQuestion,
    Question,
    ReadQuestion,
    reads_of,
)
from attnc.compiler.kernels.content_mask_tiles import Int64, MaskCall, TileQuestions
from attnc.compiler.kernels.content_masks import ALONG, UNIT, MaskRelation, read_along_keys
from attnc.compiler.kernels.inputs import LANES, input_name
from attnc.compiler.planning.build_plan import CallShape
from attnc.runtime.device_constants import keep_captured
from attnc.runtime.gpu.rectangles import Rectangles, constant
from attnc.runtime.plans import planning


@dataclass(frozen=True, eq=False)
class ListSharing:
    """Which batch entries and heads have lists of their own: all of them, or one for all; of heads `heads`."""

    batch: int
    heads: int
    of_lane: Int64

    @classmethod
    def of(cls, shape: CallShape, dims: set[str], kinds: int) -> ListSharing:
        """Those of truth tensors with such dimensions, where heads are of so many kinds."""
        group = max(shape.heads // max(shape.kv_heads, 1), 1)
        by_head = "head" in dims or kinds > 1
        number = np.arange(shape.heads) // (1 if by_head else group if "kv_head" in dims else max(shape.heads, 1))
        heads = int(number.max(initial=0)) + 1
        batch = shape.batch if "batch" in dims else 1
        of_batch = np.arange(shape.batch) if "batch" in dims else np.zeros(shape.batch, dtype=np.int64)
        return cls(batch, heads, (of_batch[:, None] * heads + number).ravel())


class MaskLists:
    """What kernels of one call shape are told of tiles, made anew from every choice."""

    def __init__(
        self, call: MaskCall, asked: MaskRelation, tiles: Mapping[str, tuple[int, int]], device: torch.device
    ) -> None:
        self._call = call
        self._asked = asked
        self._tiles = tiles
        self._device = device
        self._stages: dict[str, Stage] = {}
        self._along = frozenset(map(input_name, read_along_keys(asked)))

    def read(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that kernels read which are made of others."""
        return {input_name(one.tensor): _derived(given[one.of.name], one.length) for one in self._asked.derived}

    def filled(self, read: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same with rows filled up that are read along keys."""
        return {name: _filled(x) if name in self._along else x for name, x in read.items()}

    def of(self, stage: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The lists of a kernel, from truth tensors by name."""
        if stage not in self._stages:
            with planning():
                questions = self._call.questions(*self._tiles[stage], by_key=stage == "dkdv")
                self._stages[stage] = Stage(self._call, questions, self._device)
        return self._stages[stage].lists(given)


class StageTensors(Mapping[str, Mapping[str, Tensor]]):
    """What the kernels of one call read, by kernel; each's lists are made when it is asked for."""

    def __init__(self, read: Mapping[str, Tensor], given: Mapping[str, Tensor], lists: MaskLists) -> None:
        self._read = lists.filled({**read, **lists.read(given)})
        self._given = given
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
    """The lists of one kernel."""

    def __init__(self, call: MaskCall, questions: TileQuestions, device: torch.device) -> None:
        self._call = call
        self._questions = questions.questions
        self._dims = {tensor.name: tuple(map(str, tensor.dims)) for tensor in call.pattern.tensors}
        reads = [read for question in questions.questions for read in reads_of(question)]
        dims = {dim for read in reads for dim in self._dims[read.tensor.name]}
        self._lanes = ListSharing.of(call.shape, dims, len(questions.questions))
        self._size = self._lanes.batch * self._lanes.heads, len(questions.columns)
        (lanes, tiles), rows = self._size, len(questions.starts) - 1
        lane = np.arange(lanes)[:, None]
        self._of_lane = constant(self._lanes.of_lane, device)
        self._columns = constant(questions.columns, device)
        self._ends = constant((lane * tiles + questions.starts).ravel(), device)
        self._numbers = torch.arange(lanes * tiles, dtype=torch.int32, device=device)
        kinds = range(len(questions.questions))
        self._kinds = [constant(questions.kinds == kind, device, torch.bool) for kind in kinds]
        self._known: dict[KnownAnswer, Tensor] = {}
        self._rectangles: dict[ReadQuestion, Rectangles] = {}
        for question in questions.questions:
            self._keep(question, device)
        self._rows = rows

    def _keep(self, question: Question, device: torch.device) -> None:
        """Copy what is known of a question."""
        match question:
            case KnownAnswer(state=state):
                self._known[question] = torch.from_numpy(np.array(state)).to(device)
            case ReadQuestion(tensor=tensor):
                dims, shape = self._dims[tensor.name], self._call.shape.inputs[tensor.name].shape
                own = [n for dim, n in zip(dims, shape, strict=True) if dim not in LANES]
                rows, places = [1] * (2 - len(own)) + own
                self._rectangles[question] = Rectangles.of(question, rows, places, device)
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

    def states(self, given: Mapping[str, Tensor]) -> Tensor:
        """-1, 0 or 1 for tiles of which nothing, a part or everything is seen: int8 (lanes, tiles)."""
        found = [self._answered(question, given) for question in self._questions]
        states = found[0]
        for kind, own in zip(self._kinds[1:], found[1:], strict=True):
            states = torch.where(kind[:, None], own, states)
        return states.expand(self._lanes.batch, self._lanes.heads, -1).reshape(self._size)

    def _answered(self, question: Question, given: Mapping[str, Tensor]) -> Tensor:
        """The states of tiles, (batch entries or 1, heads or 1, tiles)."""
        match question:
            case KnownAnswer():
                return self._known[question][None, None]
            case ReadQuestion(tensor=tensor):
                return self._widened(tensor.name, self._rectangles[question].states(self._by_lane(tensor.name, given)))
            case JoinedQuestion(op=op, parts=parts):
                join = torch.minimum if op == "and" else torch.maximum
                return reduce(join, (self._answered(part, given) for part in parts))
            case NegatedQuestion(part=part):
                return -self._answered(part, given)
            case PickedQuestion():
                parts = (question.condition, question.then, question.otherwise)
                which, then, otherwise = (self._answered(part, given) for part in parts)
                either = torch.where(then == otherwise, then, 0)
                return torch.where(which > 0, then, torch.where(which < 0, otherwise, either))

    def _by_lane(self, name: str, given: Mapping[str, Tensor]) -> Tensor:
        """A truth tensor (batch entries or 1, heads or 1, rows or 1, places)."""
        dims, x = self._dims[name], given[name].to(self._columns.device)
        sides = [[i for i, dim in enumerate(dims) if dim in names] for names in (("batch",), ("head", "kv_head"))]
        entries = [i for i, dim in enumerate(dims) if dim not in LANES]
        ordered = x.permute([*sides[0], *sides[1], *entries])
        has = *map(bool, sides), len(entries) > 1, len(entries) > 0
        return ordered[tuple(slice(None) if there else None for there in has)]

    def _widened(self, name: str, states: Tensor) -> Tensor:
        """The states of heads that share what was chosen, for each of them."""
        of_keys = "kv_head" in self._dims[name] and self._lanes.heads > states.shape[1]
        return states.repeat_interleave(self._lanes.heads // states.shape[1], 1) if of_keys else states

    def lists(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the kernel is given, by name."""
        keep_captured(self._constants)
        states = self.states(given)
        full, full_tiles = self._listed(states > 0)
        partial, partial_tiles = self._listed(states == 0)
        lanes = self._size[0]
        counts = (full + partial).view(lanes, self._rows + 1).diff(dim=1)
        return {
            "list_of_lane": self._of_lane,
            "tile_order": counts.argsort(dim=1, descending=True, stable=True).to(torch.int32).flatten(),
            "full_pointers": full,
            "full_tiles": full_tiles,
            "partial_pointers": partial,
            "partial_tiles": partial_tiles,
        }

    def _listed(self, marked: Tensor) -> tuple[Tensor, Tensor]:
        """Pointers and columns of marked tiles, (lanes, tiles); behind these are the others, in a list of one size."""
        flat = marked.flatten()
        before = F.pad(flat.cumsum(0, dtype=torch.int32), (1, 0))
        behind = before[-1:] + self._numbers - before[:-1]
        at = torch.where(flat, before[:-1], behind).to(torch.int64)
        tiles = torch.zeros(len(flat) + 1, dtype=torch.int32, device=flat.device)
        tiles.scatter_(0, at, self._columns.expand(self._size).reshape(-1))
        return before.index_select(0, self._ends), tiles


def _filled(given: Tensor) -> Tensor:
    """A truth tensor whose rows begin at multiples of 16 bytes, and can be read to the end of a tile."""
    behind = -given.shape[-1] % ALONG
    whole = F.pad(given, (0, behind)) if behind else given.contiguous()
    return whole if whole.data_ptr() % UNIT == 0 else whole.clone()


def _derived(given: Tensor, length: int | None) -> Tensor:
    """Of each end how many entries hold before it, or whether some of so many entries do."""
    counts = F.pad(given.cumsum(-1, dtype=torch.int32), (1, 0))
    if length is None:
        return counts
    last = counts[..., -1:].expand(*counts.shape[:-1], length)
    return torch.cat([counts, last], -1) > F.pad(counts, (length, 0))
