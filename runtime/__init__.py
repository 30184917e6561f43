"""Executors, the `Attention` callable and the command line: the only package that touches torch, disk and terminal."""

from attnc.runtime.process.environment import verifies_ir

if verifies_ir():
    from attnc.compiler.ir.verify_ir import verify_passes

    verify_passes()
