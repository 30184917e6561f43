"""Floating-point values of the IR as torch tensors over blocks of pairs."""
