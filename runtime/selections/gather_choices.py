"""The choices that gathered queries, or gathered tokens, serve."""

from __future__ import annotations

from attnc.compiler import ir
from attnc.compiler.planning.selected_keys import SelectedKeys, chosen_keys
from attnc.compiler.planning.selected_tokens import SelectedTokens, chosen_tokens
from attnc.compiler.pooled import is_plain_or_pooled


def choice_of(node: ir.Attend) -> SelectedKeys | None:
    """The choice that an attention's relation is, if gathered queries serve it."""
    return chosen_keys(node.visible) if is_plain_or_pooled(node) else None


def tokens_of(node: ir.Attend) -> SelectedTokens | None:
    """The choice of tokens that an attention's relation is, if gathered ones serve it."""
    return chosen_tokens(node.visible) if is_plain_or_pooled(node) else None
