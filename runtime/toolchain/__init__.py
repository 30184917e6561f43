"""Kernels compiled without a GPU, their machine code, and the rules that it must pass."""
