"""Selections: the blocks that rows select, computed from q, k, v and inputs before the attentions that read them."""
