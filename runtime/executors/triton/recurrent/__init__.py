"""Recurrences by Triton kernels."""
