"""The pattern IR: nodes (`nodes`), the graph of a pattern (`pattern`), constructors, rewriting, printing, verification.

`from attnc.compiler import ir` gives all nodes. Modules that `pattern` itself needs import `nodes` instead.
"""

from attnc.compiler.ir.nodes import *  # noqa: F403  every name of the module is part of the IR
from attnc.compiler.ir.pattern import *  # noqa: F403  every name of the module is part of the IR
