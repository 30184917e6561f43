"""`import attnc.bridges` and `from attnc.bridges import …`: the same module as `attnc.bridges` after `import attnc`."""

import sys

from attnc.runtime import bridges
from attnc.runtime.bridges import *  # noqa: F403

sys.modules[__name__] = bridges
