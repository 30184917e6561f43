"""What entries about speed belong to: this machine, and these versions of what computes on it."""

from __future__ import annotations

import platform
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@cache
def cpu_name() -> str:
    """The processor as it calls itself."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def has_matrix_tiles() -> bool:
    """Whether the processor multiplies tiles of bfloat16 (AMX), for which torch packs keys and values."""
    import torch

    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())  # not in every torch that is allowed


def this_cpu() -> str:
    """The processor, what torch uses of it, and the threads that it has now."""
    import torch

    return f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


@cache
def installed(package: str) -> str:
    """The version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
