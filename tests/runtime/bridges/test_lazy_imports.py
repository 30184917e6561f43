"""Bridges import without the packages that they connect to, and name the missing package when used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import attnc
from attnc import UnsupportedError


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnsupportedError, match=r"Transformers .* is missing .*pip install 'attnc\[interop\]'"):
        attnc.bridges.register_transformers("causal")


def test_packages_are_imported_on_first_use() -> None:
    script = (
        "import sys, attnc\n"
        "assert not any(name.startswith('attnc.runtime') for name in sys.modules)\n"
        "attnc.bridges.register_transformers, attnc.bridges.install_diffusers\n"
        "assert not {'transformers', 'diffusers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": ":".join(sys.path)}, check=False)
    assert done.returncode == 0


def test_unknown_attributes_raise() -> None:
    with pytest.raises(AttributeError, match=r"'attnc\.bridges' has no attribute 'register_transformer'"):
        attnc.bridges.register_transformer  # noqa: B018
