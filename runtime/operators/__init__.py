"""Operators of torch: importing this registers them all, as an exported model needs before it is loaded."""

from attnc.runtime.operators import cached, general, plain

__all__ = ["cached", "general", "plain"]
