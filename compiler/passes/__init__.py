"""Passes from a pattern to a pattern: single attentions, last rows, documents in the relation, loop-free relations."""
