"""The former name of `CallArguments`."""

from attnc.runtime.call.arguments import CallArguments as CallInputs

__all__ = ["CallInputs"]
