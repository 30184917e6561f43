"""Kernels compiled for GPUs in one child process that all tests of a worker share.

A child takes three core-seconds to import the product and to hash Triton's library, as long as three kernels. Tests
that use it are in the group `compiling`, so that one worker starts one child.
"""

from __future__ import annotations

from collections.abc import Sequence

from attnc.runtime.toolchain import compiling
from attnc.runtime.toolchain.compiling import Job, Outcome


class Compiler:
    """A child process that is started when the first kernel is compiled."""

    def __init__(self) -> None:
        self._child = compiling._Child(compiling._SERVE, compiling.LONGEST)

    def __call__(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Compile kernels and return their outcomes in order."""
        return [self._child.ask(job) for job in jobs]

    def end(self) -> None:
        """Stop the child."""
        self._child.end()
