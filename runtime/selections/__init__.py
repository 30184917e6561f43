"""Selections: what rows choose, computed from q, k, v and inputs before the attentions that ask."""
