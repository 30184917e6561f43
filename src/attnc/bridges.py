"""An alias that makes `import attnc.bridges` and `from attnc.bridges import …` find `attnc.runtime.bridges`."""

import sys

from attnc.runtime import bridges
from attnc.runtime.bridges import *  # noqa: F403

sys.modules[__name__] = bridges
