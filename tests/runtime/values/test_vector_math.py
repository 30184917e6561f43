"""The first exponentials of a process are as accurate as later ones."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import torch
import attnc
attnc.compile_attention
attnc.merge
x = torch.linspace(-5, 5, 8000, dtype=torch.float32)
first, second = torch.exp(x), torch.exp(x)
assert torch.equal(first, second), (first - second).abs().max()
"""


def test_first_exponentials() -> None:
    """Unless vector math is initialised first, about one process in ten fails on some machines."""
    processes = [subprocess.Popen([sys.executable, "-c", CODE], stderr=subprocess.PIPE, text=True) for _ in range(6)]
    errors = [process.communicate()[1] for process in processes]
    assert not [error for error, process in zip(errors, processes, strict=True) if process.returncode], errors
