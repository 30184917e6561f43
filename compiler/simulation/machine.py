"""Machines as data: the figures that a simulation needs, each with its source.

A machine file is JSON with `schema`, `name`, `title`, `kind` ("gpu"), `architecture` and `figures`. Each figure is
`{"value": number, "source": text}`; all figures of `FIGURES` are required. `machines/` holds the machines that are
known by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from attnc.spec.errors import AttncError
from attnc.spec.suggest import did_you_mean

SCHEMA = 1

FIGURES: Mapping[str, str] = {
    "sms": "number of streaming multiprocessors (SMs)",
    "clock_ghz": "clock of the SMs in GHz",
    "exp_per_clock": "exponentials of an SM per clock",
    "fma_per_clock": "fp32 fused multiply-adds of an SM per clock",
    "alu_per_clock": "compares, minima, maxima and integer operations of an SM per clock",
    "issue_per_clock": "operations of any kind that an SM issues per clock",
    "shared_bytes_per_clock": "bytes that an SM reads from its shared memory per clock",
    "shared_kib": "shared memory that a program may use, in KiB",
    "tensor_memory_kib": "tensor memory of an SM in KiB, 0 if it has none",
    "registers": "32-bit registers of an SM",
    "l2_mib": "size of the second-level cache in MiB",
    "l2_bytes_per_clock": "bytes that all SMs together read from the second-level cache per clock",
    "hbm_tb_per_s": "peak bandwidth of the memory in TB/s",
    "hbm_share": "share of the peak bandwidth that long copies reach",
    "launch_us": "time from the end of a kernel to the start of the next, in µs",
    "prologue_clocks": "clocks of a program before its first tile and after its last",
}
"""The figures of a GPU by name, with their meaning.

