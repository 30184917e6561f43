"""Compiled kernels as one file, written without a GPU and installed into Triton's cache on a machine with a GPU.

The file is a zip: `manifest.json` names the kernels, their tiles, the Triton version and the digest of every other
file; the other files are entries of Triton's cache. Loading checks everything before it installs anything. The binaries
are GPU code: load only files that you would run.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from attnc.runtime.call.call_errors import ArgumentError
from attnc.runtime.disk.triton import guard_triton
from attnc.runtime.disk.whole import write_whole
from attnc.runtime.toolchain.ahead import AheadCalls, AheadKernel

SCHEMA = 1
MANIFEST = "manifest.json"
BINARIES = (".cubin", ".hsaco")
_NAME = re.compile(r"[A-Z2-7]{20,60}/[A-Za-z0-9_]+\.(json|cubin|hsaco)")
_MOST = 1 << 28
"""Maximum size of a file in the zip, in bytes."""


@dataclass(frozen=True)
class Manifest:
    """The contents of a file of binaries. `files`: SHA-256 by name. `pattern`: as text (`identity`)."""

    attnc: str
    triton: str
    calls: AheadCalls
    kernels: tuple[AheadKernel, ...]
    files: Mapping[str, str]

    def __str__(self) -> str:
        c = self.calls
        heads = f"heads {c.heads}/{c.kv_heads} of {c.dk} and {c.dv} in {c.dtype}"
        lines = [f"{len(self.kernels)} kernels for {c.target}, {heads}, by Triton {self.triton}"]
        lines += [f"  {k.function}: tiles of {k.tiles}, {k.shared / 1024:.1f} KiB shared" for k in self.kernels]
        return "\n".join(lines)


def pack(calls: AheadCalls, kernels: Sequence[AheadKernel], folder: Path) -> tuple[Manifest, bytes]:
    """Pack a folder of compiled kernels into the bytes of a file; equal kernels give equal bytes."""
    import triton  # optional

    from attnc import __version__  # only in the process that compiles

    contents = {}
    for kernel in kernels:
        for path in sorted((folder / kernel.key).iterdir()):
            if path.suffix in (*BINARIES, ".json") and not path.name.startswith("__grp__"):
                contents[f"{kernel.key}/{path.name}"] = path.read_bytes()
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    manifest = Manifest(__version__, triton.__version__, calls, tuple(kernels), digests)
    manifest_text = json.dumps({"schema": SCHEMA, **asdict(manifest)}, indent=1, ensure_ascii=False)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in [(MANIFEST, manifest_text.encode()), *sorted(contents.items())]:
            file.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)  # no time stamp
    return manifest, buffer.getvalue()


def load_binaries(path: str | os.PathLike[str]) -> Manifest:
    """Install the kernels of a file that `attnc emit --binaries` wrote into Triton's cache.

    A call that needs one of the kernels then compiles nothing. Returns the file's manifest; entries that are present
    already are left alone.

    Raises ArgumentError if the file is not a file of binaries, is damaged, or does not suit this Triton or this GPU.
    """
    import triton  # optional

    try:
        with zipfile.ZipFile(path) as file:
            manifest = _manifest(file)
            entries = dict(_entries(file, manifest))
    except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArgumentError(
            f"{os.fspath(path)}: not a file of binaries, or damaged ({type(error).__name__}: {error}); write it "
            f"again with `attnc emit --binaries`"
        ) from error
    if manifest.triton != triton.__version__:
        raise ArgumentError(
            f"{os.fspath(path)}: compiled by Triton {manifest.triton}, but {triton.__version__} is installed and "
            f"would compile again; write the file with the version that runs it"
        )
    _check_device(path, manifest.calls.target)
    guard_triton()
    _install(entries, Path(_cache()))
    return manifest


def _cache() -> str:
    import triton  # optional

    return str(triton.knobs.cache.dir)


def _manifest(file: zipfile.ZipFile) -> Manifest:
    data = json.loads(_read(file, MANIFEST))
    if data.pop("schema") != SCHEMA:
        raise ValueError("unknown schema")
    kernels = tuple(AheadKernel(**kernel) for kernel in data.pop("kernels"))
    return Manifest(calls=AheadCalls(**data.pop("calls")), kernels=kernels, **data)


def _entries(file: zipfile.ZipFile, manifest: Manifest) -> Iterator[tuple[str, bytes]]:
    for name, digest in manifest.files.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"unexpected file {name!r}")
        data = _read(file, name)
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"{name} does not match its digest")
        yield name, data


def _read(file: zipfile.ZipFile, name: str) -> bytes:
    if file.getinfo(name).file_size > _MOST:
        raise ValueError(f"{name} is too large")
    return file.read(name)


def _check_device(path: str | os.PathLike[str], target: str) -> None:
    if not torch.cuda.is_available():
        return
    if torch.version.hip:
        device_target = torch.cuda.get_device_properties(0).gcnArchName.partition(":")[0]
    else:
        major, minor = torch.cuda.get_device_capability()
        device_target = f"sm_{major}{minor}"
    if device_target != target:
        raise ArgumentError(f"{os.fspath(path)}: compiled for {target}, but this machine's GPU is {device_target}")


def _install(entries: Mapping[str, bytes], cache: Path) -> None:
    """Write entries; the group file that makes Triton find the entries of a kernel comes last."""
    groups: dict[str, list[str]] = {}
    for name, data in entries.items():
        key, file = name.split("/")
        _write(cache / key / file, data)
        groups.setdefault(key, []).append(file)
    for key, files in groups.items():
        group_text = json.dumps({"child_paths": {file: str(cache / key / file) for file in files}})
        stem = next(file for file in files if file.endswith(".json"))
        _write(cache / key / f"__grp__{stem}", group_text.encode())


def _write(path: Path, data: bytes) -> None:
    """Write a file atomically; an existing file stays."""
    if path.exists():
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_whole(path, data, prefix=".tmp-")
