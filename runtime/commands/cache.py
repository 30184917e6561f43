"""`attnc cache`: list, explain, clear and load the files that attnc keeps on disk."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from attnc.runtime.commands import console
from attnc.runtime.commands.call_arguments import add_call, calls
from attnc.runtime.commands.console import UsageError
from attnc.runtime.commands.patterns import compiled
from attnc.runtime.disk.store import CacheEntry, limit, store
from attnc.runtime.disk.triton import triton_folder, triton_state

if TYPE_CHECKING:
    from attnc.runtime.choices.choice_keys import Executor, Key
    from attnc.runtime.choices.records import Record


def add(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `cache`."""
    commands = parser.add_subparsers(dest="what", metavar="COMMAND", title="commands", required=True)
    for name, text in _SUMMARIES.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        command.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
        if name == "why":
            add_call(command)
        if name == "load":
            command.add_argument(
                "file", metavar="FILE", type=Path, help="a .zip of compiled kernels, or a .json table of tuned choices"
            )


_SUMMARIES = {
    "path": "print the folder of the entries, and the folder of the kernels that Triton compiled",
    "show": "list every entry: tuned choices and measured rates",
    "why": "explain whether the cache has the choice of a call: its key, and what differs in the nearest entry",
    "clear": "remove every entry of attnc, but not Triton's kernels",
    "load": "load compiled kernels into Triton's cache, or tuned choices into attnc's",
}


def run(args: argparse.Namespace) -> int:
    """Run a subcommand and return its exit status; a file that cannot be loaded here raises, which exits with 2."""
    commands = {"path": _path, "show": _show, "why": _why, "clear": _clear, "load": _load}
    return commands[args.what](args)


def _path(args: argparse.Namespace) -> int:
    cache, triton = store(), triton_folder()
    entries = cache.entries()
    facts: dict[str, object] = {
        "folder": None if cache.folder is None else str(cache.folder),
        "entries": len(entries),
        "bytes": sum(entry.bytes for entry in entries),
        "limit_bytes": limit(),
        "triton_folder": str(triton),
        "triton_state": triton_state(triton),
    }
    size = f"{console.counted(len(entries), 'entry')}, {_kib(entries)} of {limit() >> 20} MiB"
    folder = cache.folder or "none: there is no home folder; set ATTNC_CACHE_DIR"
    console.print_answer(args, facts, f"attnc   {folder}  ({size})\ntriton  {triton}  ({facts['triton_state']})")
    return console.FINE


def _show(args: argparse.Namespace) -> int:
    entries = store().entries()
    if args.json:
        console.print_json({"entries": [asdict(entry) for entry in entries]})
        return console.FINE
    for entry in entries:
        print("\n".join(_described(entry)))
    print(f"{console.counted(len(entries), 'entry')}, {_kib(entries)}")
    return console.FINE


def _described(entry: CacheEntry) -> list[str]:
    from attnc.runtime.choices.records import KIND, read_record  # needs torch, which may be missing

    head = f"{entry.kind}-{entry.name}  {entry.bytes:,} bytes"
    if entry.payload is None:
        return [f"{head}  damaged, ignored: {entry.damage}"]
    if entry.kind != KIND:
        return [f"{head}  {entry.payload.get('machine', '')}, {entry.payload.get('source', '')}"]
    record = read_record(entry.payload)
    if record is None:
        return [f"{head}  written by another version of attnc, ignored"]
    parts = dict(record.key.parts)
    call = (
        f"{parts.get('pattern')}({parts.get('parameters')}), {parts.get('dtype')} {parts.get('dk')}/{parts.get('dv')}"
    )
    return [head, f"  {call} on {parts.get('target')}", *(f"  {line}" for line in str(record).splitlines())]