`tensor_flop_per_clock` (by dtype) and `kernel_share` (by head dimension: the share of the modelled rate that kernels
reach on dense attention) are tables of such figures.
"""

TABLES: Mapping[str, tuple[str, ...]] = {
    "tensor_flop_per_clock": ("bfloat16", "float16", "float32"),
    "kernel_share": ("64", "128"),
}
"""The tables of figures by name, with the entries that each must have."""

MAY_BE_ZERO = frozenset({"tensor_memory_kib", "launch_us", "prologue_clocks"})
"""The figures that may be 0."""


class MachineError(AttncError, ValueError):
    """An unknown machine, an unusable machine file, or a call that the machine cannot run; the message says why."""


@dataclass(frozen=True)
class Machine:
    """A GPU with its figures; `sources`: the source of each figure by name."""

    name: str
    title: str
    architecture: str
    figures: Mapping[str, float]
    tables: Mapping[str, Mapping[str, float]]
    sources: Mapping[str, str]

    def __getitem__(self, figure: str) -> float:
        """Return a figure of `FIGURES`."""
        return self.figures[figure]

    @property
    def sms(self) -> int:
        """The number of streaming multiprocessors."""
        return int(self.figures["sms"])

    @property
    def hertz(self) -> float:
        """The number of clocks per second."""
        return self.figures["clock_ghz"] * 1e9

    def tensor_flop(self, dtype: str) -> float:
        """Return the floating-point operations per SM and clock in products of this dtype."""
        table = self.tables["tensor_flop_per_clock"]
        if dtype not in table:
            raise MachineError(f"{self.name} has no tensor rate for {dtype}; it has {', '.join(table)}")
        return table[dtype]

    def kernel_share(self, head_dim: int) -> float:
        """Return the share of the modelled rate that dense attention reaches, from the next larger head dimension."""
        shares = sorted((int(width), share) for width, share in self.tables["kernel_share"].items())
        return next((share for width, share in shares if width >= head_dim), shares[-1][1])

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.title} ({self.architecture})"]
        lines += [f"  {name} {value:g}  ({self.sources[name]})" for name, value in self.figures.items()]
        for table, entries in self.tables.items():
            lines += [f"  {table}[{e}] {value:g}  ({self.sources[f'{table}[{e}]']})" for e, value in entries.items()]
        return "\n".join(lines)


def machine_names() -> tuple[str, ...]:
    """Return the names of the machines in `machines/`."""
    return tuple(sorted(p.name.removesuffix(".json") for p in _folder().iterdir() if p.name.endswith(".json")))


def find_machine(name: str) -> Machine:
    """Return the machine with this name, or the machine in this file if the name ends in `.json`.

    Raises MachineError, and OSError for a file that cannot be read.
    """
    if name.endswith(".json"):
        return read_machine(Path(name).read_text(encoding="utf-8"), name)
    machine = ALIASES.get(name.lower(), name.lower())
    if machine not in machine_names():
        listed = ", ".join((*machine_names(), "cpu"))
        near = did_you_mean(name, (*machine_names(), *ALIASES, "cpu"))
        raise MachineError(f"unknown machine `{name}`{': ' + near if near else ''}; use {listed}, or a file NAME.json")
    return _shipped_machine(machine)


ALIASES: Mapping[str, str] = {"a100": "a100-80", "h100": "h100-sxm"}
"""Short names of machines."""


@cache
def _shipped_machine(name: str) -> Machine:
    return read_machine((_folder() / f"{name}.json").read_text(encoding="utf-8"), name)


def _folder() -> Any:
    return files("attnc.compiler") / "simulation" / "machines"


def read_machine(text: str, where: str) -> Machine:
    """Return the machine that a JSON text describes; `where` names the text in messages. Raises MachineError."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MachineError(f"{where}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise _wrong(where, "", data, "an object with schema, name, title, kind, architecture and figures")
    if data.get("schema") != SCHEMA:
        raise _wrong(where, "schema", data.get("schema"), str(SCHEMA))
    if data.get("kind") != "gpu":
        raise _wrong(where, "kind", data.get("kind"), '"gpu"')
    name, title, architecture = (_text(data, key, where) for key in ("name", "title", "architecture"))
    entries = data.get("figures")
    if not isinstance(entries, dict):
        raise _wrong(where, "figures", entries, "an object with a figure for each name")
    unknown = sorted(entries.keys() - FIGURES.keys() - TABLES.keys())
    if unknown:
        near = did_you_mean(unknown[0], (*FIGURES, *TABLES))
        raise MachineError(f"{where}: unknown figure `{unknown[0]}`{': ' + near if near else ''}")
    sources: dict[str, str] = {}
    figures = {key: _figure(entries.get(key), key, where, sources) for key in FIGURES}
    tables = {}
    for key, required in TABLES.items():
        table = entries.get(key)
        if not isinstance(table, dict) or not set(required) <= table.keys():
            raise _wrong(where, key, table, f"an object with at least {', '.join(required)}")
        tables[key] = {entry: _figure(value, f"{key}[{entry}]", where, sources) for entry, value in table.items()}
    if not all(width.isdigit() for width in tables["kernel_share"]):
        raise _wrong(
            where, "kernel_share", [*tables["kernel_share"]], "an object whose names are head dimensions, such as 64"
        )
    return Machine(name, title, architecture, figures, tables, sources)


def _text(data: Mapping[str, object], key: str, where: str) -> str:
    value = data.get(key)
    if not isinstance(value, str) or not value.strip():
        raise _wrong(where, key, value, "a text")
    return value


def _figure(entry: object, key: str, where: str, sources: dict[str, str]) -> float:
    meaning = FIGURES.get(key, key.partition("[")[0].replace("_", " "))
    example = f'{{"value": number, "source": text}}: {meaning}'
    if not isinstance(entry, dict) or entry.keys() != {"value", "source"}:
        raise _wrong(where, key, entry, example)
    value, source = entry["value"], entry["source"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not value < float("inf"):
        raise _wrong(where, key, value, example)
    if value < 0 or (value == 0 and key not in MAY_BE_ZERO):
        raise _wrong(where, key, value, "a number above 0")
    if not isinstance(source, str):
        raise _wrong(where, f"{key}.source", source, "a text that names the source of the figure")
    sources[key] = source
    return float(value)


def _wrong(where: str, key: str, value: object, expected: str) -> MachineError:
    """Return the error of a machine file whose entry `key` is not as expected."""
    shown = "missing" if value is None else repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    problem = f"`{key}` is {shown}" if key else f"the file holds {shown}"
    return MachineError(f"{where}: {problem}; write {expected}")
