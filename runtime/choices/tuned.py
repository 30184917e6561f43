"""Tuned choices of a pattern, looked up by the shape of a call: in a table, or in the cache on disk."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable

import torch

from attnc.compiler.locks import LongLock
from attnc.runtime.call.tensor_checks import TensorSizes
from attnc.runtime.choices.choice_keys import CompiledPattern, Executor, Key, bucket_of
from attnc.runtime.choices.choice_source import ChoiceSource
from attnc.runtime.choices.records import KIND, MODEL, Record, name_of, read_record
from attnc.runtime.disk.machine_key import this_cpu
from attnc.runtime.disk.store import store
from attnc.runtime.process.recent import Recent
from attnc.runtime.settings import SETTINGS

_log = logging.getLogger(__name__)


class Tuned:
    """The tuned choices for one pattern, from the requested source."""

    def __init__(self, compiled: CompiledPattern, wanted: ChoiceSource) -> None:
        self.compiled = compiled
        self.wanted = wanted
        self._changes = 0
        self._records: Recent[Record | None] = Recent(SETTINGS.plans)
        self._here: dict[str, Record] = {}
        self._told = False

    @property
    def state(self) -> Hashable:
        """A key that is equal where the choices for equal calls are."""
        return self._changes, torch.get_num_threads(), store().folder

    def option(
        self, knob: str, sizes: TensorSizes, executor: Executor, device: torch.device | None = None
    ) -> str | None:
        """Return the option chosen for a knob in calls of these sizes; None where the model decides."""
        if self.wanted.source == "tried":
            option = dict(self.wanted.choices).get(knob)
        else:
            record = self.record(sizes, executor, device)
            option = None if record is None else record.choices.get(knob)
        return None if option == MODEL else option

    def why(self, knob: str, sizes: TensorSizes, executor: Executor, device: torch.device | None = None) -> str:
        """Return the reason for a knob's option in calls of these sizes, in words."""
        if self.wanted.source == "tried":
            return "the option under trial"
        record = self.record(sizes, executor, device)
        return f"not tuned for {bucket_of(sizes)}: the model's choice" if record is None else record.why(knob)

    def record(self, sizes: TensorSizes, executor: Executor, device: torch.device | None = None) -> Record | None:
        """Return the record for calls of these sizes on a device; None where nothing is tuned."""
        name = (sizes, executor, device, self.state, torch.backends.cuda.matmul.allow_tf32)
        return self._records.get(name, lambda: self._found(sizes, executor, device))

    def key(self, sizes: TensorSizes, executor: Executor, device: torch.device | None = None) -> Key:
        """Return the key of calls of these sizes on a device."""
        tf32 = executor == "triton" and sizes.dtype == "float32" and torch.backends.cuda.matmul.allow_tf32
        return self.compiled.key(sizes, executor, target_name(executor, device), tf32)

    def _found(self, sizes: TensorSizes, executor: Executor, device: torch.device | None) -> Record | None:
        key = self.key(sizes, executor, device)
        if self.wanted.table is None:
            return self._read(name_of(key, bucket_of(sizes)))
        result = self.wanted.table.records.get(name_of(key, bucket_of(sizes)))
        if result is None:
            self._tell_once(key, self.wanted.table.records.values())
        return result

    def _tell_once(self, key: Key, records: Iterable[Record]) -> None:
        """Say that a table has nothing for this pattern under its key; where it has some of that name, why not."""
        records = list(records)
        if self._told or any(record.key == key for record in records):
            return
        self._told = True
        pattern = self.compiled.pattern.name
        of_pattern = [record for record in records if dict(record.key.parts).get("pattern") == pattern]
        if not of_pattern:
            _log.info("the table of tuned choices has nothing of `%s`: the model decides", pattern)
            return
        nearest = min(of_pattern, key=lambda record: len(key.differing(record.key)))
        _log.warning(
            "the table of tuned choices has `%s`, but not as it is called here; the model decides. It differs in %s",
            pattern,
            "; ".join(key.differing(nearest.key)),
        )

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
        """Use these choices from now on, in this process and, where the disk allows it, in every process."""
        here = f"{store().folder} {record.name}"
        if store().write(KIND, record.name, record.payload()):
            self._here.pop(here, None)
        else:
            self._here[here] = record  # one per measured bucket: few
        self._changes += 1

    def look_again(self) -> None:
        """Read the cache again, because another process may have written."""
        self._changes += 1


MEASURING = LongLock()
"""A lock held by the thread of this process that measures."""


def target_name(executor: Executor, device: torch.device | None) -> str:
    """Return the name, in keys, of the machine that is measured."""
    if executor == "cpu":
        return this_cpu()
    from attnc.runtime.call.device_targets import target_of  # only where kernels run

    place = torch.device("cpu") if device is None else device
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else f"interpreter on {this_cpu()}"
    return f"{target_of(place).name}, {name}"