def _why(args: argparse.Namespace) -> int:
    """Return 0 if the cache has the choice of every call, else 1."""
    from attnc.runtime.choices.choice_keys import bucket_of  # needs torch, which may be missing
    from attnc.runtime.choices.records import KIND, read_record  # needs torch, which may be missing
    from attnc.runtime.tuning.tuner import NOTHING  # needs torch, which may be missing

    attention = compiled(args, tune="0s")
    tuned = attention.tuned
    assert tuned is not None
    payloads = [entry.payload for entry in store().entries() if entry.kind == KIND and entry.payload is not None]
    records = [record for payload in payloads if (record := read_record(payload)) is not None]
    answers: list[dict[str, object]] = []
    texts: list[str] = []
    if attention.is_recurrence or attention.pattern.chooses:
        raise UsageError(f"`{attention.name}`: {NOTHING}")
    for call in calls(attention, args):
        executor: Executor = "triton" if call.q.is_cuda else "cpu"
        key, bucket = tuned.key(call.sizes, executor, call.q.device), bucket_of(call.sizes)
        answer, text = _answer(key, bucket, tuned.record(call.sizes, executor, call.q.device), records)
        answers.append(answer)
        texts.append(text)
    console.print_answer(args, {"calls": answers}, "\n".join(texts))
    return console.FINE if all(answer["found"] for answer in answers) else console.FOUND


def _answer(key: Key, bucket: str, record: Record | None, records: list[Record]) -> tuple[dict[str, object], str]:
    """Return the answer about one call as JSON and as text: its entry, or what differs in the nearest entry."""
    from attnc.runtime.choices.records import KIND, name_of  # needs torch, which may be missing

    def differing(other: Record) -> list[str]:
        shapes = [] if other.bucket == bucket else [f"shapes: {bucket}, there {other.bucket}"]
        return [*key.differing(other.key), *shapes]

    def distance(other: Record) -> tuple[bool, int]:  # a different pattern always ranks last
        return dict(key.parts)["pattern"] != dict(other.key.parts).get("pattern"), len(differing(other))

    entry = f"{KIND}-{name_of(key, bucket)}"
    nearest = min(records, key=distance, default=None) if record is None else None
    nearest_entry = None if nearest is None else f"{KIND}-{nearest.name}"
    differences = [] if nearest is None else differing(nearest)
    lines = [str(key), f"{'shapes':<14}{bucket}", f"{'entry':<14}{entry}"]
    if record is None:
        lines.append("not in the cache: run `attnc tune` with the same arguments to measure it")
    else:
        lines.append(f"in the cache: {record}")
    if nearest is not None:
        lines += [f"the nearest entry, {nearest_entry}, differs in", *(f"  {line}" for line in differences)]
    answer: dict[str, object] = {
        "key": dict(key.parts),
        "bucket": bucket,
        "entry": entry,
        "found": record is not None,
        "choices": None if record is None else dict(record.choices),
        "text": None if record is None else str(record),
        "nearest": nearest_entry,
        "differs_in": differences,
    }
    return answer, "\n".join(lines)


def _clear(args: argparse.Namespace) -> int:
    cache = store()
    count = cache.clear()
    answer = {"folder": None if cache.folder is None else str(cache.folder), "removed": count}
    console.print_answer(args, answer, f"{cache.folder}: {console.counted(count, 'entry')} removed")
    return console.FINE


def _load(args: argparse.Namespace) -> int:
    if args.file.suffix == ".json":
        from attnc.runtime.choices.records import KIND  # needs torch, which may be missing
        from attnc.runtime.choices.tuned_tables import load_table  # needs torch, which may be missing

        records = load_table(args.file).records
        kept = sum(store().write(KIND, record.name, record.payload()) for record in records.values())
        text = f"{args.file}: {kept} of {console.counted(len(records), 'entry')} stored in {store().folder}"
        console.print_answer(args, {"file": str(args.file), "loaded": kept, "of": len(records)}, text)
        return console.FINE if kept == len(records) else console.FOUND
    from attnc.runtime.toolchain.binaries import load_binaries  # needs torch, which may be missing

    manifest = load_binaries(args.file)
    console.print_answer(args, {"file": str(args.file), "loaded": asdict(manifest)}, f"{args.file}: loaded {manifest}")
    return console.FINE


def _kib(entries: list[CacheEntry]) -> str:
    return f"{sum(entry.bytes for entry in entries) / 1024:.1f} KiB"
