"""Errors of a call; each is also the builtin error that a caller would expect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from attnc.spec.errors import AttncError


class UnsupportedError(AttncError, NotImplementedError):
    """A call asks for something that attnc does not support (yet). The message names an alternative."""


class ArgumentError(AttncError, ValueError):
    """A tensor or option of a call has the wrong shape, size or value. The message names it and the remedy."""


class ArgumentTypeError(AttncError, TypeError):
    """A tensor or option of a call has the wrong type or dtype, or is missing or unknown."""


class PatternNotFoundError(AttncError, LookupError):
    """No library pattern, or no file, has this name."""


class MeasurementError(AttncError, RuntimeError):
    """The machine was too busy to be measured: nothing was saved. The message says what differed."""


class TorchMissingError(AttncError, ImportError):
    """A feature needs torch, which is not installed. The message names the remedy."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} needs torch, which is not installed: `pip install torch`")


@contextmanager
def needing_torch(what: str) -> Iterator[None]:
    """Raise TorchMissingError, which names `what`, where the code inside imports torch and torch is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise TorchMissingError(what) from error
