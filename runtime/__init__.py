"""Executors, the `Attention` callable and the command line: all that touches torch, the disk and the terminal."""

from attnc.runtime.environment import verifies_ir

if verifies_ir():
    from attnc.compiler.verify_ir import verify_passes

    verify_passes()
