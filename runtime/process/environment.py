"""Every environment variable that attnc reads, with the functions that read them; no other module reads any."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class EnvironmentVariable:
    """An environment variable. `by`: the component that reads the variable and defines its effect."""

    name: str
    default: str
    meaning: str
    by: str = "attnc"


CACHE_DIR = EnvironmentVariable("ATTNC_CACHE_DIR", "`$XDG_CACHE_HOME/attnc`", "the folder of attnc's files on disk")
CACHE_LIMIT = EnvironmentVariable("ATTNC_CACHE_LIMIT", "64", "maximum size of attnc's files on disk, in MiB")
XDG_CACHE_HOME = EnvironmentVariable(
    "XDG_CACHE_HOME",
    "`~/.cache`",
    "the user's cache folder, which holds attnc's, if it is an absolute path; not read with `ATTNC_CACHE_DIR`",
)
HOME = EnvironmentVariable(
    "HOME", "the user's entry in the password database", "the folder whose `.cache` is used", "Python"
)
NO_COLOR = EnvironmentVariable(
    "NO_COLOR", "", "any value but an empty one disables colours and cursor movement (<https://no-color.org>)"
)
TERM = EnvironmentVariable("TERM", "", "`dumb`: disables colours and cursor movement")
COLUMNS = EnvironmentVariable(
    "COLUMNS", "the terminal's width, else 100", "width of the output of commands, in columns", "Python"
)
TRITON_INTERPRET = EnvironmentVariable(
    "TRITON_INTERPRET",
    "0",
    'any value but 0, set before Triton is imported: `backend="triton"` accepts CPU tensors, by Triton\'s interpreter',
    "attnc, Triton",
)
TRITON_CACHE_DIR = EnvironmentVariable(
    "TRITON_CACHE_DIR",
    "`$TRITON_HOME/.triton/cache`",
    "the folder of compiled kernels, to which `attnc cache load` writes",
    "Triton",
)
TRITON_HOME = EnvironmentVariable("TRITON_HOME", "`~`", "the folder above Triton's own", "Triton")
TORCH_LOGS = EnvironmentVariable(
    "TORCH_LOGS", "", "`+attnc` shows every log message of attnc, `attnc` all but debug messages", "torch"
)
OMP_NUM_THREADS = EnvironmentVariable(
    "OMP_NUM_THREADS", "one for each core", "threads of the CPU executor, and of `attnc doctor --measure`", "torch"
)
VERIFY_IR = EnvironmentVariable(
    "ATTNC_VERIFY_IR",
    "0",
    "any value but 0: verify the pattern or expression that each pass of the compiler returns",
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
    """Return the value of a variable, empty if it is not set."""
    return os.environ.get(variable.name, "")


def wants_plain_text() -> bool:
    """Check whether the user disabled colours and cursor movement, or the terminal lacks them."""
    return bool(text_of(NO_COLOR)) or text_of(TERM) == "dumb"


def is_interpreted() -> bool:
    """Check whether Triton interprets its kernels, so that they run on a CPU."""
    return text_of(TRITON_INTERPRET) not in ("", "0")


def verifies_ir() -> bool:
    """Check whether the pattern that each compiler pass returns is to be verified."""
    return text_of(VERIFY_IR) not in ("", "0")
