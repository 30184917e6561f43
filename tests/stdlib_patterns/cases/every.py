"""The cases of every pattern, gathered from the lists `CASES` of the modules in this folder."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

import cases
from cases.case import Case


@cache
def every_case() -> Mapping[str, tuple[Case, ...]]:
    """Return the cases by the name of their pattern."""
    cases_by_name: dict[str, list[Case]] = {}
    for module in sorted(module_info.name for module_info in pkgutil.iter_modules(cases.__path__, "cases.")):
        for case in getattr(importlib.import_module(module), "CASES", ()):
            cases_by_name.setdefault(case.name, []).append(case)
    return {name: tuple(pattern_cases) for name, pattern_cases in sorted(cases_by_name.items())}
