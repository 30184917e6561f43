"""The table of executors, and the choice of one for a call."""

from __future__ import annotations

from functools import cached_property
from importlib import import_module

import torch
from torch import Tensor

from attnc.compiler.ir import Pattern
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.executors.executor_protocol import CallSite, Executor
from attnc.runtime.fallbacks import OTHER_EXECUTOR, note


class Registered:
    """An executor by name: the module with its `EXECUTOR`, which the first use imports.

    `devices`: the types of devices on which `backend="auto"` takes it.
    """

    def __init__(self, name: str, module: str, *devices: str) -> None:
        self.name = name
        self.devices = devices
        self._module = module

    @cached_property
    def executor(self) -> Executor:
        """The executor."""
        executor: Executor = import_module(f"attnc.runtime.executors.{self._module}").EXECUTOR
        return executor


TABLE = (
    Registered("triton", "triton.triton_entry", "cuda"),
    Registered("cpu", "cpu.cpu_entry", "cpu", "meta"),
    Registered("reference", "reference.reference_entry"),
)
"""Every executor, in the order in which `backend="auto"` tries them."""


_BY_NAME = {registered.name: registered for registered in TABLE}


def executor_named(name: str) -> Executor:
    """Return an executor by its name in `TABLE`."""
    return _BY_NAME[name].executor


def executor_of_operators(q: Tensor) -> Executor:
    """Return the executor that runs torch's operators `attnc::…` on q's device."""
    return executor_named("triton" if q.is_cuda else "cpu")


def choose_executor(requested: Executor | None, pattern: Pattern, call: CallSite) -> Executor:
    """Return the requested executor, or the first one of `TABLE` for the device; one that declines is a fallback.

    Raises UnsupportedError where the requested executor, or every one for the device, declines.
    """
    if requested is not None:
        reason = requested.supports(pattern, call)
        if reason is not None:
            raise UnsupportedError(reason)
        return requested
    declined = None
    for registered in TABLE:
        if call.device.type in registered.devices:
            reason = registered.executor.supports(pattern, call)
            if reason is None:
                if declined is not None:
                    note(pattern.name, OTHER_EXECUTOR, declined)
                return registered.executor
            declined = declined or reason
    raise UnsupportedError(declined or _no_executor(call.device))


def executor_of_plans(requested: Executor | None, device: torch.device | str | None) -> Executor:
    """Return the executor that runs calls on a device, for a plan; None: a CPU. Raises UnsupportedError."""
    kind = "cpu" if device is None else torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise UnsupportedError(f'device={device}: plans are for "cpu" and "cuda"')
    if requested is None:
        return next(registered for registered in TABLE if kind in registered.devices).executor
    if kind == "cuda" and requested.name == "cpu":
        raise UnsupportedError(f'device={device} and backend="cpu": the CPU executor runs on "cpu" alone')
    return requested


def refuse_in_graphs(requested: Executor | None, pattern: Pattern, device: torch.device) -> None:
    """Raise UnsupportedError for a call that torch.compile traces and no operator of torch can run.

    The operators choose their executor when they run, so that no choice is traced.
    """
    if requested is None:
        reason = None if device.type in _DEVICES else _no_executor(device)
    else:
        reason = requested.supports(pattern, CallSite(device, traced=True))
    if reason is not None:
        raise UnsupportedError(reason)


_DEVICES = frozenset(device for registered in TABLE for device in registered.devices)


def _no_executor(device: torch.device) -> str:
    return (
        f'q is on {device}, which is not supported; use backend="reference" (dense, O(Nq · Nk)), or move '
        f"the tensors to the CPU"
    )
