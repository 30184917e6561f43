"""What was tuned for a pattern, found by the shape of a call: in a table, or in the cache on disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from weakref import WeakSet

import torch

from attnc.compiler.locks import LongLock
from attnc.runtime.call import Sizes
from attnc.runtime.disk.machine import this_cpu
from attnc.runtime.disk.store import store
from attnc.runtime.recent import Recent
from attnc.runtime.settings import SETTINGS
from attnc.runtime.tuning.keys import CompiledPattern, Executor, Key, bucket_of
from attnc.runtime.tuning.records import KIND, MODEL, Record, name_of, read_record
from attnc.runtime.tuning.wish import Wish

_log = logging.getLogger(__name__)


class Tuned:
    """The choices for one pattern. While a schedule is tried, all calls of the pattern in this process run by it."""

    def __init__(self, compiled: CompiledPattern, wish: Wish) -> None:
        self.compiled = compiled
        self.wish = wish
        self._tried: tuple[tuple[str, str], ...] | None = None
        self._changes = 0
        self._records: Recent[Record | None] = Recent(SETTINGS.plans)
        self._here: dict[str, Record] = {}
        _TUNED.add(self)

    @property
    def state(self) -> Hashable:
        """Equal where the choices for equal calls are."""
        tried = self._tried
        return self._changes if tried is None else tried

    def option(self, knob: str, sizes: Sizes, executor: Executor, device: torch.device | None = None) -> str | None:
        """What was chosen for a knob in calls of these sizes; None: the model decides."""
        tried = self._tried
        if tried is None:
            record = self.record(sizes, executor, device)
            option = None if record is None else record.choices.get(knob)
        else:
            option = dict(tried).get(knob)
        return None if option == MODEL else option

    def why(self, knob: str, sizes: Sizes, executor: Executor, device: torch.device | None = None) -> str:
        """Why a knob stands as it does in calls of these sizes, in words."""
        record = self.record(sizes, executor, device)
        return f"not tuned for {bucket_of(sizes)}: the model's choice" if record is None else record.why(knob)

    def is_settled(self, sizes: Sizes, executor: Executor) -> bool:
        """Whether calls of these sizes will run as they do now."""
        return self._tried is None and self.record(sizes, executor) is not None

    def record(self, sizes: Sizes, executor: Executor, device: torch.device | None = None) -> Record | None:
        """What is known for calls of these sizes on a device."""
        of_machine = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32
        name = (sizes, executor, device, self._changes, of_machine, store().folder)
        return self._records.get(name, lambda: self._found(sizes, executor, device))

    def _found(self, sizes: Sizes, executor: Executor, device: torch.device | None) -> Record | None:
        name = name_of(self.key(sizes, executor, device), bucket_of(sizes))
        return self._read(name) if self.wish.table is None else self.wish.table.records.get(name)

    def key(self, sizes: Sizes, executor: Executor, device: torch.device | None = None) -> Key:
        """The key of calls of these sizes on a device."""
        tf32 = executor == "triton" and sizes.dtype == "float32" and torch.backends.cuda.matmul.allow_tf32
        return self.compiled.key(sizes, executor, target_name(executor, device), tf32)

    def _read(self, name: str) -> Record | None:
        here = self._here.get(f"{store().folder} {name}")
        payload = store().read(KIND, name) if here is None else None
        if payload is None:
            return here
        record = read_record(payload)
        if record is None or record.name != name:
            _log.warning("the entry %s holds no tuned choices and is ignored", name)
            return None
        return record

    def keep(self, record: Record) -> None:
        """Take these choices from now on, here and, where the disk allows it, in every process."""
        here = f"{store().folder} {record.name}"
        if store().write(KIND, record.name, record.payload()):
            self._here.pop(here, None)
        else:
            self._here[here] = record  # one for each bucket that was measured: few
        self._changes += 1

    def look_again(self) -> None:
        """Read the cache anew: another process may have written."""
        self._changes += 1

    @contextmanager
    def trying(self, choices: Mapping[str, str]) -> Iterator[None]:
        """Inside, calls of the pattern run by these choices."""
        before, self._tried = self._tried, tuple(sorted(choices.items()))
        try:
            yield
        finally:
            self._tried = before


MEASURING = LongLock()
"""Held while something is measured, by one thread of the process."""

_TUNED: WeakSet[Tuned] = WeakSet()


def _end_trials() -> None:
    """In a child nothing is tried: the thread that did is not there."""
    for tuned in _TUNED:
        tuned._tried = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_end_trials)


def target_name(executor: Executor, device: torch.device | None) -> str:
    """The machine that something is measured on, as a key names it."""
    if executor == "cpu":
        return this_cpu()
    from attnc.runtime.gpu.targets import target_of

    place = torch.device("cpu") if device is None else device
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else f"interpreter on {this_cpu()}"
    return f"{target_of(place).name}, {name}"
