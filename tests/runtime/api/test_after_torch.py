"""`import attnc` declares the operators once torch is imported; test_compile.py loads programs that need them."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader as AbstractLoader
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from attnc import after_torch
from attnc.runtime.operators import FAKE, OPERATORS


def test_every_declared_key_has_its_kernel_and_no_kernel_is_left_out() -> None:
    declared = {(name, key) for name, operator in OPERATORS.items() for key in (*operator.keys, FAKE)}
    modules = {operator.module for operator in OPERATORS.values()}
    kernels = [key for module in modules for key in import_module(module).KERNELS]
    assert sorted(kernels) == sorted(declared)


class Loader(AbstractLoader):
    """A loader of torch that fails the first time, like an installation that lacks a library."""

    def __init__(self) -> None:
        self.runs = 0

    def create_module(self, spec: ModuleSpec) -> None:
        assert spec.name == "torch"

    def exec_module(self, module: ModuleType) -> None:
        assert module.__loader__ is self
        self.runs += 1
        if self.runs == 1:
            raise OSError("libtorch.so")

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name == "torch" else None


def test_operators_are_declared_after_torch_and_the_hook_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, torch_loader, declared = after_torch._Finder(), Loader(), []
    monkeypatch.setattr(sys, "meta_path", [ours, torch_loader])
    monkeypatch.setattr(after_torch, "_declare", lambda: declared.append(torch_loader.runs))
    assert ours.find_spec("json") is None
    for runs in (1, 2):
        spec = ours.find_spec("torch")
        assert spec is not None
        assert spec.loader is not None
        assert spec.loader.runs == runs - 1  # type: ignore[attr-defined]
        module = ModuleType("torch")
        module.__spec__ = spec
        assert spec.loader.create_module(spec) is None
        if runs == 1:
            with pytest.raises(OSError, match="libtorch"):
                spec.loader.exec_module(module)
            assert sys.meta_path == [ours, torch_loader]
        else:
            spec.loader.exec_module(module)
            assert spec.loader is torch_loader
    assert declared == [2]
    assert sys.meta_path == [torch_loader]


def test_one_hook_at_most_and_none_where_torch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [])
    after_torch.declare_operators()
    assert sys.meta_path == []
    monkeypatch.delitem(sys.modules, "torch")
    after_torch.declare_operators()
    after_torch.declare_operators()
    assert len(sys.meta_path) == 1


def test_torch_keeps_its_own_loader() -> None:
    assert type(torch.__loader__).__module__ != after_torch.__name__
