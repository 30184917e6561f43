"""The cases of every pattern: what the modules beside this one list as `CASES`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

import cases
from cases.case import Case


@cache
def every_case() -> Mapping[str, tuple[Case, ...]]:
    """Cases by the name of their pattern."""
    found: dict[str, list[Case]] = {}
    for module in sorted(one.name for one in pkgutil.iter_modules(cases.__path__, "cases.")):
        for case in getattr(importlib.import_module(module), "CASES", ()):
            found.setdefault(case.name, []).append(case)
    return {name: tuple(own) for name, own in sorted(found.items())}
