"""Checks of one call: its tensors, sizes and inputs, with typed errors that name the mistake."""
