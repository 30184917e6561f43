"""Every environment variable that attnc heeds, and the functions that read them: nothing else reads the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class EnvironmentVariable:
    """An environment variable. `by`: who reads it; where that is not attnc alone, what comes of it is theirs to say."""

    name: str
    default: str
    meaning: str
    by: str = "attnc"


CACHE_DIR = EnvironmentVariable("ATTNC_CACHE_DIR", "`$XDG_CACHE_HOME/attnc`", "the folder of what attnc keeps on disk")
CACHE_LIMIT = EnvironmentVariable("ATTNC_CACHE_LIMIT", "64", "MiB that attnc keeps on disk at most")
XDG_CACHE_HOME = EnvironmentVariable(
    "XDG_CACHE_HOME",
    "`~/.cache`",
    "the user's cache folder, in which attnc has one, if it is an absolute path; not read under `ATTNC_CACHE_DIR`",
)
HOME = EnvironmentVariable("HOME", "the user's entry in the password database", "whose `.cache` is taken", "Python")
NO_COLOR = EnvironmentVariable(
    "NO_COLOR", "", "with any value but an empty one no command colours or moves the cursor (<https://no-color.org>)"
)
TERM = EnvironmentVariable("TERM", "", "`dumb`: the same")
COLUMNS = EnvironmentVariable("COLUMNS", "the terminal's width, else 100", "columns that commands write for", "Python")
TRITON_INTERPRET = EnvironmentVariable(
    "TRITON_INTERPRET",
    "0",
    'with a value but 0, set before Triton is imported, `backend="triton"` takes CPU tensors, in Triton\'s interpreter',
    "attnc, Triton",
)
TRITON_CACHE_DIR = EnvironmentVariable(
    "TRITON_CACHE_DIR",
    "`$TRITON_HOME/.triton/cache`",
    "where compiled kernels are kept, and `attnc cache load` puts them",
    "Triton",
)
TRITON_HOME = EnvironmentVariable("TRITON_HOME", "`~`", "the folder above Triton's own", "Triton")
TORCH_LOGS = EnvironmentVariable(
    "TORCH_LOGS", "", "`+attnc` shows all that attnc logs, `attnc` without what is for debugging", "torch"
)
OMP_NUM_THREADS = EnvironmentVariable(
    "OMP_NUM_THREADS", "one for each core", "threads of the CPU executor, and of `attnc doctor --measure`", "torch"
)
VERIFY_IR = EnvironmentVariable(
    "ATTNC_VERIFY_IR",
    "0",
    "with a value but 0, the pattern or expression that each pass of the compiler returns is verified",
)

VARIABLES = (
    CACHE_DIR,
    CACHE_LIMIT,
    XDG_CACHE_HOME,
    HOME,
    NO_COLOR,
    TERM,
    COLUMNS,
    TRITON_INTERPRET,
    TRITON_CACHE_DIR,
    TRITON_HOME,
    TORCH_LOGS,
    OMP_NUM_THREADS,
    VERIFY_IR,
)


def text_of(variable: EnvironmentVariable) -> str:
    """Its value, empty where it is not set."""
    return os.environ.get(variable.name, "")


def wants_plain_text() -> bool:
    """Whether the user wants neither colours nor a cursor that moves, or has a terminal without them."""
    return bool(text_of(NO_COLOR)) or text_of(TERM) == "dumb"


def is_interpreted() -> bool:
    """Whether Triton interprets its kernels, so that they run on a CPU."""
    return text_of(TRITON_INTERPRET) not in ("", "0")


def verifies_ir() -> bool:
    """Return whether what each pass of the compiler returns shall be verified."""
    return text_of(VERIFY_IR) not in ("", "0")


__all__ = ["VARIABLES", "EnvironmentVariable", "is_interpreted", "text_of", "verifies_ir", "wants_plain_text"]
