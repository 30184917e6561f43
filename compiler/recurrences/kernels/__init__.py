"""Kernels of linear recurrences, as text."""
