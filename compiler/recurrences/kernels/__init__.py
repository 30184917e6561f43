"""Triton texts of recurrence kernels."""
