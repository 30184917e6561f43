"""Plans kept by an `Attention`, by call shape and the data that the relation reads; bounded, safe across threads."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from threading import Lock

import numpy as np

from attnc.compiler.ir import Pattern
from attnc.compiler.planning.build_plan import CallShape, Relations, build_plan
from attnc.compiler.planning.documents import DocumentsNotContiguousError
from attnc.compiler.planning.plan import Plan
from attnc.runtime.call import Sizes, call_shape
from attnc.runtime.errors import ArgumentError
from attnc.runtime.requirements import check_requirements
from attnc.runtime.settings import SETTINGS


class PlanCache:
    """Least recently used plans."""

    def __init__(self) -> None:
        self._plans: OrderedDict[Hashable, Plan] = OrderedDict()
        self._lock = Lock()

    def plan(self, pattern: Pattern, sizes: Sizes, given: Mapping[str, object]) -> Plan:
        """The plan of a call, from the cache where the same shape and data were seen."""
        if not pattern.tensors and not given:
            return self._known(sizes) or self._kept(
                sizes, build_plan(relations_of(pattern, call_shape(pattern, sizes, given)))
            )
        shape = call_shape(pattern, sizes, given)
        key = (sizes, _digest(shape))
        return self._known(key) or self._kept(key, build_plan(relations_of(pattern, shape)))

    def _known(self, key: Hashable) -> Plan | None:
        with self._lock:
            if key in self._plans:
                self._plans.move_to_end(key)
            return self._plans.get(key)

    def _kept(self, key: Hashable, plan: Plan) -> Plan:
        with self._lock:
            self._plans[key] = plan
            while len(self._plans) > SETTINGS.plans:
                self._plans.popitem(last=False)
        return plan


def relations_of(pattern: Pattern, shape: CallShape) -> Relations:
    """The relations of a call.

    Raises SpecError for a requirement that it breaks, ArgumentError for documents whose tokens are scattered.
    """
    relations = Relations(pattern, shape)
    check_requirements(relations)
    try:
        relations.check_documents()
    except DocumentsNotContiguousError as error:
        raise _not_contiguous(pattern, error) from error
    return relations


def _not_contiguous(pattern: Pattern, error: DocumentsNotContiguousError) -> ArgumentError:
    name = pattern.documents.name if pattern.documents else "documents"
    return ArgumentError(
        f"the input `{name}` is not in contiguous runs: id {error.identity} comes back at position {error.position}; "
        f"give each document's tokens one after another, or compare ids in `visible`"
    )


def _digest(shape: CallShape) -> bytes:
    """The contents of the inputs."""
    hasher = hashlib.sha256()  # in hardware on most machines
    for name, array in sorted(shape.inputs.items()):
        hasher.update(f"{name}:{array.dtype}:{array.shape};".encode())
        hasher.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return hasher.digest()
