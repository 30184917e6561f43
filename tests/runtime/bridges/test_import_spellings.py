"""Every way of importing the bridges gives the same module."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "script",
    [
        "import attnc.bridges",
        "import attnc\nattnc.bridges.sdpa_mask\nimport attnc.bridges",
        "from attnc.bridges import from_flash_window\nimport attnc",
        "from attnc import bridges\nimport attnc.bridges",
    ],
)
def test_import_spellings_give_one_module(script: str) -> None:
    script += "\nimport sys, attnc.runtime.bridges as home"
    script += "\nassert attnc.bridges is home is sys.modules['attnc.bridges']"
    script += "\nassert attnc.bridges.from_flash_window((3, 0)).parameters['window'] == 4"
    script += "\ntry: attnc.bridges.nothing\nexcept AttributeError as error: assert 'attnc.bridges' in str(error)\n"
    environment = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
