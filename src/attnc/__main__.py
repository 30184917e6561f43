"""Entry point of `python -m attnc`."""

from __future__ import annotations

import sys

from attnc.runtime.cli import main

if __name__ == "__main__":
    sys.exit(main())
