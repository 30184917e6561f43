"""The selections that gathered queries or gathered tokens can execute."""

from __future__ import annotations

from attnc.compiler import ir
from attnc.compiler.analysis.pooled import is_plain_or_pooled
from attnc.compiler.planning.selected_keys import SelectedKeys, chosen_keys
from attnc.compiler.planning.selected_tokens import SelectedTokens, chosen_tokens


def choice_of(node: ir.Attend) -> SelectedKeys | None:
    """Return the selection of blocks that the relation consists of, if gathered queries can execute it."""
    return chosen_keys(node.visible) if is_plain_or_pooled(node) else None


def tokens_of(node: ir.Attend) -> SelectedTokens | None:
    """Return the selection of tokens that the relation consists of, if gathered tokens can execute it."""
    return chosen_tokens(node.visible) if is_plain_or_pooled(node) else None
