"""The machine and the library versions that measured speeds belong to."""

from __future__ import annotations

import platform
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@cache
def cpu_name() -> str:
    """Return the processor's name for itself."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def has_matrix_tiles() -> bool:
    """Check whether the processor multiplies bfloat16 tiles (AMX), for which torch packs keys and values."""
    import torch  # may be missing

    return bool(
        getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    )  # missing in some supported versions of torch


def this_cpu() -> str:
    """Return the processor, the instruction set that torch uses, and the current number of threads."""
    import torch  # may be missing

    return f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


@cache
def installed(package: str) -> str:
    """Return the version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
