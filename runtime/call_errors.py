"""The errors of a call, each also the builtin error that a caller would expect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from attnc.spec.errors import AttncError


class UnsupportedError(AttncError, NotImplementedError):
    """Something that attnc does not do (yet), asked of it by a call. The message names what does it."""


class ArgumentError(AttncError, ValueError):
    """A tensor or option of a call has the wrong shape, size or value. The message names it and the remedy."""


class ArgumentTypeError(AttncError, TypeError):
    """A tensor or option of a call has the wrong type or dtype, or is missing or unknown."""


class PatternNotFoundError(AttncError, LookupError):
    """No library pattern, or no file, of that name."""


class MeasurementError(AttncError, RuntimeError):
    """The machine was too busy to be measured: nothing was kept. The message says what differed."""


class TorchMissingError(AttncError, ImportError):
    """Something that needs torch, where torch is not installed. The message says what helps."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} needs torch, which is not installed: `pip install torch`")


@contextmanager
def needing_torch(what: str) -> Iterator[None]:
    """Raise TorchMissingError, which names `what`, where something inside imports torch and it is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise TorchMissingError(what) from error
