"""The relations and documents of a call, from its shape. Never imports torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from numpy.typing import NDArray

from attnc.compiler.ir import BOUNDARIES, Pattern
from attnc.compiler.planning.build_plan import CallShape, Relations
from attnc.compiler.planning.documents import (
    BoundariesError,
    DocumentsNotContiguousError,
    Windows,
    document_windows,
    packed_windows,
)
from attnc.runtime.call.call_errors import ArgumentError
from attnc.runtime.call.requirements import check_requirements

T = TypeVar("T")


def relations_of(pattern: Pattern, shape: CallShape) -> Relations:
    """Return the relations of a call.

    Raises SpecError for a requirement that the call violates, ArgumentError for documents whose tokens are scattered.
    """
    relations = Relations(pattern, shape)
    check_requirements(pattern, shape)
    _checked(pattern, relations.check_documents)
    return relations


def documents_of_call(pattern: Pattern, ids: NDArray[Any], n_q: int, n_k: int) -> list[Windows]:
    """Return the documents of each batch entry, or of all entries alike, from the input `pattern.documents`.

    Raises ArgumentError for documents whose tokens are scattered, and for invalid boundaries.
    """
    assert pattern.documents is not None
    if BOUNDARIES in pattern.documents.dims:
        return [_checked(pattern, lambda: packed_windows(ids, n_q, n_k, pattern.align))]
    rows = ids if "batch" in pattern.documents.dims else ids[None]
    return [_checked(pattern, partial(document_windows, row, n_q, pattern.align)) for row in rows]


def _checked(pattern: Pattern, look: Callable[[], T]) -> T:
    try:
        return look()
    except DocumentsNotContiguousError as error:
        raise _not_contiguous(pattern, error) from error
    except BoundariesError as error:
        raise ArgumentError(f"cu_seqlens {error}") from error


def _not_contiguous(pattern: Pattern, error: DocumentsNotContiguousError) -> ArgumentError:
    name = pattern.documents.name if pattern.documents else "documents"
    return ArgumentError(
        f"the input `{name}` is not in contiguous runs: id {error.identity} reappears at position {error.position}; "
        f"put each document's tokens one after another, or compare ids in `visible`"
    )
